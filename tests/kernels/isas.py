"""The instruction sets of the native library that this CPU has, and a test in one of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from agro_kernels._cpu import native

LIBRARY = native.load()
ISAS = [] if LIBRARY is None else LIBRARY.agro_available_isas().decode().split(",")


@contextmanager
def chosen(isa: str) -> Iterator[None]:
    """The library uses it inside."""
    assert LIBRARY is not None
    before = LIBRARY.agro_isa().decode()
    native.choose_isa(LIBRARY, isa)
    try:
        yield
    finally:
        native.choose_isa(LIBRARY, before)
