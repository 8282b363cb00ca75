"""selective_logprobs in plain torch, upcast to fp32 a few rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from agro_kernels.head import check_target_values, check_token_temperature_values
from agro_kernels.many_targets import NOTHING

# Elements of the fp32 copy that exists at a time: 16 MB, at least one row.
CHUNK_ELEMENTS = 4 * 1024 * 1024


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


def _scaled(
    chunk: Tensor, rows: slice, temperature: float, token_temperature: Tensor | None
) -> Tensor:
    """A fresh copy of the chunk in fp32 (float64 stays), divided by the temperature."""
    dtype = torch.float64 if chunk.dtype == torch.float64 else torch.float32
    scaled = chunk.to(dtype, copy=True)
    if token_temperature is not None:
        return scaled.div_(token_temperature.reshape(-1, 1)[rows].to(dtype))
    return scaled if temperature == 1.0 else scaled.div_(temperature)


def selective_logprobs_fwd(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """(logprobs, lse) of logits (..., V) and targets (...); lse is of logits / temperature."""
    v = logits.shape[-1]
    check_target_values(targets, v, ignore_index)
    check_token_temperature_values(token_temperature, targets.reshape(-1), ignore_index)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = logits.new_zeros(targets.shape, dtype=dtype)
    lse = torch.zeros_like(logprobs)
    flat_targets = targets.reshape(-1).long()
    for rows, chunk in _chunks(logits):
        z, y = _scaled(chunk, rows, temperature, token_temperature), flat_targets[rows]
        in_vocabulary = (y >= 0) & (y < v)
        z_y = z.gather(1, y.where(in_vocabulary, 0).unsqueeze(1)).squeeze(1)
        # (z_y - max) - log sum exp(z - max) keeps its digits when all logits are shifted.
        m = z.amax(1).clamp(min=-1e30)
        log_s = z.sub_(m.unsqueeze(1)).exp_().sum(1).log()
        logprob = ((z_y - m) - log_s).where(in_vocabulary, torch.nan)
        counted = y != ignore_index
        logprobs.view(-1)[rows] = logprob.where(counted, 0.0)
        lse.view(-1)[rows] = (m + log_s).where(counted, 0.0)
    return logprobs, lse


def selective_stats_fwd(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy) of logits (..., V), capped and divided, and targets (...).

    softcap 0.0 is none.
    """
    v = logits.shape[-1]
    check_target_values(targets, v, ignore_index)
    check_token_temperature_values(token_temperature, targets.reshape(-1), ignore_index)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    results = tuple(logits.new_zeros(targets.numel(), dtype=dtype) for _ in range(3))
    flat_targets = targets.reshape(-1).long()
    for rows, chunk in _chunks(logits):
        z, y = _capped(chunk, rows, temperature, token_temperature, softcap)[0], flat_targets[rows]
        in_vocabulary, counted = (y >= 0) & (y < v), y != ignore_index
        z_y = z.gather(1, y.where(in_vocabulary, 0).unsqueeze(1)).squeeze(1)
        m = z.amax(1).clamp(min=-1e30)
        # A banned token's -inf times its probability of 0 would be NaN.
        z.sub_(m.unsqueeze(1)).clamp_(min=NOTHING)
        p = z.exp()
        s = p.sum(1)
        log_s = s.log()
        logprob = ((z_y - m) - log_s).where(in_vocabulary, torch.nan)
        for result, values in zip(
            results, (logprob, m + log_s, log_s - p.mul_(z).sum(1) / s), strict=True
        ):
            result[rows] = values.where(counted, 0.0)
    logprobs, lse, entropy = (result.view(targets.shape) for result in results)
    return logprobs, lse, entropy


