"""The derivatives that the ops have: the first, in reverse mode. Every other one is an error.

torch by itself would give zeros for them: it drops the tangents of forward mode where an op has no
formula, and `once_differentiable` is asked only if the backward pass happens to come by.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backward = Callable[..., tuple[Tensor | None, ...]]


def refuse_forward_mode(op: str, **inputs: Tensor | None) -> None:
    """Raise where an input has a tangent, of torch.func.jvp or torch.autograd.forward_ad."""
    if forward_ad._current_level < 0:  # the public function that asks for it costs more than this
        return
    for name, value in inputs.items():
        if value is not None and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"{op}: expected {name} without a tangent, got one with it; the op has no "
                "forward-mode derivative: use reverse mode, or agro_kernels.reference"
            )


def differentiable_once(op: str, *, of_first: bool = False) -> Callable[[Backward], Backward]:
    """A backward pass, `backward(ctx, *gradients)`, whose results raise where they are derived.

    What they depend on: the gradients, ctx.saved_tensors, and ctx.others, if there is such a list.
    of_first: only the first result is differentiable; without its gradient no input has one.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def call(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            if of_first and gradients[0] is None:
                return (None,) * len(ctx.needs_input_grad)
            if not torch.is_grad_enabled():  # without create_graph
                return backward(ctx, *gradients)
            with torch.no_grad():
                results = backward(ctx, *gradients)
            sources = (*gradients, *ctx.saved_tensors, *getattr(ctx, "others", ()))
            depends_on = [value for value in sources if value is not None and value.requires_grad]
            given = [value for value in results if value is not None]
            if not depends_on or not given:
                return results
            guarded = iter(_NoDerivative.apply(op, len(given), *given, *depends_on))
            return tuple(None if value is None else next(guarded) for value in results)

        return call

    return decorate


class _NoDerivative(torch.autograd.Function):
    """The first `count` of the tensors as they are, depending on the others, with no derivative."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op}: expected one derivative, got a second (create_graph=True); the op is "
            "once_differentiable: leave that term out, or compute it with agro_kernels.reference"
        )
