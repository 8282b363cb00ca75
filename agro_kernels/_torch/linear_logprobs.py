"""linear_logprobs in blocked plain torch, on any device and in any dtype.

The logits exist one tile at a time: TOKEN_CHUNK rows by VOCAB_BLOCK columns, fp32. The vocabulary
is the outer loop, so a block of the weight is upcast once and its gradient is written once. Blocks
are visited in a fixed order that depends on V only. Rows with an ignored target are dropped first;
what they hold is never read.

Letters: N tokens, M of them counted, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from agro_kernels.head import check_target_values, check_token_temperature_values

# A tile of 2048 x 4096 fp32 logits is 32 MB. Below 1024 columns a GEMM on a CPU loses its speed.
TOKEN_CHUNK = 2048
VOCAB_BLOCK = 4096
# exp(-1000) is 0 in fp32 and in float64. Banned tokens (logit -inf) are lifted to it where a
# product with their probability follows: 0 * -1000 is 0, 0 * -inf is NaN.
NOTHING = -1000.0
# Stands for "no logit yet". Finite, because -inf - -inf is NaN.
LOWEST_MAX = -1e30


@dataclass(frozen=True)
class _Tile:
    """The logits z of some counted rows and some vocabulary entries; reused by the next tile."""

    rows: slice  # of the M counted rows
    entries: slice  # of the V vocabulary entries
    weight: Tensor  # (columns, D), upcast
    logits: Tensor  # (rows, columns)
    in_block: Tensor  # (rows,) bool: the target is one of the columns
    column: Tensor  # (rows, 1) int64: the target's column, 0 where it is in another block
    excluded: Tensor | None  # (rows, columns) bool: not kept by the sampler; z still has a value


@dataclass(frozen=True)
class _Head:
    """The inputs of a head op, reduced to the rows that count."""

    index: Tensor | None  # (M,) int64: which of the N rows count; None when all do
    hidden: Tensor  # (M, D) fp32 or float64
    targets: Tensor  # (M,)
    weight: Tensor  # (V, D) as given
    bias: Tensor | None  # (V,) as given
    temperature: float | Tensor  # float or (M, 1)
    softcap: float  # 0.0 is none
    round_logits: torch.dtype | None
    kept: Tensor | None  # (M, ceil(V / 32)) int32

    def take(self, values: Tensor) -> Tensor:
        """(N,) -> (M,) in the dtype of the computation."""
        values = values if self.index is None else values.index_select(0, self.index)
        return values.to(self.hidden.dtype)

    def put_back(self, values: Tensor, n: int) -> Tensor:
        """(M, ...) -> (N, ...), zeros in the rows that do not count."""
        if self.index is None:
            return values
        return values.new_zeros(n, *values.shape[1:]).index_copy_(0, self.index, values)

    def tiles(self) -> Iterator[_Tile]:
        (m, _), v, dtype = self.hidden.shape, self.weight.shape[0], self.hidden.dtype
        buffer = self.hidden.new_empty(min(m, TOKEN_CHUNK) * min(v, VOCAB_BLOCK))
        for v0 in range(0, v, VOCAB_BLOCK):
            entries = slice(v0, min(v0 + VOCAB_BLOCK, v))
            columns = entries.stop - v0
            weight = self.weight[entries].to(dtype)
            bias = None if self.bias is None else self.bias[entries].to(dtype)
            for n0 in range(0, m, TOKEN_CHUNK):
                rows = slice(n0, min(n0 + TOKEN_CHUNK, m))
                logits = buffer[: (rows.stop - n0) * columns].view(-1, columns)
                if bias is None:
                    torch.mm(self.hidden[rows], weight.T, out=logits)
                else:
                    torch.addmm(bias, self.hidden[rows], weight.T, out=logits)
                if self.round_logits is not None:
                    logits.copy_(logits.to(self.round_logits))
                if self.softcap > 0.0:
                    logits.div_(self.softcap).tanh_().mul_(self.softcap)
                if isinstance(self.temperature, Tensor):
                    logits.div_(self.temperature[rows])
                elif self.temperature != 1.0:
                    logits.div_(self.temperature)
                column = self.targets[rows].long() - v0
                in_block = (column >= 0) & (column < columns)
                column = column.where(in_block, 0).unsqueeze(1)
                excluded = None if self.kept is None else _excluded(self.kept[rows], entries)
                yield _Tile(rows, entries, weight, logits, in_block, column, excluded)


def _excluded(kept: Tensor, entries: slice) -> Tensor:
    """(rows, columns) bool: the bits of `kept` (rows, ceil(V / 32)) that are not set."""
    words = kept[:, entries.start // 32 : -(-entries.stop // 32)]
    bits = words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=kept.device)
    first = entries.start % 32
    columns = slice(first, first + entries.stop - entries.start)
    return ((bits & 1) == 0).flatten(1)[:, columns]


def _head(
    counted: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    round_logits: torch.dtype | None,
    kept: Tensor | None,
) -> _Head:
    """The rows of the (N,) mask `counted`."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    index = counted.nonzero().squeeze(1)
    if index.shape[0] < hidden.shape[0]:
        hidden, targets = hidden.index_select(0, index), targets.index_select(0, index)
        if token_temperature is not None:
            token_temperature = token_temperature.index_select(0, index)
        kept = None if kept is None else kept.index_select(0, index)
    return _Head(
        index=index if index.shape[0] < counted.shape[0] else None,
        hidden=hidden.to(dtype),
        targets=targets,
        weight=weight,
        bias=bias,
        temperature=temperature
        if token_temperature is None
        else token_temperature.to(dtype).unsqueeze(1),
        softcap=softcap,
        round_logits=round_logits,
        kept=kept,
    )


