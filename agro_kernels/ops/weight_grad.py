"""The head ops with the weight's gradient added straight into the caller's fp32 buffer.

Megatron and others keep `main_grad`, an fp32 sum over micro-batches, beside each weight. The ops of
`library.py` return a new gradient, which would be rounded to the weight's dtype and then added;
here it goes from the matrix products into the buffer, and autograd is told that there is none.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from agro_kernels.ops.linear_logprobs import backward_arguments, save_head


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

    Takes the op's arguments after weight_grad, and lse (N,) or None as the last. With lse from an
    earlier pass over the same inputs the logprobs are (target logit - lse): no matrix product.
    Returns (logprobs, lse, entropy), entropy (0,) unless with_entropy.
    """

    @staticmethod
    def forward(ctx: Any, weight_grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *of_op, lse = arguments
        if lse is None:
            logprobs, lse, entropy = torch.ops.agro.linear_logprobs_fwd(*of_op)
        else:
            logprobs = torch.ops.agro.target_logprobs(*of_op[:-1], lse)
            entropy = logprobs.new_empty(0)
        save_head(ctx, of_op, lse, entropy)
        ctx.weight_grad = weight_grad  # not an input of the gradient: later additions are welcome
        return logprobs, lse, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _, need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        dhidden, _, dbias = torch.ops.agro.linear_logprobs_bwd_accumulate(
            *backward_arguments(ctx, dlogprobs, dlse, dentropy),
            [need_hidden, need_weight, need_bias],
            ctx.weight_grad,
        )
        return (
            None,
            dhidden if need_hidden else None,
            None,
            None,
            dbias if need_bias else None,
            *[None] * 8,
        )
