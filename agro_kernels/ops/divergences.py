"""The divergences of two heads: schemas, shapes, gradients."""

from typing import Any

import torch
from torch import Tensor

from agro_kernels._torch import divergences as torch_divergences
from agro_kernels.arguments import results_dtype
from agro_kernels.head import HEAD_SCHEMA, Head
from agro_kernels.ops.derivatives import differentiable_once
from agro_kernels.ops.dispatch import (
    library,
    with_head,
    with_numbers,
    with_record,
    without_autocast,
)
from agro_kernels.ops.linear_logprobs import empty_gradients, input_gradients

_FIELDS = len(Head._fields)
_TEACHER = ", ".join(
    "{} teacher_{}".format(*argument.rsplit(" ", 1)) for argument in HEAD_SCHEMA.split(", ")
)
library.define(
    f"divergence_fwd({HEAD_SCHEMA}, {_TEACHER}, int kind, float beta, Tensor lse, "
    "Tensor teacher_lse) -> (Tensor divergence, Tensor inner)"
)
library.define(
    f"divergence_bwd(Tensor upstream, {HEAD_SCHEMA}, {_TEACHER}, int kind, float beta, "
    "Tensor inner, Tensor lse, Tensor teacher_lse, bool[] output_mask) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)


def _divergence_fwd_fake(head: Head, *others: Any) -> tuple[Tensor, Tensor]:
    n, dtype = head.hidden.shape[0], results_dtype(head.hidden)
    return head.hidden.new_empty(n, dtype=dtype), head.hidden.new_empty(n, dtype=dtype)


def _divergence_bwd_fake(
    upstream: Tensor, head: Head, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(head, others[-1])


def _two_heads(kernel: Any, at: int) -> Any:
    """`kernel`, whose arguments `at` and the next are heads, as the dispatcher calls it."""
    return with_record(Head, with_record(Head, kernel, at=at + 1), at=at)


for _name, _at, _fake in (
    ("divergence_fwd", 0, with_head(_divergence_fwd_fake)),
    ("divergence_bwd", 1, with_record(Head, _divergence_bwd_fake, at=1)),
):
    _kernel = with_numbers(getattr(torch_divergences, _name))
    library.impl(_name, without_autocast(_two_heads(_kernel, _at)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"agro::{_name}", _fake, lib=library)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.save_for_backward(*tensors, output[1])
    ctx.numbers = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@differentiable_once("linear_kl and linear_jsd", of_first=True)
def _backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
    *tensors, inner = ctx.saved_tensors
    inputs = [
        number if tensor is None else tensor
        for tensor, number in zip(tensors, ctx.numbers, strict=True)
    ]
    *heads, lse, teacher_lse = inputs
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    asked = [need_hidden, need_weight, need_bias]
    gradients = torch.ops.agro.divergence_bwd(upstream, *heads, inner, lse, teacher_lse, asked)
    return *input_gradients(asked, *gradients), *[None] * (len(inputs) - _FIELDS)


torch.library.register_autograd("agro::divergence_fwd", _backward, setup_context=_save, lib=library)
