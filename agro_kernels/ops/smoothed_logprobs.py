"""The target's log-probability and the mean of all: schema, shapes, gradients.

The passes are those of `linear_logprobs`. The mean of the logits is made beside the forward pass;
of its gradient each logit has an equal share, which the backward pass adds before it rounds.
"""

from typing import Any

import torch
from torch import Tensor

from agro_kernels._torch import linear_logprobs as torch_linear_logprobs
from agro_kernels.head import HEAD_SCHEMA, Head
from agro_kernels.ops.derivatives import differentiable_once
from agro_kernels.ops.dispatch import library, serve_everywhere
from agro_kernels.ops.linear_logprobs import input_gradients, save_head, saved_head

library.define(
    f"smoothed_logprobs_fwd({HEAD_SCHEMA}, int keep_logits_bytes=0) -> "
    "(Tensor logprobs, Tensor mean_logprobs, Tensor lse, Tensor kept_logits, Tensor kept_maxima)"
)


def _smoothed_logprobs_fwd(head: Head, keep_logits_bytes: int = 0) -> tuple[Tensor, ...]:
    """logprobs, the mean over the vocabulary of all log-probabilities, lse, (N,); what was kept."""
    logprobs, lse, _, *kept = torch.ops.agro.linear_logprobs_fwd(*head, False, keep_logits_bytes)
    mean_logprobs = torch_linear_logprobs.mean_logits(head.with_numbers()) - lse
    return logprobs, mean_logprobs, lse, *kept


def _smoothed_logprobs_fwd_fake(head: Head, keep_logits_bytes: int = 0) -> tuple[Tensor, ...]:
    logprobs, lse, _, *kept = torch.ops.agro.linear_logprobs_fwd(*head, False, keep_logits_bytes)
    return logprobs, torch.empty_like(lse), lse, *kept


serve_everywhere("smoothed_logprobs_fwd", _smoothed_logprobs_fwd, _smoothed_logprobs_fwd_fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *head, keep_logits_bytes = inputs
    _, _, lse, *kept = output
    ctx.mark_non_differentiable(lse, *kept)
    if keep_logits_bytes == 0:
        kept = []
    save_head(ctx, Head(*head), lse, lse.new_empty(0), False, *kept)


@differentiable_once("linear_cross_entropy")
def _backward(
    ctx: Any, dlogprobs: Tensor | None, dmean: Tensor | None, *of_others: Tensor | None
) -> tuple[Tensor | None, ...]:
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    asked = [need_hidden, need_weight, need_bias]
    head, lse, entropy, *kept = saved_head(ctx)
    dlse = None if dmean is None else -dmean
    dsum = None if dmean is None else dmean / head.weight.shape[0]
    gradients = torch.ops.agro.linear_logprobs_bwd(
        dlogprobs, dlse, None, *head, lse, entropy, asked, *kept, None, None, dsum
    )
    return *input_gradients(asked, *gradients), None


torch.library.register_autograd(
    "agro::smoothed_logprobs_fwd", _backward, setup_context=_save, lib=library
)
