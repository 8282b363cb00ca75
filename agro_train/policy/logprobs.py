"""Log-probabilities of whole completions under a model, micro-batch by micro-batch."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from agro_train.config import TrainConfig
from agro_train.data.batch import pack
from agro_train.transfer import download
from agro_train.types import MicroBatch, Rollout

# What a rank without a micro-batch of its own reads to keep step with the others: token 0 after
# token 0. Its result is not used.
FILLER = pack(
    [Rollout("", "", (0,), "", (0,), finish="length", reward=None)],
    token_budget=1,
    share_prompts=False,
)[0]


def sequence_logprobs(
    model: nn.Module,
    micro: tuple[MicroBatch, ...],
    count: int,
    config: TrainConfig,
    device: torch.device,
) -> Tensor:
    """(count,) float64 log-probabilities of whole completions, nats; 0 for rows not in `micro`."""
    sums = torch.zeros(count, dtype=torch.float64)
    with torch.no_grad():
        everyone = even_out(micro)
        found = [model(piece.to(device), config.temperature).logprobs for piece in everyone]
    # Read when all passes are on their way; the extra ones are not.
    for piece, logprobs in zip(micro, download(found[: len(micro)]), strict=True):
        sums += row_sums(logprobs, piece.token_rows(), count)
    return sums


def with_sampling_logprobs(
    rollouts: Sequence[Rollout], model: nn.Module, config: TrainConfig, device: torch.device
) -> list[Rollout]:
    """The rollouts with the log-probabilities that the model which sampled them gives them."""
    micro = pack(
        rollouts,
        token_budget=config.token_budget,
        share_prompts=config.share_prompts,
        min_new_tokens=config.min_new_tokens,
    )
    sums = sequence_logprobs(model, micro, len(rollouts), config, device).tolist()
    return [replace(r, sampling_logprob=logprob) for r, logprob in zip(rollouts, sums, strict=True)]


def even_out(micro: tuple[MicroBatch, ...]) -> tuple[MicroBatch, ...]:
    """The same number on every rank, by repeating the last one: a rank that calls the sharded model
    less often than the others would leave them waiting for ever."""
    most: int = max(gather_object([len(micro)]))
    return micro + (micro or (FILLER,))[-1:] * (most - len(micro))


def row_sums(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count,) float64 sums of per-token values over each completion, all of it on the host."""
    sums = torch.zeros(count, dtype=torch.float64)
    return sums.index_add_(0, rows, values.double())