def selective_stats_bwd(
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    ignore_index: int,
    lse: Tensor,
    entropy: Tensor,
) -> Tensor:
    """dlogits (..., V) in the dtype of logits, by the formula of the head's backward pass."""
    v = logits.shape[-1]
    dlogits = logits.new_empty(logits.shape)
    flat = dlogits.view(-1, v)
    flat_targets, lse, entropy = targets.reshape(-1).long(), lse.reshape(-1), entropy.reshape(-1)
    zeros = torch.zeros_like(lse)
    of_target, of_lse, of_entropy = (
        zeros if upstream is None else upstream.reshape(-1).to(lse.dtype)
        for upstream in (dlogprobs, dlse, dentropy)
    )
    for rows, chunk in _chunks(logits):
        z, slope = _capped(chunk, rows, temperature, token_temperature, softcap)
        y = flat_targets[rows]
        in_vocabulary = ((y >= 0) & (y < v)).unsqueeze(1)
        column = y.unsqueeze(1).where(in_vocabulary, 0)
        at_target, of_p = of_target[rows].unsqueeze(1), of_lse[rows].unsqueeze(1)
        log_p = z.sub_(lse[rows].unsqueeze(1))
        of_entropy_p = of_entropy[rows].unsqueeze(1)
        bounded = log_p.clamp(min=NOTHING)
        p_factor = of_p - of_entropy_p * (bounded + entropy[rows].unsqueeze(1))
        p = bounded.exp_()
        # 1 - p_y from expm1: subtracting a p_y near 1 would lose its digits.
        log_p_y = log_p.gather(1, column)
        dz_y = at_target * -log_p_y.expm1() + p_factor.gather(1, column) * p.gather(1, column)
        dz = p_factor.sub_(at_target).mul_(p)
        dz.scatter_(1, column, dz_y.where(in_vocabulary, dz.gather(1, column)))
        dz.mul_(slope)
        flat[rows] = dz.masked_fill_((y == ignore_index).unsqueeze(1), 0.0)
    return dlogits


def _capped(
    chunk: Tensor,
    rows: slice,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(z, dz/dlogits) of a chunk in fp32 (float64 stays), the second (rows, 1) without a cap."""
    dtype = torch.float64 if chunk.dtype == torch.float64 else torch.float32
    inverse = torch.full((chunk.shape[0], 1), 1.0 / temperature, dtype=dtype, device=chunk.device)
    if token_temperature is not None:
        inverse = 1.0 / token_temperature.reshape(-1, 1)[rows].to(dtype)
    if softcap == 0.0:
        return _scaled(chunk, rows, temperature, token_temperature), inverse
    capped = chunk.to(dtype, copy=True).div_(softcap).tanh_()
    slope = (1.0 - capped) * (1.0 + capped) * inverse
    return _scaled(capped.mul_(softcap), rows, temperature, token_temperature), slope


def selective_logprobs_bwd(
    dlogprobs: Tensor,
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    ignore_index: int,
    lse: Tensor,
) -> Tensor:
    """dlogits (..., V) in the dtype of logits: dlogprob (1[v=y] - exp(z_v - lse)) / temperature."""
    v = logits.shape[-1]
    dlogits = logits.new_empty(logits.shape)
    flat = dlogits.view(-1, v)
    flat_targets = targets.reshape(-1).long()
    for rows, chunk in _chunks(logits):
        z, y = _scaled(chunk, rows, temperature, token_temperature), flat_targets[rows]
        upstream = dlogprobs.reshape(-1)[rows].to(z.dtype).unsqueeze(1)
        if token_temperature is not None:
            upstream = upstream / token_temperature.reshape(-1, 1)[rows].to(z.dtype)
        else:
            upstream = upstream / temperature
        in_vocabulary = ((y >= 0) & (y < v)).unsqueeze(1)
        column = y.unsqueeze(1).where(in_vocabulary, 0)
        log_p = z.sub_(lse.reshape(-1)[rows].unsqueeze(1))
        # 1 - p_y from expm1: subtracting a p_y near 1 would lose its digits.
        dz_y = upstream * -log_p.gather(1, column).expm1()
        dz = log_p.exp_().mul_(-upstream)
        dz.scatter_(1, column, dz_y.where(in_vocabulary, dz.gather(1, column)))
        flat[rows] = dz.masked_fill_((y == ignore_index).unsqueeze(1), 0.0)
    return dlogits
