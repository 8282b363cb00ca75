"""Per-token log-probabilities from logits the caller already holds."""

import torch
from torch import Tensor

import agro_kernels.ops  # noqa: F401  (registers the ops)
from agro_kernels.head import IGNORE_INDEX, check_logits, split_temperature
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
