"""The inputs of a head op on a GPU, reduced to the rows that count."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """M of the N rows of a call, and what all rows share."""

    index: Tensor | None  # (M,) int64, which of the N rows these are; None: all of them
    num_tokens: int  # N
    hidden: Tensor  # (M, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (M,) int32 or int64
    bias: Tensor | None  # (V,)
    temperature: float
    token_temperature: Tensor | None  # (M,) fp32, in the place of temperature
    softcap: float  # 0.0: none
    ignore_index: int
    round_logits: torch.dtype | None
    kept: Tensor | None  # (M, ceil(V / 32)) int32

    def take(self, values: Tensor) -> Tensor:
        """(N, ...) -> (M, ...), contiguous."""
        return values.contiguous() if self.index is None else values.index_select(0, self.index)

    def put_back(self, values: Tensor) -> Tensor:
        """(M, ...) -> (N, ...), zeros in the rows that do not count."""
        if self.index is None:
            return values
        zeros = values.new_zeros(self.num_tokens, *values.shape[1:])
        return zeros.index_copy_(0, self.index, values)

    def part(self, rows: slice) -> "Head":
        """Some of the M rows, without a copy; index stays that of all M."""
        temperatures = self.token_temperature
        return replace(
            self,
            hidden=self.hidden[rows],
            targets=self.targets[rows],
            token_temperature=None if temperatures is None else temperatures[rows],
            kept=None if self.kept is None else self.kept[rows],
        )


def counted_head(
    counted: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    ignore_index: int,
    round_logits: torch.dtype | None,
    kept: Tensor | None,
) -> Head:
    """The rows of the (N,) bool mask `counted`, gathered; what the others hold is never read.

    How many rows count is known to the device only, so this waits for it, once. A CUDA graph being
    captured cannot wait: there all rows stay, the others with zero hidden states and ignored.
    """
    index = None
    if waiting_is_possible(hidden.device):
        index = counted.nonzero().squeeze(1)
        if index.shape[0] == counted.shape[0]:
            index = None
    else:
        hidden = hidden.masked_fill(~counted[:, None], 0.0)
        targets = targets.where(counted, ignore_index)
    head = Head(
        index=index,
        num_tokens=counted.shape[0],
        hidden=hidden if index is None else hidden.index_select(0, index),
        weight=weight,
        targets=targets,
        bias=None if bias is None else bias.contiguous(),
        temperature=temperature,
        token_temperature=token_temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        round_logits=round_logits,
        kept=kept,
    )
    return replace(
        head,
        targets=head.take(targets),
        token_temperature=None if token_temperature is None else head.take(token_temperature),
        kept=None if kept is None else head.take(kept),
    )


def waiting_is_possible(device: torch.device) -> bool:
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
