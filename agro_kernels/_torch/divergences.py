"""KL and Jensen-Shannon divergences of two heads in blocked plain torch, on any device.

With the student's logits z, p = softmax(z), and the teacher's q over the same vocabulary:

    forward   D = KL(q, p) = sum_v q (log q - log p)
              dD/dz = p - q
    reverse   D = KL(p, q)
              dD/dz = p (log p - log q - D)
    JSD       D = beta KL(q, m) + (1 - beta) KL(p, m),  m = beta q + (1 - beta) p
              dD/dz = (1 - beta) p (log p - log m - KL(p, m))

Both heads' logits exist one tile at a time. A term whose probability is 0 is 0.

Letters: N tokens, M of them counted.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

from agro_kernels._torch.linear_logprobs import GradientSums, softcap_slope, tiles, upcast
from agro_kernels.counted_rows import counted_rows
from agro_kernels.head import Head


class Kind(IntEnum):
    """Which divergence."""

    FORWARD = 0
    REVERSE = 1
    JSD = 2


def divergence_fwd(
    head: Head, teacher: Head, kind: int, beta: float, lse: Tensor, teacher_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """(divergence (N,), inner (N,)); inner is what the backward pass subtracts, see above.

    lse, teacher_lse (N,): those of the two heads, whose targets say which tokens count.
    """
    rows = counted_rows(head, head.counted())
    of_teacher = counted_rows(teacher, head.counted()).head
    lse, teacher_lse = rows.take(lse), rows.take(teacher_lse)
    divergence = torch.zeros_like(lse)
    inner = torch.zeros_like(lse)
    for tile, other in zip(tiles(upcast(rows.head)), tiles(upcast(of_teacher)), strict=True):
        log_p = tile.logits.sub_(lse[tile.rows].unsqueeze(1))
        log_q = other.logits.sub_(teacher_lse[tile.rows].unsqueeze(1)).to(log_p.dtype)
        if kind == Kind.FORWARD:
            divergence[tile.rows] += _terms(log_q, log_p)
        elif kind == Kind.REVERSE:
            divergence[tile.rows] += _terms(log_p, log_q)
        else:
            log_m = _log_mixture(log_p, log_q, beta)
            of_student = _terms(log_p, log_m)
            inner[tile.rows] += of_student
            divergence[tile.rows] += beta * _terms(log_q, log_m) + (1.0 - beta) * of_student
    if kind == Kind.REVERSE:
        inner = divergence.clone()
    return rows.put_back(divergence), rows.put_back(inner)


def divergence_bwd(
    upstream: Tensor,
    head: Head,
    teacher: Head,
    kind: int,
    beta: float,
    inner: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) of the student in the dtypes of its tensors, for upstream (N,)."""
    rows = counted_rows(head, head.counted())
    of_teacher = counted_rows(teacher, head.counted()).head
    student = upcast(rows.head)
    sums = GradientSums(student, output_mask, None)
    lse, teacher_lse, inner = (rows.take(values) for values in (lse, teacher_lse, inner))
    temperatures = student.token_temperature
    scale = rows.take(upstream).to(lse.dtype)
    scale = scale / (student.temperature if temperatures is None else temperatures)
    for tile, other in zip(tiles(student), tiles(upcast(of_teacher)), strict=True):
        slope = softcap_slope(student, tile)
        log_p = tile.logits.sub_(lse[tile.rows].unsqueeze(1))
        log_q = other.logits.sub_(teacher_lse[tile.rows].unsqueeze(1)).to(log_p.dtype)
        if kind == Kind.FORWARD:
            dz = log_p.exp() - log_q.exp()
        else:
            log_other = log_q if kind == Kind.REVERSE else _log_mixture(log_p, log_q, beta)
            p = log_p.exp()
            ratio = (log_p - log_other).where(p > 0, 0.0)
            dz = p * (ratio - inner[tile.rows].unsqueeze(1))
            if kind == Kind.JSD:
                dz.mul_(1.0 - beta)
        dz.mul_(scale[tile.rows].unsqueeze(1))
        if slope is not None:
            dz.mul_(slope)
        sums.add(tile, dz)
    dhidden, dweight, dbias = sums.results()
    dhidden = dhidden.to(head.hidden.dtype)
    return rows.put_back(dhidden) if output_mask[0] else dhidden, dweight, dbias


def _terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """(rows,) of (rows, columns): sum a (log a - log b)."""
    a = log_a.exp()
    return (a * (log_a - log_b)).where(a > 0, 0.0).sum(1)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p), for beta between 0 and 1."""
    return torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
