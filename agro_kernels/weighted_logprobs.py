"""sum_t c_t * logprob_t for coefficients known in advance: gradients without a second head pass."""

import torch
from torch import Tensor

import agro_kernels.library  # noqa: F401  (registers the ops)
from agro_kernels.checks import check_constant, check_head, check_head_options
from agro_kernels.linear_logprobs import (
    IGNORE_INDEX,
    cast_for_autocast,
    kept_bits,
    split_temperature,
)
from agro_kernels.reference import ROUNDED_LOGITS
from agro_kernels.weight_grad import AccumulatingLogprobs, refuse_under_compile


def weighted_logprob_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    *,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    round_logits: str | None = None,
    kept_ids: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of coefficients times log-probabilities, the gradients made on the way.

    Same result as

        (coefficients * linear_logprobs(hidden, weight, targets, ...)).sum()

    When the coefficients do not depend on this pass, the gradient of each tile of logits is known
    as soon as the tile is: the head costs 3 matrix products of 2 N D V operations with lse and 4
    without it, and the backward pass only scales what is already there.

    Args:
        hidden, weight, targets, bias, temperature, softcap, ignore_index: as linear_logprobs.
        coefficients: (...) one number a token, a constant. Rows with coefficient 0 are left out,
            whatever they hold. For a loss to be minimised, negative raises the probability.
        lse: (...) from linear_logprobs_with_stats on the same hidden, weight and options. Rounding
            differences in hidden since then shift the result by as much as they shift lse; a weight
            that has been updated since then makes it wrong.
        round_logits, kept_ids: as linear_logprobs.
        weight_grad: (V, D) as linear_logprobs. The products then wait for the backward pass, which
            adds to it; their number is the same.

    Returns:
        0-d fp32 (float64 for float64). 0.0, with zero gradients, of no tokens.

    The gradients wait for the backward pass in the dtypes of their tensors. In fp16, multiply the
    coefficients by the loss scale, not the result: gradients that underflowed cannot be scaled.
    """
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    check_head(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    check_head_options(targets, weight, round_logits, kept_ids, weight_grad)
    check_constant("coefficients", coefficients, targets)
    if lse is not None:
        check_constant("lse", lse, targets)
    sums_dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    coefficients = coefficients.reshape(-1).to(sums_dtype)
    lse = None if lse is None else lse.reshape(-1).to(sums_dtype)
    options = (
        bias,
        *split_temperature(temperature),
        softcap or 0.0,
        ignore_index,
        None if round_logits is None else ROUNDED_LOGITS[round_logits],
        kept_bits(kept_ids, weight),
    )
    if weight_grad is not None:
        refuse_under_compile()
        targets = targets.where(coefficients != 0, ignore_index)
        logprobs, _, _ = AccumulatingLogprobs.apply(
            weight_grad, hidden, weight, targets, *options, False, lse
        )
        total: Tensor = (coefficients * logprobs).where(targets != ignore_index, 0.0).sum()
        return total
    differentiable = torch.is_grad_enabled()
    results: tuple[Tensor, ...] = torch.ops.agro.weighted_logprob_sum_fwd(
        hidden,
        weight,
        targets,
        coefficients,
        lse,
        *options,
        [
            differentiable and hidden.requires_grad,
            differentiable and weight.requires_grad,
            differentiable and bias is not None and bias.requires_grad,
        ],
    )
    return results[0]
