"""Who serves which device.

Torch's dispatcher picks the implementation by the device of the tensors: Triton on CUDA and ROCm,
the native kernels of `csrc` on the CPU, and the blocked torch path of `_torch` everywhere else, for
float64, and where Triton or the native part is missing.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from agro_kernels.agro_options import AgroOptions
from agro_kernels.backward import Backward
from agro_kernels.head import Head
from agro_kernels.logit_rows import LogitRows

library = torch.library.Library("agro", "DEF")


@functools.cache
def triton_import_error() -> ImportError | None:
    """None if Triton can be imported, else why not. Asked at the first CUDA call, not on import."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        warnings.warn(
            f"agro_kernels: triton cannot be imported ({error}), so the blocked torch path serves "
            "CUDA tensors: right, in bounded memory, but several times slower; pip install triton",
            stacklevel=2,
        )
        return error
    return None


def with_record(
    record: Callable[..., tuple[Any, ...]],
    kernel: Callable[..., Any],
    *,
    at: int = 0,
    fields: int | None = None,
) -> Callable[..., Any]:
    """`kernel`, which takes a NamedTuple as its argument number `at`, as the dispatcher calls it.

    The dispatcher has no records: it passes the fields, flat. fields: how many `record` is made of,
    if not all that it has.
    """
    if fields is None:
        fields = len(record._fields)  # type: ignore[attr-defined]
    stop = at + fields

    @functools.wraps(kernel)
    def call(*flat: Any) -> Any:
        return kernel(*flat[:at], record(*flat[at:stop]), *flat[stop:])

    return call


def with_head(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel(head, ...)` as the dispatcher calls it."""
    return with_record(Head, kernel)


def with_numbers(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` where its records may hold numbers as tensors, which compiled graphs do."""

    @functools.wraps(kernel)
    def call(*args: Any) -> Any:
        records = (Head, Backward, AgroOptions, LogitRows)
        return kernel(*(arg.with_numbers() if isinstance(arg, records) else arg for arg in args))

    return call


def without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernels choose their own precision: autocast would round the fp32 tiles inside them."""

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        device_type = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device_type=device_type, enabled=False):
            return kernel(*args, **kwargs)

    return call


def serve_everywhere(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    on_gpu: Callable[..., Any] | None = None,
) -> None:
    """Gives the op `name(head, ...)` one implementation for all devices, `kernel`, or another one
    on GPUs, and its shapes, `fake`."""
    library.impl(name, without_autocast(with_head(kernel)), "CompositeExplicitAutograd")
    if on_gpu is not None:
        library.impl(name, without_autocast(with_head(on_gpu)), "CUDA")
    torch.library.register_fake(f"agro::{name}", with_head(fake), lib=library)


def triton_if_possible(
    name: str, module: str, fallback: ModuleType, *, float64: bool = False
) -> Callable[..., Any]:
    """The function `name` of agro_kernels._triton.<module>, imported when it is first called.

    float64: whether these kernels take float64 tensors; otherwise `fallback` serves them.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if (not float64 and _in_float64(args)) or triton_import_error() is not None:
            return getattr(fallback, name)(*args, **kwargs)
        kernels = importlib.import_module(f"agro_kernels._triton.{module}")
        return getattr(kernels, name)(*args, **kwargs)

    return call


def _in_float64(argument: Any) -> bool:
    """Whether it is a float64 tensor, or has one among its fields if it is a record."""
    if isinstance(argument, tuple):
        return any(map(_in_float64, argument))
    return getattr(argument, "dtype", None) == torch.float64
