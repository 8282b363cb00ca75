"""Threads that nobody waits for: how many work at once, and what is begun when their block ends."""

from concurrent.futures import as_completed
from threading import Barrier, Event, current_thread

import pytest

from agro_train.engines.background import at_once, in_background


def test_functions_run_as_many_at_once_as_they_may() -> None:
    pair = Barrier(2)  # passed by two at once, and by no fewer

    def number(n: int) -> tuple[int, bool]:
        pair.wait(5)
        return n, current_thread().daemon

    with at_once([lambda n=n: number(n) for n in range(6)], 2) as futures:  # type: ignore[misc]
        assert {future.result(5) for future in as_completed(futures, 5)} == {
            (n, True) for n in range(6)
        }
    with at_once([], 2) as none:
        assert none == []


def test_block_that_ends_begins_nothing_more_and_waits_for_nobody() -> None:
    begun: list[int] = []
    first, held = Event(), Event()

    def number(n: int) -> int:
        begun.append(n)
        first.set()
        assert held.wait(10)
        return n

    with (
        pytest.raises(KeyboardInterrupt),
        at_once([lambda n=n: number(n) for n in range(9)], 1) as futures,  # type: ignore[misc]
    ):
        assert first.wait(5)
        raise KeyboardInterrupt
    assert not futures[0].done()
    held.set()
    assert futures[0].result(5) == 0
    assert all(future.cancelled() for future in futures[1:]) and begun == [0]


def test_failure_is_raised_where_the_result_is_wanted() -> None:
    def fail() -> int:
        raise ValueError("no")

    for future in (in_background(fail), in_background(lambda: 3)):
        if future.exception(5) is None:
            assert future.result() == 3
        else:
            with pytest.raises(ValueError, match="no"):
                future.result()
