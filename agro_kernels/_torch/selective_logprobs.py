"""selective_logprobs in plain torch, upcast to fp32 a few rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from agro_kernels.head import check_target_values, check_token_temperature_values

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
