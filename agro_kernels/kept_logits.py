"""The logits that a forward pass keeps, so that its backward pass need not make them again.

What is kept: the first K columns of the vocabulary, as many as the caller's `keep_logits_bytes` pay
for. Of each token and column the number

    max(z - m, LOWEST)      z the logit after softcap and temperature, m the row's largest so far

and, in fp32, m for each tile of columns: the largest of all columns up to the tile's last one (a
program that works on wider blocks writes the same m for each of a block's tiles). So the digits are
where the probability is: of a bf16 model's logits, 11 bits below the maximum give the gradients of
logits that were made again. Rows are in the caller's order, so that a backward pass may leave out
other rows than the forward pass did. Rows that the forward pass left out hold no numbers.

Letters: N tokens, D hidden size, V vocabulary, K kept columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from agro_kernels.arguments import AUTO
from agro_kernels.head import Head
from agro_kernels.tiles import architecture, keeps_logits

# fp16's lowest number. Finite, because a banned token's -inf times a probability of 0 is NaN.
LOWEST = -65504.0

# Columns of a tile, and those that K is a multiple of; where there is no GPU it may be V, too. The
# blocks of the kernels are whole tiles, and K is whole blocks: 128 and 256 columns on a GPU;
# elsewhere 192 in csrc and 4096 in _torch. (On a GPU a row of any other length would not begin at a
# multiple of 16 bytes, and the kernel that writes it would spill registers.)
GPU_TILE, GPU_STEP = 128, 256
CPU_TILE, CPU_STEP = 64, 192

# "auto". On a GPU, the fp32 sum of one chunk of the weight's gradient: 4 bytes of at most so many
# rows of D numbers.
AUTO_ROWS = 32768
AUTO_BYTES = 2**30  # on any other device


class KeptLogits(NamedTuple):
    """What a forward pass kept, or where it is to be written."""

    logits: Tensor
    """(N, K) fp16, or fp32 of fp32 inputs: max(z - m, LOWEST)."""
    maxima: Tensor
    """(N, ceil(K / tile)) fp32: m after each tile of columns."""

    @property
    def columns(self) -> int:
        """K."""
        return self.logits.shape[1]

    @property
    def tile(self) -> int:
        """Columns of a tile."""
        return tile_and_step(self.logits.device)[0]


def tile_and_step(device: torch.device) -> tuple[int, int]:
    """(columns of a tile, columns that K is a multiple of)."""
    return (GPU_TILE, GPU_STEP) if device.type == "cuda" else (CPU_TILE, CPU_STEP)


def kept_columns(head: Head, keep_logits_bytes: int) -> int:
    """K: the columns that `keep_logits_bytes`, an int >= 0 or AUTO, pay for, the maxima included.

    0 where logits cannot be kept: of float64 inputs, with round_logits and with kept ids; on a GPU
    of fp32 ones, with a softcap, and where tiles.py says that registers are short. The number of
    tokens may be a symbol of a graph, and is not decided on.
    """
    on_gpu, dtype = head.hidden.device.type == "cuda", head.hidden.dtype
    n, (v, d) = head.hidden.shape[0], head.weight.shape
    if head.round_logits is not None or head.kept is not None or dtype == torch.float64:
        return 0
    if keep_logits_bytes == 0 or (on_gpu and not _gpu_keeps(head)):
        return 0
    budget = keep_logits_bytes
    if budget == AUTO:
        budget = 4 * d * min(v, AUTO_ROWS) if on_gpu else AUTO_BYTES
    tile, step = tile_and_step(head.hidden.device)
    rows = torch.sym_max(n, 1)
    steps = budget // (rows * (step * dtype.itemsize + step // tile * 4))
    columns: int = torch.sym_min(steps, v // step) * step
    if on_gpu:
        return columns
    whole = budget // (rows * (v * dtype.itemsize + -(-v // tile) * 4))  # 0, or all V are paid for
    columns = torch.sym_max(columns, torch.sym_min(whole, 1) * v)
    return columns


def _gpu_keeps(head: Head) -> bool:
    (v, d), gpu = head.weight.shape, architecture(head.hidden.device)
    possible = keeps_logits(gpu, d, v, softcap=head.softcap > 0)
    return possible and head.hidden.dtype != torch.float32


def empty_kept_logits(head: Head, keep_logits_bytes: int) -> KeptLogits:
    """Room for what a forward pass of `head` keeps, unwritten; (N, 0) where that is nothing."""
    columns = kept_columns(head, keep_logits_bytes)
    tile, _ = tile_and_step(head.hidden.device)
    n = head.hidden.shape[0]
    dtype = torch.float16 if head.hidden.dtype.itemsize == 2 else torch.float32
    return KeptLogits(
        head.hidden.new_empty((n, columns), dtype=dtype),
        head.hidden.new_empty((n, (columns + tile - 1) // tile), dtype=torch.float32),
    )
