"""The head ops: schemas, shapes, gradients.

Beside the two passes: `pack_kept_ids`, for the ids that a sampler kept, and `target_logprobs`, the
log-probabilities where lse is known already.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agro_kernels._cpu import linear_logprobs as cpu_linear_logprobs
from agro_kernels._torch import kept_ids as torch_kept_ids
from agro_kernels._torch import linear_logprobs as torch_linear_logprobs
from agro_kernels.arguments import results_dtype
from agro_kernels.backward import Backward
from agro_kernels.head import HEAD_SCHEMA, Head, Upstream
from agro_kernels.kept_logits import KeptLogits, empty_kept_logits
from agro_kernels.many_targets import KnownEntries, ManyTargets
from agro_kernels.ops.buffer_locks import in_turn
from agro_kernels.ops.derivatives import differentiable_once
from agro_kernels.ops.dispatch import (
    library,
    serve_everywhere,
    triton_if_possible,
    with_head,
    with_numbers,
    without_autocast,
)

library.define(
    f"linear_logprobs_fwd({HEAD_SCHEMA}, bool with_entropy, int keep_logits_bytes=0) -> "
    "(Tensor logprobs, Tensor lse, Tensor entropy, Tensor kept_logits, Tensor kept_maxima)"
)
_BACKWARD_ARGUMENTS = (
    f"Tensor? dlogprobs, Tensor? dlse, Tensor? dentropy, {HEAD_SCHEMA}, Tensor lse, "
    "Tensor entropy, bool[] output_mask, Tensor? kept_logits, Tensor? kept_maxima"
)
_LATER = "Tensor? entry_ids=None, Tensor? entry_values=None, Tensor? dsum=None"
library.define(
    f"linear_logprobs_bwd({_BACKWARD_ARGUMENTS}, {_LATER}) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
# An op of its own, so that compiled graphs without weight_grad contain no op that mutates.
library.define(
    f"linear_logprobs_bwd_accumulate({_BACKWARD_ARGUMENTS}, Tensor(a!) weight_grad, {_LATER}) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)


# Which argument of it is the buffer.
_WEIGHT_GRAD = 3 + len(Head._fields) + 5


def with_kept(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel(head, with_entropy, kept_logits)`, given room for the logits that it is to keep."""

    @functools.wraps(kernel)
    def call(head: Head, with_entropy: bool, keep_logits_bytes: int = 0) -> tuple[Tensor, ...]:
        kept = empty_kept_logits(head, keep_logits_bytes)
        results = kernel(head, with_entropy, kept if kept.columns > 0 else None)
        return *results, *kept

    return call


def with_upstream(kernel: Callable[..., Any], *, accumulates: bool = False) -> Callable[..., Any]:
    """`kernel(backward)`, which takes a `Backward`, as a schema above.

    accumulates: as that with a weight_grad.
    """
    stop = len(Head._fields)

    @functools.wraps(kernel)
    def call(
        dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None, *flat: Any
    ) -> Any:
        lse, entropy, output_mask, logits, maxima, *others = flat[stop:]
        if dentropy is None:
            entropy = None
        kept = None if logits is None or maxima is None else KeptLogits(logits, maxima)
        weight_grad = others.pop(0) if accumulates else None
        ids, values, dsum = (*others, None, None, None)[:3]
        upstream = Upstream(dlogprobs, dlse, dentropy, lse, entropy, dsum)
        known = None if ids is None or values is None else KnownEntries(ids, values)
        head = Head(*flat[:stop])
        return kernel(Backward(upstream, head, output_mask, weight_grad, kept, known))

    return call


with_upstream_and_buffer = functools.partial(with_upstream, accumulates=True)


