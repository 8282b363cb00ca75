"""The pool of workers, with processes that do all that a worker may do: die, hang, print, leave
children behind. Nothing waits for a time that is to pass, but for the limits under test.
"""

import os
import select
from pathlib import Path
from typing import IO

import pytest

from agro_train.rewards.workers import CannotStart, NoResult, Workers
from tests.train.rewards import odd_worker

LONG = 60.0  # seconds: a limit that no test reaches
SHORT = 1.0  # seconds: one that some job reaches, and the others do not on a busy machine
LARGE = "x" * (1 << 20)  # more than a pipe holds


def pool(kind: str = "serves", *, size: int = 1, timeout_s: float = LONG) -> Workers:
    return Workers(odd_worker.__name__, kind, size=size, timeout_s=timeout_s)


@pytest.fixture
def pipe(tmp_path: Path) -> str:
    """The name of a pipe, which tells when a process ends that has it open."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return str(path)


def all_writers_end(reader: IO[str]) -> bool:
    """Whether every process that has the pipe open for writing ends, soon."""
    readable, _, _ = select.select([reader], [], [], LONG)
    return bool(readable) and reader.read() == ""


def test_results_come_in_the_order_of_the_jobs() -> None:
    jobs = [["echo", number] for number in range(20)]
    workers = pool(size=3)
    assert workers.map(jobs) == list(range(20))
    assert workers.map([]) == []


def test_jobs_are_done_side_by_side(pipe: str) -> None:
    """Each of the two waits for the other one, so that one after the other would be for ever."""
    first, second = pool(size=2).map([["open", pipe, "r"], ["open", pipe, "w"]])
    assert first != second and not isinstance(first, NoResult)


def test_worker_stays_for_the_next_jobs() -> None:
    workers = pool()
    ids = [*workers.map([["id"], ["id"]]), *workers.map([["id"]])]
    assert len(ids) == 3 and len(set(ids)) == 1


def test_jobs_and_results_of_any_size() -> None:
    assert pool().map([["echo", LARGE]]) == [LARGE]


def test_what_a_job_prints_is_no_result(capfd: pytest.CaptureFixture[str]) -> None:
    workers = pool()
    assert workers.map([["print"], ["echo", "b"]]) == ["printed", "b"]
    assert capfd.readouterr().err == 'ready\n"an answer"\n"another"\n'


def test_job_reads_nothing_of_the_other_jobs() -> None:
    assert pool().map([["read"], ["echo", "b"]]) == ["", "b"]


def test_worker_that_dies_costs_its_job_alone() -> None:
    workers = pool()
    assert workers.map([["echo", "a"], ["die"], ["echo", "b"]]) == ["a", NoResult.DIED, "b"]
    assert NoResult.DIED.value == "error"


def test_job_that_takes_too_long_is_killed_alone() -> None:
    workers = pool(timeout_s=SHORT)
    before, late, after = workers.map([["id"], ["hang"], ["id"]])
    assert late is NoResult.TIMED_OUT and late.value == "timeout"
    assert before != after


@pytest.mark.parametrize(
    ("job", "timeout_s", "result"),
    [("hang", SHORT, NoResult.TIMED_OUT), ("die", 60.0, NoResult.DIED)],
)
def test_what_a_lost_worker_has_started_is_killed(
    job: str, timeout_s: float, result: NoResult, pipe: str
) -> None:
    workers = pool(timeout_s=timeout_s)
    assert workers.map([["leave child", pipe]]) == ["left a child"]
    with open(pipe) as reader:  # waits until the child has opened it
        assert workers.map([[job]]) == [result]
        assert all_writers_end(reader)


def test_workers_end_with_the_pool(pipe: str) -> None:
    workers = pool()
    assert workers.map([["leave child", pipe]]) == ["left a child"]
    with open(pipe) as reader:
        del workers
        assert all_writers_end(reader)


def test_answer_to_an_interrupted_call_is_not_the_next_ones() -> None:
    workers = pool()
    with pytest.raises(KeyboardInterrupt):
        workers.map([["echo", "a"], ["interrupt parent"]])
    assert workers.map([["echo", "b"]]) == ["b"]


def test_workers_leave_interrupts_to_their_parent() -> None:
    assert pool().map([["interrupt itself"]]) == ["not interrupted"]


def test_worker_that_does_not_read_is_late_with_a_job_of_any_size() -> None:
    workers = pool("goes deaf", timeout_s=SHORT)
    assert workers.map(["a", LARGE, "b"]) == ["a", NoResult.TIMED_OUT, "b"]


def test_job_that_a_worker_cannot_take_is_done_by_another() -> None:
    """Each worker closes its input with the first job: as one does that dies between two."""
    workers = pool("answers one")
    assert workers.map(["a"]) == ["a"]
    assert workers.map(["b", "c"]) == ["b", "c"]


def test_workers_that_never_take_a_job_are_given_up() -> None:
    workers = pool("answers none")
    with pytest.raises(CannotStart, match="expected its process to wait for work, got 4 that end"):
        workers.map(["job"])


def test_worker_that_cannot_start_says_why() -> None:
    workers = pool("refuses")
    for _ in range(2):
        with pytest.raises(CannotStart, match="^odd: expected another day, got Sunday$"):
            workers.start()
    with pytest.raises(CannotStart, match="^odd: expected another day, got Sunday$"):
        workers.map(["job"])


@pytest.mark.parametrize(
    ("module", "status"), [(odd_worker.__name__, 3), ("no.such.module", 1)], ids=["exits", "absent"]
)
def test_worker_that_cannot_start_and_does_not_say_why(module: str, status: int) -> None:
    workers = Workers(module, "exits", size=1, timeout_s=LONG, advice="ask the cat")
    message = rf"^{module}: expected its process to start, got none \(exit status {status}\); ask"
    with pytest.raises(CannotStart, match=message):
        workers.map(["job"])


def test_worker_that_is_never_ready_is_given_up() -> None:
    workers = Workers(odd_worker.__name__, "never ready", size=1, timeout_s=LONG, start_s=0.2)
    message = "expected its process to start, got none within 0.2 s; run that module by hand"
    with pytest.raises(CannotStart, match=message):
        workers.start()
