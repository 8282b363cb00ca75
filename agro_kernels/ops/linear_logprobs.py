"""The head ops: schemas, shapes, gradients. And what goes around them: the ids that a sampler kept,
log-probabilities from an lse that is known.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from agro_kernels._cpu import linear_logprobs as cpu_linear_logprobs
from agro_kernels._torch import kept_ids as torch_kept_ids
from agro_kernels._torch import linear_logprobs as torch_linear_logprobs
from agro_kernels.ops.dispatch import library, results_dtype, triton_if_possible, without_autocast

library.define(
    "linear_logprobs_fwd(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "float temperature, Tensor? token_temperature, float softcap, int ignore_index, "
    "ScalarType? round_logits, Tensor? kept, bool with_entropy) "
    "-> (Tensor logprobs, Tensor lse, Tensor entropy)"
)
_BACKWARD_ARGUMENTS = (
    "Tensor? dlogprobs, Tensor? dlse, Tensor? dentropy, Tensor hidden, Tensor weight, "
    "Tensor targets, Tensor? bias, float temperature, Tensor? token_temperature, float softcap, "
    "int ignore_index, ScalarType? round_logits, Tensor? kept, Tensor lse, Tensor entropy, "
    "bool[] output_mask"
)
library.define(
    f"linear_logprobs_bwd({_BACKWARD_ARGUMENTS}) -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
# Apart from the op above, so that compiled graphs without weight_grad hold no op that mutates.
library.define(
    f"linear_logprobs_bwd_accumulate({_BACKWARD_ARGUMENTS}, Tensor(a!) weight_grad) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
for _name, _function in (
    ("linear_logprobs_fwd", "linear_logprobs_fwd"),
    ("linear_logprobs_bwd", "linear_logprobs_bwd"),
    ("linear_logprobs_bwd_accumulate", "linear_logprobs_bwd"),
):
    _everywhere = getattr(torch_linear_logprobs, _function)
    _cpu = getattr(cpu_linear_logprobs, _function)
    _cuda = triton_if_possible(_function, "linear_logprobs", torch_linear_logprobs)
    library.impl(_name, without_autocast(_everywhere), "CompositeExplicitAutograd")
    library.impl(_name, without_autocast(_cpu), "CPU")
    library.impl(_name, without_autocast(_cuda), "CUDA")


def _linear_logprobs_fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    ignore_index: int,
    round_logits: torch.dtype | None,
    kept: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = hidden.shape[0], results_dtype(hidden)
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n if with_entropy else 0, dtype=dtype),
    )


torch.library.register_fake("agro::linear_logprobs_fwd", _linear_logprobs_fwd_fake, lib=library)


def _linear_logprobs_bwd_fake(
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    ignore_index: int,
    round_logits: torch.dtype | None,
    kept: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hidden, weight, output_mask)


torch.library.register_fake("agro::linear_logprobs_bwd", _linear_logprobs_bwd_fake, lib=library)


def _linear_logprobs_bwd_accumulate_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments_of_bwd, _ = arguments
    dhidden, dweight, dbias = _linear_logprobs_bwd_fake(*arguments_of_bwd)
    return dhidden, dweight.new_empty(0), dbias


torch.library.register_fake(
    "agro::linear_logprobs_bwd_accumulate", _linear_logprobs_bwd_accumulate_fake, lib=library
)


def _empty_gradients(
    hidden: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, unwritten; those not asked for have shape (0,)."""
    return (
        hidden.new_empty(hidden.shape if output_mask[0] else (0,)),
        weight.new_empty(weight.shape if output_mask[1] else (0,)),
        weight.new_empty(weight.shape[:1] if output_mask[2] else (0,)),
    )


def _linear_logprobs_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, entropy = output
    save_head(ctx, inputs, lse, entropy)


def _target_logprobs_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    lse = inputs[-1]
    save_head(ctx, inputs, lse, lse.new_empty(0))


def save_head(ctx: Any, inputs: Sequence[Any], lse: Tensor, entropy: Tensor) -> None:
    """Keeps what `backward_arguments` gives back. The last of an op's inputs is not needed."""
    hidden, weight, targets, bias, temperature, token_temperature, softcap, *others = inputs
    ignore_index, round_logits, kept, _ = others
    ctx.save_for_backward(hidden, weight, targets, bias, token_temperature, kept, lse, entropy)
    ctx.options = temperature, softcap, ignore_index, round_logits
    ctx.set_materialize_grads(False)


@once_differentiable
def _logprobs_backward(
    ctx: Any,
    dlogprobs: Tensor | None,
    dlse: Tensor | None = None,
    dentropy: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of both ops: a given lse is what the inputs make it, not a constant."""
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    dhidden, dweight, dbias = torch.ops.agro.linear_logprobs_bwd(
        *backward_arguments(ctx, dlogprobs, dlse, dentropy), [need_hidden, need_weight, need_bias]
    )
    return (
        dhidden if need_hidden else None,
        dweight if need_weight else None,
        None,
        dbias if need_bias else None,
        *[None] * 7,
    )


def backward_arguments(
    ctx: Any, dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None
) -> tuple[Any, ...]:
    """What the ops of the gradients take, up to output_mask, after `save_head`."""
    hidden, weight, targets, bias, token_temperature, kept, lse, entropy = ctx.saved_tensors
    temperature, softcap, ignore_index, round_logits = ctx.options
    if entropy.shape != lse.shape:
        dentropy = None  # the forward pass made no entropy: what came is the gradient of nothing
    return (
        dlogprobs,
        dlse,
        dentropy,
        hidden,
        weight,
        targets,
        bias,
        temperature,
        token_temperature,
        softcap,
        ignore_index,
        round_logits,
        kept,
        lse,
        entropy,
    )


torch.library.register_autograd(
    "agro::linear_logprobs_fwd",
    _logprobs_backward,
    setup_context=_linear_logprobs_save,
    lib=library,
)


library.define("pack_kept_ids(Tensor kept_ids, SymInt vocabulary) -> Tensor kept")
library.impl("pack_kept_ids", torch_kept_ids.pack_kept_ids, "CompositeExplicitAutograd")
library.define(
    "target_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "float temperature, Tensor? token_temperature, float softcap, int ignore_index, "
    "ScalarType? round_logits, Tensor? kept, Tensor lse) -> Tensor logprobs"
)
library.impl(
    "target_logprobs",
    without_autocast(torch_linear_logprobs.target_logprobs),
    "CompositeExplicitAutograd",
)


def _pack_kept_ids_fake(kept_ids: Tensor, vocabulary: int) -> Tensor:
    return kept_ids.new_empty((kept_ids.shape[0], -(-vocabulary // 32)), dtype=torch.int32)


torch.library.register_fake("agro::pack_kept_ids", _pack_kept_ids_fake, lib=library)


def _target_logprobs_fake(hidden: Tensor, *others: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=results_dtype(hidden))


torch.library.register_fake("agro::target_logprobs", _target_logprobs_fake, lib=library)
torch.library.register_autograd(
    "agro::target_logprobs",
    _logprobs_backward,
    setup_context=_target_logprobs_save,
    lib=library,
)
