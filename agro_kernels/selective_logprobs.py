"""Per-token log-probabilities from logits the caller already holds."""

import torch
from torch import Tensor

import agro_kernels.ops  # noqa: F401  (registers the ops)
from agro_kernels.arguments import check_logits, checked_softcap
from agro_kernels.head import IGNORE_INDEX, split_temperature
from agro_kernels.linear_logprobs import LogprobStats
from agro_kernels.ops.derivatives import refuse_forward_mode


def selective_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Log-probability of each target token under softmax(logits / temperature).

    Same result as

        logprobs_all = (logits.float() / temperature).log_softmax(-1)
        logprobs_all.gather(-1, targets[..., None]).squeeze(-1)

    without an fp32 copy of all logits: rows are upcast a few at a time. Whoever still has the
    hidden states should call linear_logprobs instead: logits in bf16 are already rounded.

    Args:
        logits: (..., V) bf16, fp16, fp32 or float64; a view such as logits[:, :-1] is not copied.
        targets: (...) int32 or int64 in [0, V), or ignore_index. Any other value is a ValueError on
            the CPU; on a GPU its logprob is NaN.
        temperature: float, or a tensor of the shape of targets; > 0. No gradient flows to it.
        ignore_index: targets that do not count.

    Returns:
        logprobs: (...) fp32 (float64 for float64), nats. Exactly 0.0, with exactly zero gradient,
        where targets == ignore_index, whatever the row holds. Differentiable in logits, once.
    """
    temperature, ignore_index = check_logits(logits, targets, temperature, ignore_index)
    refuse_forward_mode("selective_logprobs", logits=logits)
    results: tuple[Tensor, Tensor] = torch.ops.agro.selective_logprobs_fwd(
        logits, targets, *split_temperature(temperature), ignore_index
    )
    return results[0]


def selective_logprobs_with_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> LogprobStats:
    """`selective_logprobs` with the entropy and the lse of each distribution, all differentiable.

    In plain torch on every device, a few rows upcast at a time.

    Args: as `selective_logprobs`, and
        softcap: cap of the logits before the temperature, where the model has not applied its own.

    Returns:
        logprobs, entropy and lse, (...) each, fp32 (float64 for float64), nats; 0.0 where ignored.
        A z-loss is `lse.square()`, an entropy bonus `-entropy`.
    """
    temperature, ignore_index = check_logits(logits, targets, temperature, ignore_index)
    cap = checked_softcap(softcap)
    refuse_forward_mode("selective_logprobs_with_stats", logits=logits)
    logprobs, lse, entropy = torch.ops.agro.selective_stats_fwd(
        logits, targets, *split_temperature(temperature), cap, ignore_index
    )
    return LogprobStats(logprobs, entropy, lse)
