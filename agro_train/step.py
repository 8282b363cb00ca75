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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from agro_kernels import AgroStats, agro_coefficients, policy_gradient_coefficients
from agro_train.batch import pack
from agro_train.config import TrainConfig
from agro_train.model import head_gradient
from agro_train.types import MicroBatch, Rollout, StepStats, TrainBatch

# What a rank without a micro-batch of its own reads to keep step with the others: token 0 after
# token 0. Its result is not used.
FILLER = pack(
    [Rollout("", "", (0,), "", (0,), finish="length", reward=None)],
    token_budget=1,
    share_prompts=False,
)[0]


@dataclass(frozen=True)
class Scores:
    """What the passes without gradients leave behind, of one rank or of all, one after another."""

    rewards: Tensor  # (B,) float64
    logprobs: Tensor  # (B,) float64: sums over each completion's tokens, under the policy
    ref_logprobs: Tensor  # (B,) float64: the same under the reference
    groups: Tensor  # (B,) int64
    on_policy: Tensor  # (B,) bool
    entropy: Tensor  # 0-d float64, nats: sum over tokens
    num_tokens: Tensor  # 0-d int64
    # (tokens,) float64, nats: how far the policy's log-probability of each token is from that of
    # the engine that sampled it, where the engine told
    mismatch: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))


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
        piece = to_device(piece, accelerator.device)
        per_token = mine.to(piece_lse.device, piece_lse.dtype)[token_rows(piece)]
        if number > len(batch.micro):  # an extra one, to keep step with the other ranks
            per_token = torch.zeros_like(per_token)
        with accelerator.no_sync(policy) if number < len(micro) else nullcontext():
            accelerator.backward(policy(piece, config.temperature, per_token, piece_lse, head_grad))
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
    entropy, num_tokens, lse = 0.0, 0, []
    mismatch = [torch.zeros(0, dtype=torch.float64)]
    with torch.no_grad():
        for number, piece in enumerate(micro, start=1):
            piece = to_device(piece, device)
            ours = policy(piece, config.temperature)
            lse.append(ours.lse)
            if number > len(batch.micro):
                continue
            logprobs += row_sums(ours.logprobs, token_rows(piece), len(logprobs))
            entropy += float(ours.entropy.double().sum())
            num_tokens += len(piece.targets)
            apart = (ours.logprobs - piece.sampling_logprobs).abs().double().cpu()
            mismatch.append(apart[piece.sampling_logprobs.cpu().isfinite()])
    unknown = tuple(piece for piece in batch.micro if batch.ref_logprobs[piece.rows].isnan().any())
    asked = sequence_logprobs(reference, unknown, len(logprobs), config, device)
    ref_logprobs = torch.where(batch.ref_logprobs.isnan(), asked, batch.ref_logprobs)
    scores = Scores(
        rewards=batch.rewards,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        groups=batch.groups,
        on_policy=batch.on_policy,
        entropy=torch.tensor(entropy, dtype=torch.float64),
        num_tokens=torch.tensor(num_tokens),
        mismatch=torch.cat(mismatch),
    )
    return scores, lse


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
        for number, piece in enumerate(even_out(micro), start=1):
            piece = to_device(piece, device)
            logprobs = model(piece, config.temperature).logprobs
            if number <= len(micro):
                sums += row_sums(logprobs, token_rows(piece), count)
    return sums


def even_out(micro: tuple[MicroBatch, ...]) -> tuple[MicroBatch, ...]:
    """The same number on every rank, by repeating the last one: a rank that calls the sharded model
    less often than the others would leave them waiting for ever."""
    most: int = max(gather_object([len(micro)]))
    return micro + (micro or (FILLER,))[-1:] * (most - len(micro))


def gather_scores(scores: Scores, rank: int) -> tuple[Scores, int]:
    """All ranks' scores, and where this rank's begin. A few numbers a completion: groups and their
    statistics are whole again, and every rank finds the same coefficients."""
    shares: list[Scores] = gather_object([scores])

    def joined(name: str) -> Tensor:
        parts = [getattr(share, name) for share in shares]
        return torch.cat(parts) if parts[0].dim() else torch.stack(parts).sum()

    first = sum(len(share.rewards) for share in shares[:rank])
    return Scores(**{name: joined(name) for name in vars(scores)}), first


