"""sum_t c_t * logprob_t for coefficients known in advance: no head pass but the gradients' own."""

from typing import Unpack

import torch
from torch import Tensor

from agro_kernels.arguments import check_constant
from agro_kernels.head import Head, HeadOptions, check_names
from agro_kernels.linear_logprobs import flat_results


def weighted_logprob_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    *,
    lse: Tensor | None = None,
    **options: Unpack[HeadOptions],
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
        compact: as linear_logprobs. False where few coefficients are 0: their rows are then in the
            products, too.
        weight_grad, shards: as linear_logprobs.
        keep_logits_bytes: as linear_logprobs. With lse nothing is kept: no pass makes logits before
            the backward pass does.

    Returns:
        0-d fp32 (float64 for float64). 0.0, with zero gradients, of no tokens.
    """
    check_names("weighted_logprob_sum", options)
    head = Head.of(hidden, weight, targets, **options)
    check_constant("coefficients", coefficients, targets)
    if lse is not None:
        check_constant("lse", lse, targets)
    sums_dtype = torch.promote_types(head.hidden.dtype, torch.float32)
    coefficients = coefficients.reshape(-1).to(sums_dtype)
    counted = (coefficients != 0) & head.counted()
    head = head._replace(targets=head.targets.where(counted, head.ignore_index))
    lse = None if lse is None else lse.reshape(-1).to(sums_dtype)
    logprobs, _, _ = flat_results(head, options, lse=lse)
    # The coefficient of a row that does not count may be anything, even NaN: hence `where`.
    return (coefficients.where(counted, 0.0) * logprobs).sum()