def _flat_forward(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return with_head(with_kept(kernel))


for _name, _function, _flat in (
    ("linear_logprobs_fwd", "linear_logprobs_fwd", _flat_forward),
    ("linear_logprobs_bwd", "linear_logprobs_bwd", with_upstream),
    ("linear_logprobs_bwd_accumulate", "linear_logprobs_bwd", with_upstream_and_buffer),
):
    for _key, _kernel in (
        ("CompositeExplicitAutograd", getattr(torch_linear_logprobs, _function)),
        ("CPU", getattr(cpu_linear_logprobs, _function)),
        ("CUDA", triton_if_possible(_function, "linear_logprobs", torch_linear_logprobs)),
    ):
        _kernel = without_autocast(_flat(with_numbers(_kernel)))
        if _name == "linear_logprobs_bwd_accumulate":
            _kernel = in_turn(_kernel, at=_WEIGHT_GRAD)
        library.impl(_name, _kernel, _key)


def _linear_logprobs_fwd_fake(
    head: Head, with_entropy: bool, keep_logits_bytes: int = 0
) -> tuple[Tensor, ...]:
    n, dtype = head.hidden.shape[0], results_dtype(head.hidden)
    return (
        head.hidden.new_empty(n, dtype=dtype),
        head.hidden.new_empty(n, dtype=dtype),
        head.hidden.new_empty(n if with_entropy else 0, dtype=dtype),
        *empty_kept_logits(head, keep_logits_bytes),
    )


def empty_gradients(
    head: Head, output_mask: list[bool], weight_grad: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, unwritten; those not asked for have shape (0,)."""
    need_hidden, need_weight, need_bias = output_mask
    hidden, weight = head.hidden, head.weight
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight and weight_grad is None else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _linear_logprobs_bwd_fake(backward: Backward) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(backward.head, backward.output_mask, backward.weight_grad)


def save_head(
    ctx: Any,
    head: Head,
    lse: Tensor,
    entropy: Tensor,
    with_entropy: bool,
    kept_logits: Tensor | None = None,
    kept_maxima: Tensor | None = None,
    *,
    many: ManyTargets | None = None,
) -> None:
    """Keeps what `saved_head` gives back, and whether entropy is (N,) or the empty tensor.

    Its shape would not tell: in a graph the number of tokens may be unknown. many: for
    `saved_many`.
    """
    ctx.save_for_backward(
        head.hidden,
        head.weight,
        head.targets,
        head.bias,
        head.token_temperature,
        head.kept,
        lse,
        entropy,
        kept_logits,
        kept_maxima,
        *(many or ()),
    )
    ctx.options = head.temperature, head.softcap, head.ignore_index, head.round_logits
    ctx.with_entropy = with_entropy
    ctx.set_materialize_grads(False)


def saved_head(ctx: Any) -> tuple[Head, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(head, lse, entropy, kept_logits, kept_maxima) after `save_head`."""
    hidden, weight, targets, bias, token_temperature, kept, *others = ctx.saved_tensors
    lse, entropy, kept_logits, kept_maxima, *_ = others
    temperature, softcap, ignore_index, round_logits = ctx.options
    head = Head(
        hidden, weight, targets, bias, temperature, token_temperature, softcap, ignore_index,
        round_logits, kept,
    )  # fmt: skip
    return head, lse, entropy, kept_logits, kept_maxima


def saved_many(ctx: Any) -> ManyTargets:
    """After `save_head` with many targets a token."""
    return ManyTargets(*ctx.saved_tensors[-3:])


def input_gradients(
    asked: list[bool], dhidden: Tensor, dweight: Tensor, dbias: Tensor
) -> tuple[Tensor | None, ...]:
    """What autograd wants for the fields of a Head: a gradient each, or None."""
    need_hidden, need_weight, need_bias = asked
    return (
        dhidden if need_hidden else None,
        dweight if need_weight else None,
        None,
        dbias if need_bias else None,
        *[None] * 6,
    )


def _linear_logprobs_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *head, with_entropy, keep_logits_bytes = inputs
    _, lse, entropy, *kept = output
    ctx.mark_non_differentiable(*kept)
    if keep_logits_bytes == 0:
        kept = []
    save_head(ctx, Head(*head), lse, entropy, with_entropy, *kept)


def _target_logprobs_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *head, lse = inputs
    save_head(ctx, Head(*head), lse, lse.new_empty(0), False)


@differentiable_once("linear_logprobs")
def _logprobs_backward(
    ctx: Any,
    dlogprobs: Tensor | None,
    dlse: Tensor | None = None,
    dentropy: Tensor | None = None,
    *of_kept: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of both ops: a given lse is what the inputs make it, not a constant."""
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    asked = [need_hidden, need_weight, need_bias]
    head, lse, entropy, *kept = saved_head(ctx)
    gradients = torch.ops.agro.linear_logprobs_bwd(
        dlogprobs, dlse, of_entropy(ctx, dentropy), *head, lse, entropy, asked, *kept
    )
    after_head = len(ctx.needs_input_grad) - len(Head._fields)
    return *input_gradients(asked, *gradients), *[None] * after_head


def of_entropy(ctx: Any, dentropy: Tensor | None) -> Tensor | None:
    """dentropy, or None where the forward pass made no entropy.

    There autograd may pass a gradient of the empty tensor that was returned for it.
    """
    return dentropy if ctx.with_entropy else None


library.define("pack_kept_ids(Tensor kept_ids, SymInt vocabulary) -> Tensor kept")
library.impl("pack_kept_ids", torch_kept_ids.pack_kept_ids, "CompositeExplicitAutograd")
library.define(f"target_logprobs({HEAD_SCHEMA}, Tensor lse) -> Tensor logprobs")


def _pack_kept_ids_fake(kept_ids: Tensor, vocabulary: int) -> Tensor:
    return kept_ids.new_empty((kept_ids.shape[0], -(-vocabulary // 32)), dtype=torch.int32)


def _target_logprobs_fake(head: Head, lse: Tensor) -> Tensor:
    return head.hidden.new_empty(head.hidden.shape[0], dtype=results_dtype(head.hidden))


serve_everywhere(
    "target_logprobs",
    with_numbers(torch_linear_logprobs.target_logprobs),
    _target_logprobs_fake,
    with_numbers(triton_if_possible("target_logprobs", "target_logprobs", torch_linear_logprobs)),
)
for _name, _fake in (
    ("linear_logprobs_fwd", with_head(_linear_logprobs_fwd_fake)),
    ("linear_logprobs_bwd", with_upstream(_linear_logprobs_bwd_fake)),
    ("linear_logprobs_bwd_accumulate", with_upstream_and_buffer(_linear_logprobs_bwd_fake)),
    ("pack_kept_ids", _pack_kept_ids_fake),
):
    torch.library.register_fake(f"agro::{_name}", _fake, lib=library)
for _name, _save in (
    ("linear_logprobs_fwd", _linear_logprobs_save),
    ("target_logprobs", _target_logprobs_save),
):
    torch.library.register_autograd(
        f"agro::{_name}", _logprobs_backward, setup_context=_save, lib=library
    )
