"""Work in threads that nobody waits for, neither at their block's end nor at the process's: a peer
that is gone may hold one for ever."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def in_background(function: Callable[[], T]) -> Future[T]:
    """In a thread of its own."""
    future: Future[T] = Future()
    Thread(target=_do, args=(function, future), daemon=True).start()
    return future


@contextmanager
def at_once(functions: Sequence[Callable[[], T]], most: int) -> Iterator[list[Future[T]]]:
    """The functions' results to be, in their order, of `most` at a time. What has not begun when
    the block ends, however it ends, or when its future is cancelled, is not begun."""
    futures: list[Future[T]] = [Future() for _ in functions]
    waiting: SimpleQueue[tuple[Callable[[], T], Future[T]]] = SimpleQueue()
    for job in zip(functions, futures, strict=True):
        waiting.put(job)

    def work() -> None:
        while True:
            try:
                _do(*waiting.get_nowait())
            except Empty:
                return

    try:
        for _ in range(min(most, len(futures))):
            Thread(target=work, daemon=True).start()
        yield futures
    finally:
        for future in futures:
            future.cancel()


def _do(function: Callable[[], T], future: Future[T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
