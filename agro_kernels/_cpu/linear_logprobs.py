"""linear_logprobs on the native kernels of csrc.

The library gets pointers. The blocked torch path serves float64, round_logits and kept ids, and
everything where the library is not built.

Letters: N tokens, D hidden size, V vocabulary.
"""

import ctypes

import torch
from torch import Tensor

from agro_kernels._cpu import native
from agro_kernels._torch import linear_logprobs as blocked
from agro_kernels.arguments import check_target_values
from agro_kernels.backward import Backward
from agro_kernels.head import Head
from agro_kernels.kept_logits import KeptLogits
from agro_kernels.many_targets import KnownEntries

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # agro_head.dtype


def _library(head: Head) -> ctypes.CDLL | None:
    """The library if it serves this head, None if the blocked torch path does."""
    if head.hidden.dtype not in DTYPES or head.round_logits is not None or head.kept is not None:
        return None
    return native.load()


class _Struct:
    """A head as the library takes it; keeps alive what it points to."""

    def __init__(self, head: Head) -> None:
        hidden, weight = _with_contiguous_rows(head.hidden), _with_contiguous_rows(head.weight)
        targets = head.targets.to(torch.int64).contiguous()
        bias = None if head.bias is None else head.bias.contiguous()
        token_temperature = head.token_temperature
        if token_temperature is not None:
            token_temperature = _floats(token_temperature)
        self._alive = hidden, weight, targets, bias, token_temperature
        self._struct = native.Head(
            hidden=hidden.data_ptr(),
            weight=weight.data_ptr(),
            targets=targets.data_ptr(),
            bias=_pointer(bias),
            token_temperature=_pointer(token_temperature),
            n=hidden.shape[0],
            d=hidden.shape[1],
            v=weight.shape[0],
            hidden_stride=hidden.stride(0),
            weight_stride=weight.stride(0),
            ignore_index=head.ignore_index,
            temperature=head.temperature,
            softcap=head.softcap,
            dtype=DTYPES[hidden.dtype],
            num_threads=torch.get_num_threads(),
        )

    @property
    def pointer(self) -> "ctypes._Pointer[native.Head]":
        return ctypes.pointer(self._struct)


def _kept_struct(kept_logits: KeptLogits | None) -> "ctypes._Pointer[native.Kept] | None":
    """The memory of the kept logits as the library takes it; what lies where is its own affair."""
    if kept_logits is None:
        return None
    logits, maxima = kept_logits
    return ctypes.pointer(native.Kept(logits.data_ptr(), maxima.data_ptr(), kept_logits.columns))


def _entries_struct(known: KnownEntries | None) -> "ctypes._Pointer[native.Entries] | None":
    """Contiguous ones, as the library takes them."""
    if known is None:
        return None
    ids, values = known
    return ctypes.pointer(native.Entries(ids.data_ptr(), values.data_ptr(), ids.shape[1]))


def _with_contiguous_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def _floats(values: Tensor) -> Tensor:
    """(N,) fp32, contiguous."""
    return values.to(torch.float32).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _wanted(tensor: Tensor) -> int | None:
    """The address of an output; None if it is empty: not asked for, or without an element."""
    return tensor.data_ptr() if tensor.numel() > 0 else None


def linear_logprobs_fwd(
    head: Head, with_entropy: bool, kept_logits: KeptLogits | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), each (N,) fp32; entropy is (0,) unless with_entropy.

    kept_logits: the memory that is filled for the backward pass; None: nothing is kept.
    """
    library = _library(head)
    if library is None:
        return blocked.linear_logprobs_fwd(head, with_entropy, kept_logits)
    head.check_values()
    n = head.hidden.shape[0]
    logprobs = head.hidden.new_empty(n, dtype=torch.float32)
    lse = torch.empty_like(logprobs)
    entropy = logprobs.new_empty(n if with_entropy else 0)
    struct = _Struct(head)
    status = library.agro_linear_logprobs_fwd(
        struct.pointer,
        logprobs.data_ptr(),
        lse.data_ptr(),
        _wanted(entropy),
        _kept_struct(kept_logits),
    )
    native.check_status(status, "linear_logprobs")
    return logprobs, lse, entropy


def linear_logprobs_bwd(backward: Backward) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias)."""
    upstream, head, output_mask, weight_grad, kept_logits, known = backward
    library = _library(head)
    if library is None:
        return blocked.linear_logprobs_bwd(backward)
    # The targets may have been changed since the forward pass checked them.
    check_target_values(head.targets, head.weight.shape[0], head.ignore_index)
    upstream = upstream.each(_floats)
    if known is not None:
        known = KnownEntries(known.ids.contiguous(), _floats(known.values))
    gradients = _Gradients(head, output_mask, weight_grad)
    struct = _Struct(head)
    status = library.agro_linear_logprobs_bwd(
        _pointer(upstream.dlogprobs),
        _pointer(upstream.dlse),
        _pointer(upstream.dentropy),
        _pointer(upstream.dsum),
        struct.pointer,
        _pointer(upstream.lse),
        _pointer(upstream.entropy),
        *gradients.pointers,
        _kept_struct(kept_logits),
        _entries_struct(known),
    )
    native.check_status(status, "linear_logprobs, backward")
    return gradients.results()


class _Gradients:
    """The outputs of a backward pass, unwritten; those not asked for have shape (0,)."""

    def __init__(self, head: Head, output_mask: list[bool], weight_grad: Tensor | None) -> None:
        need_hidden, need_weight, need_bias = output_mask
        (n, d), v = head.hidden.shape, head.weight.shape[0]
        write_weight = need_weight and weight_grad is None
        self.dhidden = head.hidden.new_empty((n, d) if need_hidden else 0)
        self.dweight = head.weight.new_empty((v, d) if write_weight else 0)
        self.dbias = head.weight.new_empty(v if need_bias else 0)
        self.weight_grad = weight_grad if need_weight else None
        # The library can only add to contiguous memory.
        self.sums = None if self.weight_grad is None else self.weight_grad.contiguous()

    @property
    def pointers(self) -> tuple[int | None, ...]:
        return (
            _wanted(self.dhidden),
            _wanted(self.dweight),
            _wanted(self.dbias),
            _pointer(self.sums),
        )

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        buffer, sums = self.weight_grad, self.sums
        if buffer is not None and sums is not None and sums is not buffer:
            buffer.copy_(sums)
        return self.dhidden, self.dweight, self.dbias
