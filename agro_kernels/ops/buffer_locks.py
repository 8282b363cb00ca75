"""One backward pass at a time into a buffer that several Python threads add to.

torch does as much for weight.grad. A lock belongs to a storage, so views of one buffer share it. It
lives as long as somebody waits for it or holds it.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

_locks: "weakref.WeakValueDictionary[int, threading.Lock]" = weakref.WeakValueDictionary()
_registry = threading.Lock()


def _lock_of(buffer: Tensor) -> threading.Lock:
    storage = buffer.untyped_storage().data_ptr()
    with _registry:
        lock = _locks.get(storage)
        if lock is None:
            lock = _locks[storage] = threading.Lock()
        return lock


def in_turn(kernel: Callable[..., Any], *, at: int = -1) -> Callable[..., Any]:
    """`kernel`, whose argument number `at` is the buffer that it adds to, one call a buffer a time.

    On a GPU the calls are queued in turn: streams of one's own are for the caller to order.
    """

    @functools.wraps(kernel)
    def call(*args: Any) -> Any:
        with _lock_of(args[at]):
            return kernel(*args)

    return call
