"""The head ops with the weight's gradient added straight into the caller's fp32 buffer.

Megatron and others keep `main_grad`, an fp32 sum over micro-batches, beside each weight. The ops of
`linear_logprobs.py` return a new gradient, which would be rounded to the weight's dtype and then
added; here it goes from the matrix products into the buffer, and autograd gets none for the weight.
"""

from typing import Any

import torch
from torch import Tensor

from agro_kernels.head import Asked, Head
from agro_kernels.many_targets import ManyTargets
from agro_kernels.ops.derivatives import differentiable_once
from agro_kernels.ops.linear_logprobs import input_gradients, of_entropy, save_head, saved_head
from agro_kernels.ops.many_logprobs import backward_arguments

_ASKED = len(Asked._fields)


def refuse_under_compile() -> None:
    """A graph break inside a fullgraph region would be reported far from here."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "weight_grad: expected a call outside torch.compile, got one inside; its backward "
            "writes into the caller's buffer, which a compiled graph cannot hold: leave this call "
            "out with torch.compiler.disable"
        )


class AccumulatingLogprobs(torch.autograd.Function):
    """linear_logprobs_fwd whose backward adds to weight_grad (V, D) instead of returning dweight.

    Takes the fields of an Asked and of a Head, as apply sees no tensors inside a record. Returns
    (logprobs, lse, entropy).
    """

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        fields = flat[_ASKED:]
        with_entropy, lse, weight_grad, keep_logits_bytes, ids = Asked(*flat[:_ASKED])
        kept: tuple[Tensor, ...] = ()
        many = None
        if ids is not None:
            logprobs, lse, entropy, logits, *kept = torch.ops.agro.many_logprobs_fwd(
                *fields, ids, with_entropy, keep_logits_bytes
            )
            many = ManyTargets(ids, logits, logprobs)
        elif lse is None:
            logprobs, lse, entropy, *kept = torch.ops.agro.linear_logprobs_fwd(
                *fields, with_entropy, keep_logits_bytes
            )
        else:
            with_entropy = False
            logprobs = torch.ops.agro.target_logprobs(*fields, lse)
            entropy = logprobs.new_empty(0)
        save_head(ctx, Head(*fields), lse, entropy, with_entropy, *kept, many=many)
        ctx.many = many is not None
        # Not with save_for_backward, which refuses tensors that have changed since: the backward
        # passes of other micro-batches add to this one.
        ctx.weight_grad = weight_grad
        return logprobs, lse, entropy

    @staticmethod
    @differentiable_once("linear_logprobs")
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dlogprobs, dlse, dentropy = upstream
        need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad[_ASKED:]
        asked = [need_hidden, need_weight, need_bias]
        if ctx.many:
            arguments, known = backward_arguments(ctx, asked, dlogprobs, dlse, dentropy)
        else:
            head, lse, entropy, *kept = saved_head(ctx)
            dentropy = of_entropy(ctx, dentropy)
            arguments = (dlogprobs, dlse, dentropy, *head, lse, entropy, asked, *kept)
            known = (None, None)
        dhidden, dweight, dbias = torch.ops.agro.linear_logprobs_bwd_accumulate(
            *arguments, ctx.weight_grad, *known
        )
        return (
            *[None] * _ASKED,
            *input_gradients([need_hidden, False, need_bias], dhidden, dweight, dbias),
        )