# --- Forward --------------------------------------------------------------------------------------


def linear_logprobs_fwd(
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
    """(logprobs, lse, entropy), each (N,) fp32; entropy is (0,) unless with_entropy."""
    check_target_values(targets, weight.shape[0], ignore_index)
    check_token_temperature_values(token_temperature, targets, ignore_index)
    head = _head(
        targets != ignore_index,
        hidden,
        weight,
        targets,
        bias,
        temperature,
        token_temperature,
        softcap,
        round_logits,
        kept,
    )
    logprobs, lse, entropy = _statistics(head, with_entropy)
    n = hidden.shape[0]
    return (
        head.put_back(logprobs, n),
        head.put_back(lse, n),
        head.put_back(entropy, n) if with_entropy else entropy,
    )


def _statistics(head: _Head, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy) of the counted rows, online over the vocabulary.

    With m the largest logit so far, s = sum exp(z - m) and e = sum exp(z - m) (z - m):
    a larger m' turns e into (e + (m - m') s) exp(m - m') and s into s exp(m - m'). In the end
    logprob = (z_y - m) - log s, lse = m + log s and entropy = log s - e / s, none of which loses
    digits when all logits are shifted by a constant.
    """
    m = head.hidden.new_full(head.targets.shape, LOWEST_MAX)
    s = torch.zeros_like(m)
    e = torch.zeros_like(m) if with_entropy else m.new_empty(0)
    target_logits = torch.full_like(m, torch.nan)  # stays NaN for a target outside the vocabulary
    for tile in head.tiles():
        rows, z = tile.rows, tile.logits
        if tile.excluded is not None:
            z.masked_fill_(tile.excluded, -torch.inf)
        target_logits[rows] = (
            z.gather(1, tile.column).squeeze(1).where(tile.in_block, target_logits[rows])
        )
        m_new = torch.maximum(m[rows], z.amax(1))
        shift = m[rows] - m_new
        rescale = shift.exp()
        z.sub_(m_new.unsqueeze(1))
        if with_entropy:
            z.clamp_(min=NOTHING)
            p = z.exp()
            e[rows] = (e[rows] + shift * s[rows]) * rescale + p.mul(z).sum(1)
        else:
            p = z.exp_()
        s[rows] = s[rows] * rescale + p.sum(1)
        m[rows] = m_new
    log_s = s.log()
    return (target_logits - m) - log_s, m + log_s, log_s - e / s if with_entropy else e


# --- Backward -------------------------------------------------------------------------------------


def linear_logprobs_bwd(
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
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) in the dtypes of their tensors; (0,) where output_mask is False.

    With weight_grad (V, D), fp32 or float64, the weight's gradient is added to it instead and
    dweight is (0,).
    """
    head = _head(
        targets != ignore_index,
        hidden,
        weight,
        targets,
        bias,
        temperature,
        token_temperature,
        softcap,
        round_logits,
        kept,
    )
    dhidden, dweight, dbias = _gradients(
        head,
        None if dlogprobs is None else head.take(dlogprobs),
        None if dlse is None else head.take(dlse),
        None if dentropy is None else head.take(dentropy),
        head.take(lse),
        None if dentropy is None else head.take(entropy),
        output_mask,
        weight_grad=weight_grad,
    )
    return _as_given(head, dhidden, hidden), dweight, dbias


def _as_given(head: _Head, dhidden: Tensor, hidden: Tensor) -> Tensor:
    """The fp32 gradient of the counted rows as one of `hidden`, rounded once."""
    if dhidden.dim() == 1:  # not asked for
        return hidden.new_empty(0)
    return head.put_back(dhidden.to(hidden.dtype), hidden.shape[0])


