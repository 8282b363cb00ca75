"""Per-token log-probabilities straight from hidden states, without storing the (N, V) logits.

From here: `reference.py` says what is computed, `library.py` says who computes it on which device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import agro_kernels.ops  # noqa: F401  (registers the ops)
from agro_kernels.head import check_head, check_head_options
from agro_kernels.ops.weight_grad import AccumulatingLogprobs, refuse_under_compile
from agro_kernels.reference import ROUNDED_LOGITS

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
    round_logits: str | None = None,
    kept_ids: Tensor | None = None,
    weight_grad: Tensor | None = None,
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
        bias: (V,) added to the logits, same dtype as hidden. -inf bans a token (with a softcap it
            makes its logit -softcap).
        temperature: float, or a tensor of the shape of targets; > 0. It must be the sampler's,
            otherwise the log-ratio to the sampling policy is biased. No gradient flows to it.
        softcap: cap of the logits before the temperature (Gemma 2's final_logit_softcapping).
        ignore_index: targets that do not count; a row is never read where targets say so.
        round_logits: "bf16" or "fp16" rounds hidden @ weight.T + bias to that dtype, before softcap
            and temperature: the log-probs of an inference engine that keeps its logits in it. The
            gradient goes straight through. None, the default, never rounds.
        kept_ids: (..., K) int32 or int64, the ids that a top-k or top-p sampler kept for each
            token; -1 is padding. The distribution is renormalised over them. A row of padding keeps
            all; a target outside its set has logprob -inf. Costs V / 8 bytes a token.
        weight_grad: (V, D) fp32 (float64 of float64). The weight's gradient is added to it in the
            backward pass, the sum never rounded below fp32, and weight.grad is left alone:
            Megatron's main_grad. (Of bf16 and fp16 inputs the gradient of each logit is rounded to
            their dtype before the products.) Not inside torch.compile.

    Returns:
        logprobs: (...) fp32 (float64 for float64), nats. Exactly 0.0, with exactly zero gradient,
        where targets == ignore_index; -inf where the target is banned.

    Gradients flow to hidden, weight and bias, once (no second derivative); what does not require a
    gradient costs nothing in the backward pass. All sums over D and V are accumulated in fp32.
    """
    logprobs, _, _ = _apply(
        hidden,
        weight,
        targets,
        bias,
        temperature,
        softcap,
        ignore_index,
        round_logits,
        kept_ids,
        weight_grad,
        with_entropy=False,
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
    round_logits: str | None = None,
    kept_ids: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> LogprobsWithEntropy:
    """`linear_logprobs` and the entropy -sum_v p_v log p_v of each distribution, from one pass.

    Args: as linear_logprobs. Both results are differentiable; ignored rows have entropy 0.0.
    """
    logprobs, _, entropy = _apply(
        hidden,
        weight,
        targets,
        bias,
        temperature,
        softcap,
        ignore_index,
        round_logits,
        kept_ids,
        weight_grad,
        with_entropy=True,
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
    round_logits: str | None = None,
    kept_ids: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> LogprobStats:
    """`linear_logprobs` with entropy and lse, for callers that keep lse for `weighted_logprob_sum`.

    Args: as linear_logprobs. All results are differentiable; lse is the logsumexp over the
    vocabulary of the final logits (capped, divided by the temperature); ignored rows have 0.0.
    """
    logprobs, lse, entropy = _apply(
        hidden,
        weight,
        targets,
        bias,
        temperature,
        softcap,
        ignore_index,
        round_logits,
        kept_ids,
        weight_grad,
        with_entropy=True,
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
    round_logits: str | None,
    kept_ids: Tensor | None,
    weight_grad: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), the first two in the shape of targets, entropy too if asked for."""
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    check_head(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    check_head_options(targets, weight, round_logits, kept_ids, weight_grad)
    arguments = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        bias,
        *split_temperature(temperature),
        softcap or 0.0,
        ignore_index,
        None if round_logits is None else ROUNDED_LOGITS[round_logits],
        kept_bits(kept_ids, weight),
        with_entropy,
    )
    if weight_grad is None:
        logprobs, lse, entropy = torch.ops.agro.linear_logprobs_fwd(*arguments)
    else:
        refuse_under_compile()
        logprobs, lse, entropy = AccumulatingLogprobs.apply(weight_grad, *arguments, None)
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


def kept_bits(kept_ids: Tensor | None, weight: Tensor) -> Tensor | None:
    """(..., K) ids -> (N, ceil(V / 32)) bits, as the ops take them."""
    if kept_ids is None:
        return None
    ids = kept_ids.reshape(-1, kept_ids.shape[-1])
    bits: Tensor = torch.ops.agro.pack_kept_ids(ids, weight.shape[0])
    return bits
