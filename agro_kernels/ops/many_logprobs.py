"""Many targets a token: schema, shapes, gradients. The passes are those of one target a token.

The forward pass is `linear_logprobs_fwd`, for lse, and the K logits of each token by themselves,
N K D operations. What the backward pass of one target is given for K, `many_targets.py` says.
"""

from typing import Any

import torch
from torch import Tensor

from agro_kernels._torch import linear_logprobs as torch_linear_logprobs
from agro_kernels.arguments import results_dtype
from agro_kernels.head import HEAD_SCHEMA, Head, Upstream
from agro_kernels.many_targets import ManyTargets, check_ids, of_tokens, upstream_and_entries
from agro_kernels.ops.derivatives import differentiable_once
from agro_kernels.ops.dispatch import library, serve_everywhere, triton_if_possible
from agro_kernels.ops.linear_logprobs import (
    input_gradients,
    of_entropy,
    save_head,
    saved_head,
    saved_many,
)

_with_triton = triton_if_possible("many_target_logprobs", "target_logprobs", torch_linear_logprobs)
library.define(
    f"many_logprobs_fwd({HEAD_SCHEMA}, Tensor ids, bool with_entropy, int keep_logits_bytes=0) -> "
    "(Tensor logprobs, Tensor lse, Tensor entropy, Tensor logits, Tensor kept_logits, "
    "Tensor kept_maxima)"
)


def _many_logprobs_fwd(
    head: Head, ids: Tensor, with_entropy: bool, keep_logits_bytes: int = 0
) -> tuple[Tensor, ...]:
    """logprobs and logits (N, K) of ids (N, K), lse (N,), entropy (N,) or (0,), what was kept."""
    check_ids(head, ids)
    _, lse, entropy, *kept = torch.ops.agro.linear_logprobs_fwd(
        *of_tokens(head, ids), with_entropy, keep_logits_bytes
    )
    logits, logprobs = target_logprobs_of(head.with_numbers(), ids, lse)
    return logprobs, lse, entropy, logits, *kept


def target_logprobs_of(head: Head, ids: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, logprobs) of ids (N, K), (N, K) each, with lse (N,)."""
    function = torch_linear_logprobs.many_target_logprobs
    if ids.device.type == "cuda":
        function = _with_triton
    return function(head, ids, lse)


def _many_logprobs_fwd_fake(
    head: Head, ids: Tensor, with_entropy: bool, keep_logits_bytes: int = 0
) -> tuple[Tensor, ...]:
    _, lse, entropy, *kept = torch.ops.agro.linear_logprobs_fwd(
        *head, with_entropy, keep_logits_bytes
    )
    logprobs, logits = (
        ids.new_empty(ids.shape, dtype=results_dtype(head.hidden)) for _ in range(2)
    )
    return logprobs, lse, entropy, logits, *kept


serve_everywhere("many_logprobs_fwd", _many_logprobs_fwd, _many_logprobs_fwd_fake)


def backward_arguments(
    ctx: Any,
    asked: list[bool],
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
) -> tuple[tuple[Any, ...], tuple[Tensor | None, Tensor | None]]:
    """What linear_logprobs_bwd takes after `save_head` with `many`, and the entries' two tensors.

    Between the two a weight_grad has its place.
    """
    head, lse, entropy, *kept = saved_head(ctx)
    dentropy = of_entropy(ctx, dentropy)
    many = saved_many(ctx)
    upstream = Upstream(None, dlse, dentropy, lse, None if dentropy is None else entropy)
    upstream, known = upstream_and_entries(head, many, dlogprobs, upstream)
    arguments = (*upstream[:3], *of_tokens(head, many.ids), lse, entropy, asked, *kept)
    return arguments, (None, None) if known is None else (known.ids, known.values)


def _many_logprobs_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *head, ids, with_entropy, keep_logits_bytes = inputs
    logprobs, lse, entropy, logits, *kept = output
    ctx.mark_non_differentiable(logits, *kept)
    if keep_logits_bytes == 0:
        kept = []
    many = ManyTargets(ids, logits, logprobs)
    save_head(ctx, Head(*head), lse, entropy, with_entropy, *kept, many=many)


@differentiable_once("linear_logprobs")
def _many_logprobs_backward(
    ctx: Any,
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    *of_others: Tensor | None,
) -> tuple[Tensor | None, ...]:
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    asked = [need_hidden, need_weight, need_bias]
    arguments, known = backward_arguments(ctx, asked, dlogprobs, dlse, dentropy)
    gradients = torch.ops.agro.linear_logprobs_bwd(*arguments, *known)
    return *input_gradients(asked, *gradients), None, None, None


torch.library.register_autograd(
    "agro::many_logprobs_fwd",
    _many_logprobs_backward,
    setup_context=_many_logprobs_save,
    lib=library,
)
