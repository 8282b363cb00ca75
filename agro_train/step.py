"""One policy update: two passes without gradients, one coefficient a completion, one pass with.

1. Score: log-probabilities of every completion under the policy as it is now and the reference.
2. Coefficients over whole groups (`agro_coefficients`): from here on a completion's share of the
   gradient is a number that depends on nothing else.
3. Update: sum_t c * logprob_t, micro-batch by micro-batch, through `weighted_logprob_sum`. How
   groups were cut into micro-batches no longer matters.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from agro_kernels import AgroStats, agro_coefficients, policy_gradient_coefficients
from agro_train.config import TrainConfig
from agro_train.types import MicroBatch, StepStats, TrainBatch


@dataclass(frozen=True)
class Scores:
    """What the passes without gradients leave behind."""

    logprobs: Tensor  # (B,) float64: sums over each completion's tokens, under the policy
    ref_logprobs: Tensor  # (B,) float64: the same under the reference
    lse: tuple[Tensor, ...]  # per micro-batch (n,) fp32: saves the update a product with the head
    entropy: float  # nats, mean over tokens
    kl: float  # nats per completion: sum over tokens of exp(-l) - 1 + l, l = the log-ratio
    num_tokens: int


def score_batch(
    policy: nn.Module,
    reference: nn.Module,
    batch: TrainBatch,
    temperature: float,
    device: torch.device,
) -> Scores:
    """Log-probabilities under policy and reference, by the same kernels and the same packing, so
    that equal weights give a log-ratio of exactly zero.
    """
    logprobs = torch.zeros(len(batch.rewards), dtype=torch.float64)
    ref_logprobs = torch.zeros_like(logprobs)
    lse, entropy, kl, num_tokens = [], 0.0, 0.0, 0
    with torch.no_grad():
        for micro in batch.micro:
            micro = to_device(micro, device)
            ours = policy(micro, temperature)
            theirs = reference(micro, temperature).logprobs
            rows = token_rows(micro)
            logprobs += row_sums(ours.logprobs, rows, len(logprobs))
            ref_logprobs += row_sums(theirs, rows, len(logprobs))
            ratio = (ours.logprobs - theirs).double()
            kl += float((torch.expm1(-ratio) + ratio).sum())
            entropy += float(ours.entropy.double().sum())
            num_tokens += len(micro.targets)
            lse.append(ours.lse)
    return Scores(
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        lse=tuple(lse),
        entropy=entropy / num_tokens,
        kl=kl / len(logprobs),
        num_tokens=num_tokens,
    )


def coefficients(
    batch: TrainBatch, scores: Scores, config: TrainConfig
) -> tuple[Tensor, AgroStats]:
    """(B,) coefficients of the configured algorithm and AGRO's statistics of the batch.

    All algorithms come at policy gradient's scale: AGRO's loss is divided by beta, so that its
    pathwise term equals the policy gradient and learning rates and clipping compare.
    """
    data = (batch.rewards, scores.logprobs, scores.ref_logprobs, batch.groups)
    agro = agro_coefficients(
        *data,
        beta=config.beta,
        lr_weight=config.lr_weight,
        lr_cap=config.lr_cap,
        lr_baseline=config.variance_baseline(),
        on_policy=batch.on_policy,
        scale=1.0 / config.beta,
    )
    if config.algorithm == "agro":
        return agro.coefficients, agro.stats
    form = config.algorithm.removeprefix("pg_")
    return policy_gradient_coefficients(*data, beta=config.beta, form=form), agro.stats


def update(
    policy: nn.Module,
    reference: nn.Module,
    batch: TrainBatch,
    config: TrainConfig,
    accelerator: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> StepStats:
    """One optimiser step. A gradient that is not finite leaves the weights as they were."""
    device = accelerator.device
    # Gradient checkpointing works in training mode only; there is no dropout to switch on.
    policy.train(config.gradient_checkpointing)
    scores = score_batch(policy, reference, batch, config.temperature, device)
    weights, stats = coefficients(batch, scores, config)
    for micro, lse in zip(batch.micro, scores.lse, strict=True):
        micro = to_device(micro, device)
        per_token = weights.to(device, lse.dtype)[token_rows(micro)]
        loss = policy(micro, config.temperature, per_token, lse)
        accelerator.backward(loss)
    grad_norm = accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    skipped = not bool(torch.isfinite(torch.as_tensor(grad_norm)))
    if not skipped:
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    policy.eval()
    return StepStats(
        skipped=skipped, metrics=_metrics(batch, scores, stats, config, grad_norm, skipped)
    )


def _metrics(
    batch: TrainBatch,
    scores: Scores,
    stats: AgroStats,
    config: TrainConfig,
    grad_norm: Any,
    skipped: bool,
) -> dict[str, float]:
    """Columns of metrics.jsonl that the update knows."""
    return {
        "loss": float(stats.variance) / (2 * config.beta),
        "grad_norm": float(grad_norm),
        "kl": scores.kl,
        "log_ratio": float(stats.log_ratio),
        "entropy": scores.entropy,
        "agro/variance": float(stats.variance),
        "agro/kl_to_optimum": float(stats.kl_to_optimum),
        "agro/lr_dominance": float(stats.lr_dominance),
        "groups": float(stats.num_groups),
        "short_groups": float(stats.num_short_groups),
        "dropped": float(stats.num_dropped),
        "skipped": float(skipped),
        "micro_batches": float(len(batch.micro)),
        "trained_tokens": float(scores.num_tokens),
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
