"""selective_logprobs: schemas, shapes, gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agro_kernels._torch import selective_logprobs as torch_selective_logprobs
from agro_kernels.arguments import results_dtype
from agro_kernels.head import Upstream
from agro_kernels.logit_rows import LogitRows
from agro_kernels.ops.derivatives import differentiable_once
from agro_kernels.ops.dispatch import (
    library,
    triton_if_possible,
    with_numbers,
    with_record,
    without_autocast,
)

library.define(
    "selective_logprobs_fwd(Tensor logits, Tensor targets, float temperature, "
    "Tensor? token_temperature, int ignore_index) -> (Tensor logprobs, Tensor lse)"
)
library.define(
    "selective_logprobs_bwd(Tensor dlogprobs, Tensor logits, Tensor targets, float temperature, "
    "Tensor? token_temperature, int ignore_index, Tensor lse) -> Tensor dlogits"
)


def _flat(kernel: Callable[..., Any], at: int) -> Callable[..., Any]:
    """`kernel`, whose argument `at` is a `LogitRows` without a softcap, as the schemas have it."""
    return without_autocast(with_record(LogitRows, with_numbers(kernel), at=at, fields=5))


for _name, _at in (("selective_logprobs_fwd", 0), ("selective_logprobs_bwd", 1)):
    _everywhere = getattr(torch_selective_logprobs, _name)
    _cuda = triton_if_possible(_name, "selective_logprobs", torch_selective_logprobs)
    for _key, _kernel in (("CompositeExplicitAutograd", _everywhere), ("CUDA", _cuda)):
        library.impl(_name, _flat(_kernel, _at), _key)


# The statistics, in plain torch on every device.
_STATS = (
    "Tensor logits, Tensor targets, float temperature, Tensor? token_temperature, float softcap, "
    "int ignore_index"
)
library.define(f"selective_stats_fwd({_STATS}) -> (Tensor logprobs, Tensor lse, Tensor entropy)")
library.define(
    f"selective_stats_bwd(Tensor? dlogprobs, Tensor? dlse, Tensor? dentropy, {_STATS}, Tensor lse, "
    "Tensor entropy) -> Tensor dlogits"
)


def _selective_stats_bwd(
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    given: LogitRows,
    lse: Tensor,
    entropy: Tensor,
) -> Tensor:
    upstream = Upstream(dlogprobs, dlse, dentropy, lse, entropy)
    return torch_selective_logprobs.selective_stats_bwd(upstream, given)


for _name, _function, _at in (
    ("selective_stats_fwd", torch_selective_logprobs.selective_stats_fwd, 0),
    ("selective_stats_bwd", _selective_stats_bwd, 3),
):
    _kernel = with_record(LogitRows.capped, with_numbers(_function), at=_at, fields=6)
    library.impl(_name, without_autocast(_kernel), "CompositeExplicitAutograd")


def _selective_stats_fwd_fake(logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(targets.shape, dtype=results_dtype(logits)) for _ in range(3))


def _selective_stats_bwd_fake(
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    logits: Tensor,
    *others: Any,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _selective_stats_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, temperature, token_temperature, softcap, ignore_index = inputs
    _, lse, entropy = output
    ctx.save_for_backward(logits, targets, token_temperature, lse, entropy)
    ctx.options = temperature, softcap, ignore_index
    ctx.set_materialize_grads(False)


@differentiable_once("selective_logprobs_with_stats")
def _selective_stats_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, targets, token_temperature, lse, entropy = ctx.saved_tensors
    temperature, softcap, ignore_index = ctx.options
    dlogits = torch.ops.agro.selective_stats_bwd(
        *upstream, logits, targets, temperature, token_temperature, softcap, ignore_index, lse,
        entropy,
    )  # fmt: skip
    return dlogits, *[None] * 5


torch.library.register_fake("agro::selective_stats_fwd", _selective_stats_fwd_fake, lib=library)
torch.library.register_fake("agro::selective_stats_bwd", _selective_stats_bwd_fake, lib=library)
torch.library.register_autograd(
    "agro::selective_stats_fwd",
    _selective_stats_backward,
    setup_context=_selective_stats_save,
    lib=library,
)


def _selective_logprobs_fwd_fake(
    logits: Tensor, targets: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    dtype = results_dtype(logits)
    return (
        logits.new_empty(targets.shape, dtype=dtype),
        logits.new_empty(targets.shape, dtype=dtype),
    )


torch.library.register_fake(
    "agro::selective_logprobs_fwd", _selective_logprobs_fwd_fake, lib=library
)


def _selective_logprobs_bwd_fake(dlogprobs: Tensor, logits: Tensor, *others: Any) -> Tensor:
    return logits.new_empty(logits.shape)


torch.library.register_fake(
    "agro::selective_logprobs_bwd", _selective_logprobs_bwd_fake, lib=library
)


def _selective_logprobs_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, temperature, token_temperature, ignore_index = inputs
    lse = output[1]
    ctx.save_for_backward(logits, targets, token_temperature, lse)
    ctx.options = temperature, ignore_index
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


@differentiable_once("selective_logprobs", of_first=True)
def _selective_logprobs_backward(ctx: Any, dlogprobs: Tensor, _: None) -> tuple[Tensor | None, ...]:
    logits, targets, token_temperature, lse = ctx.saved_tensors
    temperature, ignore_index = ctx.options
    dlogits = torch.ops.agro.selective_logprobs_bwd(
        dlogprobs, logits, targets, temperature, token_temperature, ignore_index, lse
    )
    return dlogits, None, None, None, None


torch.library.register_autograd(
    "agro::selective_logprobs_fwd",
    _selective_logprobs_backward,
    setup_context=_selective_logprobs_save,
    lib=library,
)
