"""Tensors between the host and the device: in one piece, and waited for as seldom as can be.

A copy from ordinary memory makes the host wait until the device has done all that it was asked to
do before. One from pinned memory does not, and one back does always.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 512  # bytes, as torch's own allocator on CUDA aligns each tensor


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The host's tensors on the device, by one copy that is not waited for. On a CPU they are the
    same tensors."""
    if device.type == "cpu":
        return list(tensors)
    places, size = [], 0
    for tensor in tensors:
        places.append(slice(size, size + tensor.nbytes))
        size += -(-tensor.nbytes // ALIGNED) * ALIGNED
    whole = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for tensor, place in zip(tensors, places, strict=True):
        _part(whole, place, tensor).copy_(tensor)
    there = whole.to(device, non_blocking=True)
    return [_part(there, place, tensor) for tensor, place in zip(tensors, places, strict=True)]


def _part(whole: Tensor, place: slice, like: Tensor) -> Tensor:
    return whole[place].view(like.dtype).view(like.shape)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The device's tensors (..., n), alike but for n, on the host: one wait for all of them."""
    if not tensors:
        return []
    sizes = [tensor.shape[-1] for tensor in tensors]
    return list(torch.cat(list(tensors), dim=-1).cpu().split(sizes, dim=-1))
