"""Per-token log-probabilities straight from hidden states, without storing the (N, V) logits.

From here: `reference.py` says what is computed, `library.py` says who computes it on which device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import agro_kernels.library  # noqa: F401  (registers the ops)
from agro_kernels.checks import check_head

IGNORE_INDEX = -100


class LogprobsWithEntropy(NamedTuple):
    """Both (...) fp32, nats."""

    logprobs: Tensor
    entropy: Tensor


class LogprobStats(NamedTuple):
    """All (...) fp32, nats."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Log-probability of each target token under softmax(hidden @ weight.T / temperature).

    Same result as

        logits = (hidden @ weight.T + bias).float()
        logits = softcap * torch.tanh(logits / softcap)      # if softcap
        logprobs_all = (logits / temperature).log_softmax(-1)
        logprobs_all.gather(-1, targets[..., None]).squeeze(-1)

    with the logits kept in fp32 throughout, never rounded, and never stored as a whole.

    Args:
        hidden: (..., D) bf16, fp16, fp32 or float64. hidden[i] must be the state that predicts
            targets[i]: the shift by one position is the caller's.
        weight: (V, D) lm_head weight, same dtype and device as hidden. Under torch.autocast both
            are cast to its dtype, as by F.linear.
        targets: (...) int32 or int64 in [0, V), or ignore_index. Any other value is a ValueError on
            the CPU; on a GPU, where looking would stall the device, its logprob is NaN.
        bias: (V,) added to the logits, same dtype as hidden. -inf bans a token.
        temperature: float, or a tensor of the shape of targets; > 0. It must be the sampler's,
            otherwise the log-ratio to the sampling policy is biased. No gradient flows to it.
        softcap: cap of the logits before the temperature (Gemma 2's final_logit_softcapping).
        ignore_index: targets that do not count; a row is never read where targets say so.

    Returns:
        logprobs: (...) fp32 (float64 for float64), nats. Exactly 0.0, with exactly zero gradient,
        where targets == ignore_index; -inf where the target is banned.

    Gradients flow to hidden, weight and bias, once (no second derivative); what does not require a
    gradient costs nothing in the backward pass. All sums over D and V are accumulated in fp32.
    """
    logprobs, _, _ = _apply(
        hidden, weight, targets, bias, temperature, softcap, ignore_index, with_entropy=False
    )
    return logprobs


def linear_logprobs_with_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> LogprobsWithEntropy:
    """`linear_logprobs` and the entropy -sum_v p_v log p_v of each distribution, from one pass.

    Args: as linear_logprobs. Both results are differentiable; ignored rows have entropy 0.0.
    """
    logprobs, _, entropy = _apply(
        hidden, weight, targets, bias, temperature, softcap, ignore_index, with_entropy=True
    )
    return LogprobsWithEntropy(logprobs, entropy)


def linear_logprobs_with_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> LogprobStats:
    """`linear_logprobs` with entropy and lse, for callers that keep lse for `weighted_logprob_sum`.

    Args: as linear_logprobs. All results are differentiable; lse is the logsumexp over the
    vocabulary of the final logits (capped, divided by the temperature); ignored rows have 0.0.
    """
    logprobs, lse, entropy = _apply(
        hidden, weight, targets, bias, temperature, softcap, ignore_index, with_entropy=True
    )
    return LogprobStats(logprobs, entropy, lse)


def _apply(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), the first two in the shape of targets, entropy too if asked for."""
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    check_head(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    logprobs, lse, entropy = torch.ops.agro.linear_logprobs_fwd(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        bias,
        *split_temperature(temperature),
        softcap or 0.0,
        ignore_index,
        with_entropy,
    )
    shape = targets.shape
    return logprobs.view(shape), lse.view(shape), entropy.view(shape) if with_entropy else entropy


def cast_for_autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What F.linear does under torch.autocast: all to its dtype, except float64."""
    if not isinstance(hidden, Tensor) or not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)

    def cast(tensor: Tensor) -> Tensor:
        castable = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return tensor.to(dtype) if castable and tensor.dtype != torch.float64 else tensor

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


def split_temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """The ops take a number and, apart from it, one temperature a token (N,) fp32."""
    if isinstance(temperature, Tensor):
        return 1.0, temperature.reshape(-1).float()
    return float(temperature), None