def _gradients(
    head: _Head,
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    output_mask: list[bool],
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden fp32, dweight, dbias) from logits computed again.

    The upstream gradients, lse and entropy are (M,) or None.

    With l_v = z_v - lse and p_v = exp(l_v):
    dz_v = dlogprob (1[v=y] - p_v) - dentropy p_v (l_v + entropy) + dlse p_v, times dz/dx for the
    product x = hidden @ weight.T + bias that z was made of.
    """
    need_hidden, need_weight, need_bias = output_mask
    weight, (m, d), dtype = head.weight, head.hidden.shape, head.hidden.dtype
    dhidden = head.hidden.new_empty((m, d) if need_hidden else 0)
    dweight = weight.new_empty(weight.shape if need_weight and weight_grad is None else 0)
    dbias = head.hidden.new_zeros(weight.shape[0] if need_bias else 0)
    if m == 0:
        dweight.zero_()  # no tile is going to write it
    if not any(output_mask):
        return dhidden, dweight, dbias
    # Without a softcap dz/dx is 1 / temperature, one number a row: it goes into the upstream.
    inverse = 1.0 / head.temperature
    inverse = inverse.squeeze(1) if isinstance(inverse, Tensor) else inverse
    zeros = torch.zeros_like(lse)
    at_target = zeros if dlogprobs is None else dlogprobs * inverse
    of_p = (zeros if dlse is None else dlse * inverse) - at_target
    of_entropy = None if dentropy is None else dentropy * inverse
    for tile in head.tiles():
        rows, z = tile.rows, tile.logits
        slope = None
        if head.softcap > 0.0:  # d softcap tanh(x / softcap) / dx = 1 - tanh(x / softcap)^2
            t = head.temperature[rows] if isinstance(head.temperature, Tensor) else head.temperature
            slope = z.mul(t).div_(head.softcap).square_().neg_().add_(1.0)
        if tile.excluded is not None:
            z.masked_fill_(tile.excluded, -torch.inf)
        log_p = z.sub_(lse[rows].unsqueeze(1))
        log_p_y = log_p.gather(1, tile.column).squeeze(1)
        # 1 - p_y from expm1: subtracting a p_y near 1 would lose its digits.
        dz_y = at_target[rows] * -log_p_y.expm1()
        p_y_factor = of_p[rows] + at_target[rows]
        if of_entropy is None or entropy is None:
            dz = log_p.exp_().mul_(of_p[rows].unsqueeze(1))
        else:
            log_p_y = log_p_y.clamp(min=NOTHING)
            p_y_factor = p_y_factor - of_entropy[rows] * (log_p_y + entropy[rows])
            p = log_p.clamp_(min=NOTHING).exp()
            dz = log_p.add_(entropy[rows].unsqueeze(1)).mul_(-of_entropy[rows].unsqueeze(1))
            dz.add_(of_p[rows].unsqueeze(1)).mul_(p)
        dz_y += p_y_factor * log_p_y.exp()
        dz_y = dz_y.where(tile.in_block, dz.gather(1, tile.column).squeeze(1))
        dz.scatter_(1, tile.column, dz_y.unsqueeze(1))
        if slope is not None:
            dz.mul_(slope)
        if need_hidden:
            dhidden[rows].addmm_(dz, tile.weight, beta=0 if tile.entries.start == 0 else 1)
        if need_weight and weight_grad is not None:
            weight_grad[tile.entries].addmm_(dz.T, head.hidden[rows])
        elif need_weight:
            block = dweight[tile.entries]
            if rows.start == 0:
                sums = block if block.dtype == dtype else dz.new_empty(block.shape)
            sums.addmm_(dz.T, head.hidden[rows], beta=0 if rows.start == 0 else 1)
            if rows.stop == m and block.dtype != dtype:
                block.copy_(sums)
        if need_bias:
            dbias[tile.entries] += dz.sum(0)
    return dhidden, dweight, dbias.to(weight.dtype)


# --- Log-probs where lse is known -----------------------------------------------------------------


def target_logprobs(
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
) -> Tensor:
    """(N,) target logit - lse: N D operations, for callers that have lse (N,) from before."""
    check_target_values(targets, weight.shape[0], ignore_index)
    check_token_temperature_values(token_temperature, targets, ignore_index)
    dtype, v = lse.dtype, weight.shape[0]
    counted = targets != ignore_index
    inside = (targets >= 0) & (targets < v)
    ids = targets.where(inside, 0).long()
    logits = lse.new_empty(lse.shape)
    for n0 in range(0, hidden.shape[0], TOKEN_CHUNK):
        rows = slice(n0, n0 + TOKEN_CHUNK)
        of_targets = weight.index_select(0, ids[rows]).to(dtype)
        torch.sum(hidden[rows].to(dtype) * of_targets, 1, out=logits[rows])
    if bias is not None:
        logits += bias.index_select(0, ids).to(dtype)
    if round_logits is not None:
        logits = logits.to(round_logits).to(dtype)
    if softcap > 0.0:
        logits = softcap * (logits / softcap).tanh()
    logits = logits / (temperature if token_temperature is None else token_temperature.to(dtype))
    if kept is not None:
        word = kept.gather(1, (ids // 32).unsqueeze(1)).squeeze(1)
        logits = logits.where((word >> (ids % 32)) & 1 != 0, -torch.inf)
    logprobs = (logits - lse).where(inside, torch.nan)
    return logprobs.where(counted, 0.0)
