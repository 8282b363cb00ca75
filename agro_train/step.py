"""One policy update: two passes without gradients, one coefficient a completion, one pass with.

1. Score: log-probabilities of every completion under the policy as it is now and the reference;
   the reference is not asked again for what the batch knows already.
2. Coefficients over whole groups (`agro_coefficients`): from here on a completion's share of the
   gradient is a number that depends on nothing else.
3. Update: sum_t c * logprob_t, micro-batch by micro-batch, through `weighted_logprob_sum`. How
   groups were cut into micro-batches and spread over ranks no longer matters.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from agro_train.algorithm import coefficients
from agro_train.config import TrainConfig
from agro_train.metrics import measure
from agro_train.policy.logprobs import even_out, row_sums, sequence_logprobs
from agro_train.policy.policy import head_gradient
from agro_train.transfer import download, upload
from agro_train.types import MicroBatch, Scores, StepStats, TrainBatch


def update(
    policy: nn.Module,
    reference: nn.Module,
    batch: TrainBatch,
    config: TrainConfig,
    accelerator: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> StepStats:
    """One optimiser step. No valid group, or a gradient that is not finite, leaves the weights as
    they were."""
    # Gradient checkpointing works in training mode only; there is no dropout to switch on.
    policy.train(config.gradient_checkpointing)
    world, rank = accelerator.num_processes, accelerator.process_index
    micro = even_out(batch.micro)
    scores, lse = score_batch(policy, reference, batch, micro, config, accelerator.device)
    everyone, first = gather_scores(scores, rank)
    weights, stats = coefficients(everyone, config)
    # The gradient is averaged over ranks, the coefficients are for its sum.
    mine = weights[first : first + len(scores.rewards)] * world
    head_grad = head_gradient(policy)
    for number, (piece, piece_lse) in enumerate(zip(micro, lse, strict=True), start=1):
        coefficient = mine.to(piece_lse.dtype)
        if number > len(batch.micro):  # an extra one, to keep step with the other ranks
            coefficient = torch.zeros_like(coefficient)
        # A completion with coefficient 0 is not predicted: no products for it. It is left out here,
        # because the host knows how many are left; a GPU would have to be waited for.
        piece, places = piece.predicting(coefficient[piece.rows] != 0)
        per_token, places = upload([coefficient[piece.token_rows()], places], accelerator.device)
        piece = piece.to(accelerator.device)
        with accelerator.no_sync(policy) if number < len(micro) else nullcontext():
            loss = policy(piece, config.temperature, per_token, piece_lse[places], head_grad)
            accelerator.backward(loss)
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert len(gradients) > (head_grad is not None) or not micro, "no weight received a gradient"
    assert head_grad is None or any(g is head_grad for g in gradients), "the head's was replaced"
    grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
    skipped = int(stats.num_groups) == 0 or not math.isfinite(grad_norm)
    if not skipped:
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    policy.eval()
    return StepStats(
        skipped=skipped,
        metrics=measure(everyone, stats, config, grad_norm, skipped),
        weights=tuple(weights.abs().tolist()),
        logprobs=tuple(everyone.logprobs.tolist()),
        groups=tuple(everyone.groups.tolist()),
    )


def score_batch(
    policy: nn.Module,
    reference: nn.Module,
    batch: TrainBatch,
    micro: tuple[MicroBatch, ...],
    config: TrainConfig,
    device: torch.device,
) -> tuple[Scores, list[Tensor]]:
    """Scores of the batch, and each micro-batch's lse (n,), which saves the update a head product.

    Policy and reference go through the same kernels and the same packing, so that equal weights
    give a log-ratio of exactly zero (to rounding where the reference's was computed before).
    """
    logprobs = torch.zeros(len(batch.rewards), dtype=torch.float64)
    lengths = torch.zeros(len(batch.rewards), dtype=torch.int64)
    entropy, num_tokens, lse = 0.0, 0, []
    mismatch, found = [torch.zeros(0, dtype=torch.float64)], []
    with torch.no_grad():
        for piece in micro:
            ours = policy(piece.to(device), config.temperature)
            lse.append(ours.lse)
            found.append(torch.stack([ours.logprobs, ours.entropy]))
    # Read when all passes are on their way; the extra ones are not.
    told = download(found[: len(batch.micro)])
    for piece, (of_tokens, entropies) in zip(batch.micro, told, strict=True):
        logprobs += row_sums(of_tokens, piece.token_rows(), len(logprobs))
        entropy += float(entropies.double().sum())
        num_tokens += len(piece.targets)
        lengths[piece.rows] = piece.cu_seqlens.diff().long()
        apart = (of_tokens - piece.sampling_logprobs).abs().double()
        mismatch.append(apart[piece.sampling_logprobs.isfinite()])
    unknown = tuple(piece for piece in batch.micro if batch.ref_logprobs[piece.rows].isnan().any())
    asked = sequence_logprobs(reference, unknown, len(logprobs), config, device)
    ref_logprobs = torch.where(batch.ref_logprobs.isnan(), asked, batch.ref_logprobs)
    # The reference stands in for a sampler that is not known: recorded data are mostly older than
    # the run, and its log-probabilities are there anyway.
    unknown_sampler = batch.sampling_logprobs.isnan()
    if config.off_policy_taper_against == "reference":
        unknown_sampler = torch.ones_like(unknown_sampler)
    sampler = torch.where(unknown_sampler, ref_logprobs, batch.sampling_logprobs)
    scores = Scores(
        rewards=batch.rewards,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampler.masked_fill(batch.on_policy, math.nan),
        lengths=lengths,
        groups=batch.groups,
        on_policy=batch.on_policy,
        entropy=torch.tensor(entropy, dtype=torch.float64),
        num_tokens=torch.tensor(num_tokens),
        mismatch=torch.cat(mismatch),
    )
    return scores, lse


def gather_scores(scores: Scores, rank: int) -> tuple[Scores, int]:
    """All ranks' scores, and where this rank's begin. A few numbers a completion: groups and their
    statistics are whole again, and every rank finds the same coefficients."""
    shares: list[Scores] = gather_object([scores])

    def joined(name: str) -> Tensor:
        parts = [getattr(share, name) for share in shares]
        return torch.cat(parts) if parts[0].dim() else torch.stack(parts).sum()

    first = sum(len(share.rewards) for share in shares[:rank])
    return Scores(**{name: joined(name) for name in vars(scores)}), first
