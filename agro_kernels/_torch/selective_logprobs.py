"""selective_logprobs in plain torch, upcast to fp32 a few rows at a time."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from agro_kernels.arguments import (
    check_target_values,
    check_token_temperature_values,
    results_dtype,
)
from agro_kernels.head import Upstream
from agro_kernels.logit_rows import LogitRows
from agro_kernels.many_targets import NOTHING

# Elements of the fp32 copy that exists at a time: 16 MB, at least one row.
CHUNK_ELEMENTS = 4 * 1024 * 1024


class _Chunk(NamedTuple):
    rows: slice
    """Which ones, of the N of the flattened leading axes."""
    logits: Tensor
    """(rows, V)."""
    targets: Tensor
    """(rows,) int64."""
    in_vocabulary: Tensor
    """(rows, 1) bool: whether the target is one of [0, V)."""
    column: Tensor
    """(rows, 1) int64: the target, or 0 where it is none of [0, V)."""


def _chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, logits (rows, V)) of logits (..., V), rows counting over the flattened leading axes.

    A view such as logits[:, :-1] is walked along its first axis and never copied as a whole.
    """
    size = max(1, CHUNK_ELEMENTS // max(1, logits.shape[-1]))
    if logits.dim() > 2 and not logits.is_contiguous():
        start = 0
        for part in logits.unbind(0):
            for rows, chunk in _chunks(part):
                yield slice(start + rows.start, start + rows.stop), chunk
            start += part[..., 0].numel()
        return
    flat = logits.reshape(-1, logits.shape[-1])
    for start in range(0, flat.shape[0], size):
        rows = slice(start, min(start + size, flat.shape[0]))
        yield rows, flat[rows]


def _chunks_of_targets(given: LogitRows) -> Iterator[_Chunk]:
    v, flat_targets = given.logits.shape[-1], given.targets.reshape(-1).long()
    for rows, chunk in _chunks(given.logits):
        y = flat_targets[rows]
        in_vocabulary = ((y >= 0) & (y < v)).unsqueeze(1)
        yield _Chunk(rows, chunk, y, in_vocabulary, y.unsqueeze(1).where(in_vocabulary, 0))


def _results(
    count: int, given: LogitRows, of_chunk: Callable[[_Chunk], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """`count` results in the shape of targets, fp32 (float64 of float64): of_chunk's, each
    (rows, 1), and 0 where ignored. Checks the values of targets and temperatures."""
    logits, targets, ignore_index = given.logits, given.targets, given.ignore_index
    check_target_values(targets, logits.shape[-1], ignore_index)
    check_token_temperature_values(given.token_temperature, targets.reshape(-1), ignore_index)
    dtype = results_dtype(logits)
    results = tuple(logits.new_zeros(targets.shape, dtype=dtype) for _ in range(count))
    for chunk in _chunks_of_targets(given):
        counted = (chunk.targets != ignore_index).unsqueeze(1)
        for result, values in zip(results, of_chunk(chunk), strict=True):
            result.view(-1, 1)[chunk.rows] = values.where(counted, 0.0)
    return results


def _gradient(given: LogitRows, of_chunk: Callable[[_Chunk], Tensor]) -> Tensor:
    """dlogits (..., V) in the dtype of logits: of_chunk's, (rows, V), and 0 where ignored."""
    dlogits = given.logits.new_empty(given.logits.shape)
    flat = dlogits.view(-1, dlogits.shape[-1])
    for chunk in _chunks_of_targets(given):
        ignored = chunk.targets == given.ignore_index
        flat[chunk.rows] = of_chunk(chunk).masked_fill_(ignored.unsqueeze(1), 0.0)
    return dlogits


def _temperatures(given: LogitRows, rows: slice, dtype: torch.dtype) -> float | Tensor:
    """The number, or those of some rows, (rows, 1)."""
    if given.token_temperature is None:
        return given.temperature
    return given.token_temperature.reshape(-1, 1)[rows].to(dtype)


def _scaled(given: LogitRows, chunk: Tensor, rows: slice) -> Tensor:
    """A fresh copy of the chunk in fp32 (float64 stays), divided by the temperature."""
    scaled = chunk.to(results_dtype(chunk), copy=True)
    if given.token_temperature is None and given.temperature == 1.0:
        return scaled
    return scaled.div_(_temperatures(given, rows, scaled.dtype))


def _capped(given: LogitRows, chunk: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """(z, dz/dlogits) of a chunk in fp32 (float64 stays), the second (rows, 1) without a cap."""
    dtype, softcap = results_dtype(chunk), given.softcap
    inverse = 1.0 / _temperatures(given, rows, dtype)
    if not isinstance(inverse, Tensor):
        inverse = torch.full((chunk.shape[0], 1), inverse, dtype=dtype, device=chunk.device)
    if softcap == 0.0:
        return _scaled(given, chunk, rows), inverse
    capped = chunk.to(dtype, copy=True).div_(softcap).tanh_()
    slope = (1.0 - capped) * (1.0 + capped) * inverse
    return _scaled(given, capped.mul_(softcap), rows), slope


def selective_logprobs_fwd(given: LogitRows) -> tuple[Tensor, ...]:
    """(logprobs, lse) of logits (..., V) and targets (...); lse is of logits / temperature."""

    def of_chunk(chunk: _Chunk) -> tuple[Tensor, ...]:
        z = _scaled(given, chunk.logits, chunk.rows)
        z_y = z.gather(1, chunk.column)
        # (z_y - max) - log sum exp(z - max) keeps its digits when all logits are shifted.
        m = z.amax(1, keepdim=True).clamp(min=-1e30)
        log_s = z.sub_(m).exp_().sum(1, keepdim=True).log()
        logprob = ((z_y - m) - log_s).where(chunk.in_vocabulary, torch.nan)
        return logprob, m + log_s

    return _results(2, given, of_chunk)


def selective_logprobs_bwd(dlogprobs: Tensor, given: LogitRows, lse: Tensor) -> Tensor:
    """dlogits (..., V) in the dtype of logits: dlogprob (1[v=y] - exp(z_v - lse)) / temperature."""
    dlogprobs, lse = dlogprobs.reshape(-1, 1), lse.reshape(-1, 1)

    def of_chunk(chunk: _Chunk) -> Tensor:
        z = _scaled(given, chunk.logits, chunk.rows)
        upstream = dlogprobs[chunk.rows].to(z.dtype) / _temperatures(given, chunk.rows, z.dtype)
        log_p = z.sub_(lse[chunk.rows])
        # 1 - p_y from expm1: subtracting a p_y near 1 would lose its digits.
        dz_y = upstream * -log_p.gather(1, chunk.column).expm1()
        return _with_target(log_p.exp_().mul_(-upstream), dz_y, chunk)

    return _gradient(given, of_chunk)


def _with_target(dz: Tensor, dz_y: Tensor, chunk: _Chunk) -> Tensor:
    """dz (rows, V) with dz_y (rows, 1) in the targets' columns, where there are any."""
    dz_y = dz_y.where(chunk.in_vocabulary, dz.gather(1, chunk.column))
    return dz.scatter_(1, chunk.column, dz_y)


def selective_stats_fwd(given: LogitRows) -> tuple[Tensor, ...]:
    """(logprobs, lse, entropy) of logits (..., V), capped and divided, and targets (...)."""

    def of_chunk(chunk: _Chunk) -> tuple[Tensor, ...]:
        z, _ = _capped(given, chunk.logits, chunk.rows)
        z_y = z.gather(1, chunk.column)
        m = z.amax(1, keepdim=True).clamp(min=-1e30)
        # A banned token's -inf times its probability of 0 would be NaN.
        z.sub_(m).clamp_(min=NOTHING)
        p = z.exp()
        s = p.sum(1, keepdim=True)
        log_s = s.log()
        logprob = ((z_y - m) - log_s).where(chunk.in_vocabulary, torch.nan)
        return logprob, m + log_s, log_s - p.mul_(z).sum(1, keepdim=True) / s

    return _results(3, given, of_chunk)


def selective_stats_bwd(upstream: Upstream, given: LogitRows) -> Tensor:
    """dlogits (..., V) in the dtype of logits, by the formula of the head's backward pass."""
    assert upstream.entropy is not None
    lse, entropy = upstream.lse.reshape(-1, 1), upstream.entropy.reshape(-1, 1)
    zeros = torch.zeros_like(lse)
    of_target, of_lse, of_entropy = (
        zeros if gradient is None else gradient.reshape(-1, 1).to(lse.dtype)
        for gradient in upstream[:3]
    )

    def of_chunk(chunk: _Chunk) -> Tensor:
        rows, column = chunk.rows, chunk.column
        z, slope = _capped(given, chunk.logits, rows)
        at_target = of_target[rows]
        log_p = z.sub_(lse[rows])
        bounded = log_p.clamp(min=NOTHING)
        p_factor = of_lse[rows] - of_entropy[rows] * (bounded + entropy[rows])
        p = bounded.exp_()
        # 1 - p_y from expm1: subtracting a p_y near 1 would lose its digits.
        log_p_y = log_p.gather(1, column)
        dz_y = at_target * -log_p_y.expm1() + p_factor.gather(1, column) * p.gather(1, column)
        return _with_target(p_factor.sub_(at_target).mul_(p), dz_y, chunk).mul_(slope)

    return _gradient(given, of_chunk)
