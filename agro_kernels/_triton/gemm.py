"""torch's matrix product, rounded once or, added to an fp32 matrix, not at all."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_REDUCED = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
_SWITCH = threading.Lock()


def add_product(total: Tensor, a: Tensor, b: Tensor, *, keep: bool) -> None:
    """total = a @ b, plus what total holds already if `keep`.

    total (M, N) fp32; a (M, K) and b (K, N) in one dtype, any strides.
    """
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=int(keep), out=total)
    else:
        _add_product_of(a.dtype, a.device)(total, a, b, keep)


def rounded_product(result: Tensor, a: Tensor, b: Tensor) -> None:
    """result = a @ b, summed in fp32 and rounded once; all three of one dtype."""
    with _whole_sums(a.dtype):
        torch.mm(a, b, out=result)


@contextmanager
def _whole_sums(dtype: torch.dtype) -> Iterator[None]:
    """Inside, partial sums of long products of a dtype stay in fp32: torch lets cuBLAS round them
    to 16 bits unless told not to.

    The switch is the process's: threads change it in turn, and it is put back as it was.
    """
    name = _REDUCED.get(dtype)
    if name is None:
        yield
        return
    backend = torch.backends.cuda.matmul
    with _SWITCH:
        allowed = getattr(backend, name)
        # In newer versions of torch the switch is a pair, which also says whether cuBLAS may split
        # a sum into parts; a single truth value would allow that.
        split = getattr(backend, f"{name}_split_k", None)
        setattr(backend, name, False if split is None else (False, split))
        try:
            yield
        finally:
            setattr(backend, name, allowed if split is None else (allowed, split))


@functools.cache
def _add_product_of(
    dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, bool], None]:
    """The first of three ways that works with this torch for 16-bit operands on this device.

    Whether a GEMM with an fp32 result exists depends on CUDA or ROCm and on the version of torch,
    and is not documented. So each way is tried once, with a small product.
    """
    operand = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    for way in (_in_the_gemm, _after_the_gemm):
        try:
            way(total, operand, operand, True)
        except RuntimeError:  # how torch says that it has no such kernel
            continue
        return way
    return _in_fp32


def _in_the_gemm(total: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    torch.addmm(total, a, b, out_dtype=torch.float32, beta=int(keep), out=total)


def _after_the_gemm(total: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    if keep:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=total)


def _in_fp32(total: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    torch.addmm(total, a.float(), b.float(), beta=int(keep), out=total)
