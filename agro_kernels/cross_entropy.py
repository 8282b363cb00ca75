"""F.cross_entropy straight from hidden states, label smoothing included."""

from typing import Unpack

import torch
from torch import Tensor

from agro_kernels.arguments import as_number, checked_keep_logits_bytes
from agro_kernels.head import Head, HeadOptions, check_names
from agro_kernels.linear_logprobs import flat_results
from agro_kernels.ops.derivatives import refuse_forward_mode

REDUCTIONS = ("mean", "sum", "none")
NOT_SMOOTHED = {
    "weight_grad": "its gradient goes to weight.grad",
    "kept_ids": "the smoothed share is that of the whole vocabulary",
    "shards": "gather the weight's rows",
}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    **options: Unpack[HeadOptions],
) -> Tensor:
    """The cross-entropy of each token, without storing the (N, V) logits.

    Same result as

        F.cross_entropy((hidden @ weight.T + bias).float(), targets, ignore_index=ignore_index,
                        label_smoothing=label_smoothing, reduction=reduction)

    With e = label_smoothing a token's loss is -(1 - e) logprob - e (the mean of all V logprobs).
    The mean costs little beside the forward pass: one look at the weight, or, with a softcap or
    round_logits, another pass of the blocked torch path. The backward pass costs what it does
    without, and its gradient of each logit is the sum of both terms before it is rounded.

    Args:
        hidden, weight, targets: as linear_logprobs, one target a token.
        label_smoothing: from 0 to 1, without 1.
        reduction: "mean" over the targets that are not ignore_index, "sum", or "none".
        options: as linear_logprobs; with smoothing not weight_grad, kept_ids and shards.

    Returns:
        0-d fp32 (float64 for float64), nats; with "none" (...), 0.0 where ignored. The mean of no
        targets is 0.0, where torch's is NaN.
    """
    check_names("linear_cross_entropy", options)
    number = as_number(label_smoothing)
    if number is None or not 0.0 <= number < 1.0:
        raise ValueError(
            f"label_smoothing: expected a number from 0 to below 1, got {label_smoothing!r}; 0.0 "
            "is none"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(
            f'reduction: expected "mean", "sum" or "none", got {reduction!r}; "none" gives one '
            "number a token"
        )
    for name, why in NOT_SMOOTHED.items():
        if number > 0.0 and options.get(name) is not None:
            raise ValueError(
                f"{name}: expected None with label_smoothing, got a value; {why} where labels are "
                "smoothed"
            )
    head = Head.of(hidden, weight, targets, **options)
    losses = _losses(head, options, number).view(targets.shape)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / head.counted().sum().clamp(min=1)


def _losses(head: Head, options: HeadOptions, label_smoothing: float) -> Tensor:
    """(N,), 0 where ignored."""
    if label_smoothing == 0.0:
        return -flat_results(head, options)[0]
    refuse_forward_mode(
        "linear_cross_entropy", hidden=head.hidden, weight=head.weight, bias=head.bias
    )
    keep = 0
    if torch.is_grad_enabled() and head.requires_grad():
        keep = checked_keep_logits_bytes(options.get("keep_logits_bytes", 0))
    logprobs, mean_logprobs, *_ = torch.ops.agro.smoothed_logprobs_fwd(*head, keep)
    losses: Tensor = (label_smoothing - 1.0) * logprobs - label_smoothing * mean_logprobs
    return losses
