"""How far a student's distributions are from a teacher's, over the whole vocabulary.

Both sides come as hidden states and the weight of a head; neither's (N, V) logits are stored. What
a few of the likeliest tokens say costs much less: `linear_topk`, `linear_logprobs` with (..., K).
"""

from typing import TypedDict, Unpack

import torch
from torch import Tensor

import agro_kernels.ops  # noqa: F401  (registers the ops)
from agro_kernels._torch.divergences import Kind
from agro_kernels.arguments import as_number, check_device, check_tensor
from agro_kernels.head import IGNORE_INDEX, Head, check_names
from agro_kernels.ops.derivatives import refuse_forward_mode


class DivergenceOptions(TypedDict, total=False):
    """The keywords of both; `linear_kl` says what they mean."""

    mask: Tensor | None
    bias: Tensor | None
    teacher_bias: Tensor | None
    softcap: float | None
    teacher_softcap: float | None
    temperature: float | Tensor


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    reverse: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """KL(teacher || student) of each token, or with `reverse` KL(student || teacher).

    Same result as

        log_p = (hidden @ weight.T + bias).float().div(temperature).log_softmax(-1)
        log_q = (teacher_hidden @ teacher_weight.T + teacher_bias).float() ... likewise
        (log_q.exp() * (log_q - log_p)).sum(-1)

    with both sides' logits in fp32, a tile at a time. Blocked plain torch on every device, after
    one pass of each head for its lse.

    Args:
        hidden, weight, bias, softcap: the student's, as linear_logprobs.
        teacher_hidden: (..., D_t), (...) as hidden's; D_t may be another. teacher_weight (V, D_t),
            over the student's vocabulary. The teacher's tensors are constants.
        mask: (...) bool: tokens that count. The others' rows are never read.
        temperature: of both sides, as linear_logprobs.

    Returns:
        (...) fp32 (float64 for float64), nats. Exactly 0.0, with exactly zero gradient, where mask
        is False; inf where a banned token has a probability on the first side.

    Gradients flow to hidden, weight and bias, once.
    """
    return _divergence(
        Kind.REVERSE if reverse else Kind.FORWARD,
        0.0,
        (hidden, weight),
        (teacher_hidden, teacher_weight),
        mask=mask,
        bias=bias,
        teacher_bias=teacher_bias,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
        temperature=temperature,
    )


def linear_jsd(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float = 0.5,
    **options: Unpack[DivergenceOptions],
) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    Args:
        beta: between 0 and 1, without them: there the divergence is 0. 0.5 is Jensen and Shannon's.
        The rest as `linear_kl`, and so are the results.
    """
    check_names("linear_jsd", options, DivergenceOptions)
    number = as_number(beta)
    if number is None or not 0.0 < number < 1.0:
        raise ValueError(
            f"beta: expected a number between 0 and 1, got {beta}; linear_kl is what the "
            "divergence tends to at both ends"
        )
    sides = (hidden, weight), (teacher_hidden, teacher_weight)
    return _divergence(Kind.JSD, number, *sides, **options)


def _divergence(
    kind: Kind,
    beta: float,
    student_side: tuple[Tensor, Tensor],
    teacher_side: tuple[Tensor, Tensor],
    **options: Unpack[DivergenceOptions],
) -> Tensor:
    """Of two (hidden, weight). beta is JSD's."""
    hidden, mask = student_side[0], options.get("mask")
    check_tensor("hidden", hidden)
    tokens = hidden.shape[:-1]
    targets = torch.zeros(tokens, dtype=torch.int64, device=hidden.device)
    if mask is not None:
        _check_mask(mask, targets)
        targets = targets.masked_fill(~mask, IGNORE_INDEX)
    temperature = options.get("temperature", 1.0)
    head = Head.of(
        *student_side,
        targets,
        bias=options.get("bias"),
        softcap=options.get("softcap"),
        temperature=temperature,
    )
    _check_tokens(teacher_side[0], hidden)
    try:
        teacher = Head.of(
            *teacher_side,
            targets,
            bias=options.get("teacher_bias"),
            softcap=options.get("teacher_softcap"),
            temperature=temperature,
        )
    except (TypeError, ValueError) as error:  # its sentence begins with the student's name for it
        raise type(error)(f"teacher_{error}") from None
    if teacher.weight.shape[0] != head.weight.shape[0]:
        raise ValueError(
            f"teacher_weight: expected {head.weight.shape[0]} rows as weight, got "
            f"{teacher.weight.shape[0]}; cut off the rows that only pad a vocabulary"
        )
    if torch.is_grad_enabled() and teacher.requires_grad():
        raise ValueError(
            "teacher_hidden, teacher_weight, teacher_bias: expected constants, got one that "
            "requires a gradient; pass them detached"
        )
    refuse_forward_mode("linear_kl", hidden=head.hidden, weight=head.weight, bias=head.bias)
    with torch.no_grad():
        lse, teacher_lse = (
            torch.ops.agro.linear_logprobs_fwd(*side, False)[1].detach()
            for side in (_constant(head), teacher)
        )
    results: tuple[Tensor, Tensor] = torch.ops.agro.divergence_fwd(
        *head, *teacher, kind, beta, lse, teacher_lse
    )
    return results[0].view(tokens)


def _constant(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return head._replace(hidden=head.hidden.detach(), weight=head.weight.detach(), bias=bias)


def _check_tokens(teacher_hidden: Tensor, hidden: Tensor) -> None:
    """Before the check of the teacher's head, which speaks of targets: nobody passed any."""
    check_tensor("teacher_hidden", teacher_hidden)
    tokens = tuple(hidden.shape[:-1])
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden: expected shape (..., D_t) with (...) = {tokens} to match hidden "
            f"{tuple(hidden.shape)}, got {tuple(teacher_hidden.shape)}; pass both models' hidden "
            "states of the same tokens"
        )
    check_device("teacher_hidden", teacher_hidden, "hidden", hidden)


def _check_mask(mask: Tensor, targets: Tensor) -> None:
    check_tensor("mask", mask)
    if mask.dtype != torch.bool or mask.shape != targets.shape:
        raise ValueError(
            f"mask: expected bool of shape {tuple(targets.shape)}, got {mask.dtype} of "
            f"{tuple(mask.shape)}; True where a token counts"
        )
