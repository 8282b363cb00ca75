"""sum_t c_t * logprob_t for coefficients known in advance: no head pass but the gradients' own."""

import torch
from torch import Tensor

import agro_kernels.ops  # noqa: F401  (registers the ops)
from agro_kernels.head import check_constant, check_head, check_head_options
from agro_kernels.linear_logprobs import (
    IGNORE_INDEX,
    cast_for_autocast,
    kept_bits,
    split_temperature,
)
from agro_kernels.ops.weight_grad import AccumulatingLogprobs, refuse_under_compile
from agro_kernels.reference import ROUNDED_LOGITS


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
    """Sum over tokens of coefficients times log-probabilities: 3 matrix products with lse, else 4.

    Same result as

        (coefficients * linear_logprobs(hidden, weight, targets, ...)).sum()

    Coefficients that are known come from an earlier pass, and so can lse: then the forward pass
    needs each token's target logit alone, 2 N D operations, and the backward pass makes the logits
    once again and the gradients from them, 3 products of 2 N D V. Nothing of the size of weight
    waits between the two.

    Args:
        hidden, weight, targets, bias, temperature, softcap, ignore_index: as linear_logprobs.
        coefficients: (...) one number a token, a constant. Rows with coefficient 0 are left out,
            whatever they hold. For a loss to be minimised, negative raises the probability.
        lse: (...) from linear_logprobs_with_stats on the same hidden, weight and options. Rounding
            differences in hidden since then shift the result by as much as they shift lse; a weight
            that has been updated since then makes it wrong. (The target's logit is summed in
            another order than in the pass for lse: with round_logits one in some 10^5 comes out as
            the neighbouring number of that dtype.)
        round_logits, kept_ids: as linear_logprobs.
        weight_grad: (V, D) as linear_logprobs.

    Returns:
        0-d fp32 (float64 for float64). 0.0, with zero gradients, of no tokens.
    """
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    check_head(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    check_head_options(targets, weight, round_logits, kept_ids, weight_grad)
    check_constant("coefficients", coefficients, targets)
    if lse is not None:
        check_constant("lse", lse, targets)
    sums_dtype = torch.promote_types(hidden.dtype, torch.float32)
    coefficients = coefficients.reshape(-1).to(sums_dtype)
    counted = (coefficients != 0) & (targets.reshape(-1) != ignore_index)
    arguments = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1).where(counted, ignore_index),
        bias,
        *split_temperature(temperature),
        softcap or 0.0,
        ignore_index,
        None if round_logits is None else ROUNDED_LOGITS[round_logits],
        kept_bits(kept_ids, weight),
    )
    lse = None if lse is None else lse.reshape(-1).to(sums_dtype)
    if weight_grad is not None:
        refuse_under_compile()
        logprobs, _, _ = AccumulatingLogprobs.apply(weight_grad, *arguments, False, lse)
    elif lse is None:
        logprobs, _, _ = torch.ops.agro.linear_logprobs_fwd(*arguments, False)
    else:
        logprobs = torch.ops.agro.target_logprobs(*arguments, lse)
    # Where a row does not count its coefficient may be anything, NaN too.
    total: Tensor = (coefficients.where(counted, 0.0) * logprobs).sum()
    return total
