"""The ids that a sampler kept for each token, as one bit a vocabulary entry: what the kernels read.

A bit costs 1/16 of a bf16 logit, and a tile of logits finds its bits without a search.
"""

import torch
from torch import Tensor


def pack_kept_ids(kept_ids: Tensor, vocabulary: int) -> Tensor:
    """(N, ceil(V / 32)) int32: bit v % 32 of word v // 32 is set where v is among a row's ids.

    kept_ids (N, K) int32 or int64 in any order, repeated or not. Negative ids are padding; a row of
    nothing else keeps every entry. An id of V or more is a ValueError on the CPU; on a GPU, where
    looking would stall the device, it is left out.
    """
    n, words = kept_ids.shape[0], -(-vocabulary // 32)
    if kept_ids.device.type == "cpu" and bool((kept_ids >= vocabulary).any()):
        row, place = (kept_ids >= vocabulary).nonzero()[0].tolist()
        raise ValueError(
            f"kept_ids: expected ids below {vocabulary}, got {int(kept_ids[row, place])} in row "
            f"{row}; pad with -1"
        )
    ids, _ = kept_ids.long().sort(1)
    counted = (ids >= 0) & (ids < vocabulary)
    counted[:, 1:] &= ids[:, 1:] != ids[:, :-1]  # each id once, so that adding bits sets them
    ids = ids.where(counted, 0)
    bits = torch.ones_like(ids) << (ids % 32)
    bits = bits.where(counted, 0)
    # Bit 31 is the sign bit of an int32, so the bits are added in int64 and then narrowed.
    packed = bits.new_zeros(n, words).scatter_add_(1, ids // 32, bits)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    every = (kept_ids < 0).all(1, keepdim=True)
    return torch.where(every, torch.full_like(packed, -1), packed)
