"""Padded (B, T) tensors to packed (N,) ones: what the AGRO ops and packed attention both take."""

from typing import NamedTuple

import torch
from torch import Tensor


class PackedSequences(NamedTuple):
    tensors: tuple[Tensor, ...]
    """Each (N, ...): the counted tokens of all sequences, end to end."""
    cu_seqlens: Tensor
    """(B + 1,) int32: sequence b is tokens cu_seqlens[b]:cu_seqlens[b + 1]."""


def pack_sequences(completion_mask: Tensor, *tensors: Tensor) -> PackedSequences:
    """The tokens of `tensors` that `completion_mask` counts, sequence after sequence.

    Same result as

        packed = tuple(tensor[completion_mask] for tensor in tensors)
        cu_seqlens = [0, *completion_mask.sum(1).cumsum(0)]

    Args:
        completion_mask: (B, T) bool, True where a token counts; padding may be anywhere.
        tensors: each (B, T, ...), any dtype: logprobs, targets, hidden states.

    Returns:
        tensors, each (N, ...) with N the number of True, and cu_seqlens (B + 1,) int32. A sequence
        without a counted token has length 0.

    Gradients flow. N depends on the values of the mask, so on a GPU this waits for the device.
    """
    if completion_mask.ndim != 2:
        raise ValueError(
            f"completion_mask: expected shape (B, T), got {tuple(completion_mask.shape)}; "
            "one row a sequence"
        )
    if completion_mask.dtype != torch.bool:
        raise TypeError(
            f"completion_mask: expected bool, got {completion_mask.dtype}; call .bool()"
        )
    for i, tensor in enumerate(tensors):
        if tensor.shape[:2] != completion_mask.shape:
            raise ValueError(
                f"tensors[{i}]: expected shape (B, T, ...) with (B, T) = "
                f"{tuple(completion_mask.shape)}, got {tuple(tensor.shape)}; pad it alike"
            )
        if tensor.device != completion_mask.device:
            raise ValueError(
                f"tensors[{i}]: expected device {completion_mask.device} like completion_mask, "
                f"got {tensor.device}; move it"
            )
    row, column = completion_mask.nonzero(as_tuple=True)
    lengths = completion_mask.sum(1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    return PackedSequences(tuple(tensor[row, column] for tensor in tensors), cu_seqlens)
