"""AGRO's coefficients and loss: schemas, shapes, gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agro_kernels._torch import agro_loss as torch_agro_loss
from agro_kernels.agro_options import AGRO_SCHEMA, AgroOptions, AgroTokens
from agro_kernels.arguments import results_dtype
from agro_kernels.ops.derivatives import differentiable_once
from agro_kernels.ops.dispatch import (
    library,
    triton_if_possible,
    with_numbers,
    with_record,
)

library.define(
    "agro_coefficients(Tensor rewards, Tensor logprobs, Tensor ref_logprobs, Tensor groups, "
    f"{AGRO_SCHEMA}) -> (Tensor coefficients, Tensor moments, Tensor counts)"
)
library.define(
    "agro_loss_fwd(Tensor logprobs, Tensor ref_logprobs, Tensor rewards, Tensor groups, "
    f"Tensor cu_seqlens, {AGRO_SCHEMA}) -> (Tensor loss, Tensor coefficients)"
)
library.define(
    "agro_loss_bwd(Tensor dloss, Tensor coefficients, Tensor cu_seqlens, SymInt num_tokens, "
    "ScalarType dtype) -> Tensor dlogprobs"
)


def with_options(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel(rewards, logprobs, ref_logprobs, groups, options)` as the dispatcher calls it."""
    return with_record(AgroOptions, with_numbers(kernel), at=4)


def with_tokens(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel(tokens, options)` as the dispatcher calls it."""
    return with_record(AgroTokens, with_record(AgroOptions, with_numbers(kernel), at=1))


for _name, _flat in (
    ("agro_coefficients", with_options),
    ("agro_loss_fwd", with_tokens),
    ("agro_loss_bwd", None),
):
    _everywhere = getattr(torch_agro_loss, _name)
    _cuda = triton_if_possible(_name, "agro_loss", torch_agro_loss, float64=True)
    for _key, _kernel in (("CompositeExplicitAutograd", _everywhere), ("CUDA", _cuda)):
        library.impl(_name, _kernel if _flat is None else _flat(_kernel), _key)


def _agro_coefficients_fake(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, groups: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    all_double = rewards.dtype == logprobs.dtype == ref_logprobs.dtype == torch.float64
    return (
        rewards.new_empty(rewards.shape, dtype=torch.float64 if all_double else torch.float32),
        rewards.new_empty(7, dtype=torch.float64),
        rewards.new_empty(3, dtype=torch.int64),
    )


torch.library.register_fake("agro::agro_coefficients", _agro_coefficients_fake, lib=library)


def _agro_loss_fwd_fake(tokens: AgroTokens, *options: Any) -> tuple[Tensor, Tensor]:
    logprobs, rewards = tokens.logprobs, tokens.rewards
    return (
        logprobs.new_empty((), dtype=results_dtype(logprobs)),
        rewards.new_empty(rewards.shape, dtype=torch.float64),
    )


torch.library.register_fake(
    "agro::agro_loss_fwd", with_record(AgroTokens, _agro_loss_fwd_fake), lib=library
)


def _agro_loss_bwd_fake(
    dloss: Tensor, coefficients: Tensor, cu_seqlens: Tensor, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    return coefficients.new_empty(num_tokens, dtype=dtype)


torch.library.register_fake("agro::agro_loss_bwd", _agro_loss_bwd_fake, lib=library)


def _agro_loss_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprobs, cu_seqlens, coefficients = inputs[0], inputs[4], output[1]
    ctx.save_for_backward(coefficients, cu_seqlens)
    ctx.shape_and_dtype = logprobs.shape[0], logprobs.dtype
    # What the coefficients depend on, for a second derivative to find. Not with save_for_backward,
    # as the gradient does not need its values, which the caller may change.
    ctx.others = (logprobs,)
    ctx.mark_non_differentiable(coefficients)
    ctx.set_materialize_grads(False)


@differentiable_once("agro_loss", of_first=True)
def _agro_loss_backward(ctx: Any, dloss: Tensor, _: None) -> tuple[Tensor | None, ...]:
    coefficients, cu_seqlens = ctx.saved_tensors
    num_tokens, dtype = ctx.shape_and_dtype
    dlogprobs: Tensor = torch.ops.agro.agro_loss_bwd(
        dloss, coefficients, cu_seqlens, num_tokens, dtype
    )
    return dlogprobs, *[None] * (len(ctx.needs_input_grad) - 1)


torch.library.register_autograd(
    "agro::agro_loss_fwd", _agro_loss_backward, setup_context=_agro_loss_save, lib=library
)