def coefficients(scores: Scores, config: TrainConfig) -> tuple[Tensor, AgroStats]:
    """(B,) coefficients of the configured algorithm and AGRO's statistics of the batch.

    All algorithms come at policy gradient's scale: AGRO's loss is divided by beta, so that its
    pathwise term equals the policy gradient and learning rates and clipping compare.
    """
    data = (scores.rewards, scores.logprobs, scores.ref_logprobs, scores.groups)
    agro = agro_coefficients(
        *data,
        beta=config.beta,
        lr_weight=config.lr_weight,
        lr_cap=config.lr_cap,
        lr_baseline=config.variance_baseline(),
        on_policy=scores.on_policy,
        scale=1.0 / config.beta,
    )
    if config.algorithm == "agro":
        return agro.coefficients, agro.stats
    form = config.algorithm.removeprefix("pg_")
    return policy_gradient_coefficients(*data, beta=config.beta, form=form), agro.stats


def coefficient_sizes(scores: Scores, config: TrainConfig) -> dict[str, float]:
    """Sizes of AGRO's two parts, at the scale of `coefficients`: the mean over groups of the sum of
    |coefficient| over a group's completions, and the share of groups in which the likelihood-ratio
    part, as weighted and capped, is the larger one.
    """
    both, stats = coefficients(scores, replace(config, algorithm="agro"))
    plain = replace(config, algorithm="agro", lr_weight=0.0, lr_cap=False)
    pathwise, _ = coefficients(scores, plain)
    groups = scores.groups.unique(return_inverse=True)[1]
    paths, ratios = (
        torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, part.double())
        for part in (pathwise.abs(), (both - pathwise).abs())
    )
    num_groups = max(1, int(stats.num_groups))
    return {
        "agro/coef_pathwise_abs": float(paths.sum()),
        "agro/coef_lr_abs": float(ratios.sum()),
        "agro/frac_groups_lr_dominates": int((ratios > paths).sum()) / num_groups,
    }


def frac_reward_zero_std(scores: Scores) -> float:
    """Share of groups whose rewards are all equal. They still learn: towards the reference."""
    groups = scores.groups.unique(return_inverse=True)[1]
    count = int(groups.max()) + 1
    highest, lowest = torch.full((2, count), math.nan, dtype=torch.float64)
    finite = scores.rewards.isfinite()
    index, values = groups[finite], scores.rewards[finite]
    highest = highest.scatter_reduce(0, index, values, "amax", include_self=False)
    lowest = lowest.scatter_reduce(0, index, values, "amin", include_self=False)
    return float((highest == lowest).double().mean())


def measure(
    scores: Scores, stats: AgroStats, config: TrainConfig, grad_norm: float, skipped: bool
) -> dict[str, float]:
    """Columns of metrics.jsonl that the update knows."""
    log_ratio = scores.logprobs - scores.ref_logprobs
    mismatch = {}
    if len(scores.mismatch):
        mismatch["sampling/sampling_logp_difference/mean"] = float(scores.mismatch.mean())
        mismatch["sampling/sampling_logp_difference/max"] = float(scores.mismatch.max())
    return {
        "loss": float(stats.variance) / (2 * config.beta),
        "grad_norm": grad_norm,
        # Mean log(policy / reference), nats a completion: the KL where the policy did the sampling.
        # No exp(-l) - 1 + l: one token that the policy has all but given up would dwarf the rest.
        "kl": float(stats.log_ratio),
        "kl_per_token": float(log_ratio.sum()) / int(scores.num_tokens),
        "entropy": float(scores.entropy) / int(scores.num_tokens),
        "agro/regularised_reward": float(stats.reward) - config.beta * float(stats.log_ratio),
        "agro/variance": float(stats.variance),
        "agro/kl_to_optimum": float(stats.kl_to_optimum),
        "agro/lr_dominance": float(stats.lr_dominance),
        "agro/logratio_abs_max": float(log_ratio.abs().max()),
        **coefficient_sizes(scores, config),
        "frac_reward_zero_std": frac_reward_zero_std(scores),
        "groups": float(stats.num_groups),
        "short_groups": float(stats.num_short_groups),
        "dropped": float(stats.num_dropped),
        "skipped": float(skipped),
        **mismatch,
    }


def token_rows(micro: MicroBatch) -> Tensor:
    """(n,) the row in the batch of each predicted token's completion."""
    return micro.rows.repeat_interleave(micro.cu_seqlens.diff())


def row_sums(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count,) float64 sums of per-token values over each completion, on the CPU."""
    sums = torch.zeros(count, dtype=torch.float64)
    return sums.index_add_(0, rows.cpu(), values.double().cpu())


def to_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    return replace(micro, **{name: value.to(device) for name, value in vars(micro).items()})
