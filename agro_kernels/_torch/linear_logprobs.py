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

from agro_kernels.arguments import results_dtype
from agro_kernels.backward import Backward
from agro_kernels.counted_rows import CountedRows, counted_rows
from agro_kernels.head import Head
from agro_kernels.kept_logits import LOWEST, KeptLogits
from agro_kernels.many_targets import NOTHING, KnownEntries

# A tile of 2048 x 4096 fp32 logits is 32 MB. Below 1024 columns a GEMM on a CPU loses its speed.
TOKEN_CHUNK = 2048
VOCAB_BLOCK = 4096
# The maximum of no logits. Finite, because -inf - -inf is NaN.
LOWEST_MAX = -1e30


@dataclass(frozen=True)
class Tile:
    """The logits z of some counted rows and some vocabulary entries; reused by the next tile."""

    rows: slice  # of the M counted rows
    entries: slice  # of the V vocabulary entries
    weight: Tensor  # (columns, D), upcast
    logits: Tensor  # (rows, columns)
    in_block: Tensor  # (rows,) bool: the target is one of the columns
    column: Tensor  # (rows, 1) int64: the target's column, 0 where it is in another block
    excluded: Tensor | None  # (rows, columns) bool: not kept by the sampler; z still has a value


@dataclass(frozen=True)
class _Kept:
    """The kept logits, written and read by the numbers of the counted rows."""

    of_tokens: KeptLogits
    index: Tensor | None  # (M,) int64: which of the N tokens are counted; None: all of them

    @property
    def columns(self) -> int:
        return self.of_tokens.columns

    def write(self, rows: slice, entries: slice, below: Tensor, m: Tensor) -> None:
        """below (rows, columns): z - m, m (rows,): what is within the kept columns of them."""
        entries = slice(entries.start, min(entries.stop, self.columns))
        if entries.start >= entries.stop:
            return
        logits, maxima = self._of(entries)
        below = below[:, : entries.stop - entries.start].clamp(min=LOWEST).to(logits.dtype)
        m = m.unsqueeze(1).expand(-1, maxima.shape[1])
        if self.index is None:
            logits[rows], maxima[rows] = below, m
        else:
            logits.index_copy_(0, self.index[rows], below)
            maxima.index_copy_(0, self.index[rows], m)

    def read(self, rows: slice, entries: slice, z: Tensor) -> None:
        """Into z (rows, columns): the logits after softcap and temperature."""
        logits, maxima = self._of(entries)
        taken = rows if self.index is None else self.index[rows]
        z.copy_(logits[taken])
        maxima, tile = maxima[taken].to(z.dtype).unsqueeze(2), self.of_tokens.tile
        whole = z.shape[1] // tile  # all tiles, or all but the vocabulary's last
        z[:, : whole * tile].unflatten(1, (whole, tile)).add_(maxima[:, :whole])
        if whole < maxima.shape[1]:
            z[:, whole * tile :].add_(maxima[:, whole])

    def _of(self, entries: slice) -> tuple[Tensor, Tensor]:
        """The kept columns `entries`, which begin with a tile, and their tiles' maxima."""
        tile = self.of_tokens.tile
        tiles = slice(entries.start // tile, -(-entries.stop // tile))
        return self.of_tokens.logits[:, entries], self.of_tokens.maxima[:, tiles]


def _kept(kept_logits: KeptLogits | None, rows: CountedRows) -> _Kept | None:
    return None if kept_logits is None else _Kept(kept_logits, rows.index)


def _blocks(vocabulary: int, kept_columns: int) -> Iterator[slice]:
    """Entries at a time: first the kept ones."""
    for start, stop in ((0, kept_columns), (kept_columns, vocabulary)):
        for v0 in range(start, stop, VOCAB_BLOCK):
            yield slice(v0, min(v0 + VOCAB_BLOCK, stop))


def tiles(head: Head, kept: _Kept | None = None) -> Iterator[Tile]:
    """All tiles of the logits of a head as `upcast` makes it; those in `kept` are read there."""
    (m, _), v, dtype = head.hidden.shape, head.weight.shape[0], head.hidden.dtype
    buffer = head.hidden.new_empty(min(m, TOKEN_CHUNK) * min(v, VOCAB_BLOCK))
    kept_columns = 0 if kept is None else kept.columns
    for entries in _blocks(v, kept_columns):
        v0, columns = entries.start, entries.stop - entries.start
        weight = head.weight[entries].to(dtype)
        bias = None if head.bias is None else head.bias[entries].to(dtype)
        for n0 in range(0, m, TOKEN_CHUNK):
            rows = slice(n0, min(n0 + TOKEN_CHUNK, m))
            logits = buffer[: (rows.stop - n0) * columns].view(-1, columns)
            if kept is not None and v0 < kept_columns:
                kept.read(rows, entries, logits)
            else:
                _make_logits(head, rows, weight, bias, logits)
            column = head.targets[rows].long() - v0
            in_block = (column >= 0) & (column < columns)
            column = column.where(in_block, 0).unsqueeze(1)
            excluded = None if head.kept is None else _excluded(head.kept[rows], entries)
            yield Tile(rows, entries, weight, logits, in_block, column, excluded)


def _make_logits(
    head: Head, rows: slice, weight: Tensor, bias: Tensor | None, logits: Tensor
) -> None:
    """Into logits (rows, columns), of some rows of the weight and their bias."""
    if bias is None:
        torch.mm(head.hidden[rows], weight.T, out=logits)
    else:
        torch.addmm(bias, head.hidden[rows], weight.T, out=logits)
    if head.round_logits is not None:
        logits.copy_(logits.to(head.round_logits))
    if head.softcap > 0.0:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    if head.token_temperature is not None:
        logits.div_(head.token_temperature[rows].unsqueeze(1))
    elif head.temperature != 1.0:
        logits.div_(head.temperature)


def _excluded(kept: Tensor, entries: slice) -> Tensor:
    """(rows, columns) bool: the bits of `kept` (rows, ceil(V / 32)) that are not set."""
    words = kept[:, entries.start // 32 : -(-entries.stop // 32)]
    bits = words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=kept.device)
    first = entries.start % 32
    columns = slice(first, first + entries.stop - entries.start)
    return ((bits & 1) == 0).flatten(1)[:, columns]


def upcast(head: Head) -> Head:
    """With hidden and token_temperature in the dtype of the computation, fp32 or float64."""
    dtype = results_dtype(head.hidden)
    temperatures = head.token_temperature
    return head._replace(
        hidden=head.hidden.to(dtype),
        token_temperature=None if temperatures is None else temperatures.to(dtype),
    )


# --- Forward --------------------------------------------------------------------------------------


def linear_logprobs_fwd(
    head: Head, with_entropy: bool, kept_logits: KeptLogits | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), each (N,) fp32; entropy is (0,) unless with_entropy.

    Writes the counted rows of kept_logits.
    """
    head.check_values()
    rows = counted_rows(head, head.counted())
    kept = _kept(kept_logits, rows)
    logprobs, lse, entropy = _statistics(upcast(rows.head), with_entropy, kept)
    if with_entropy:
        entropy = rows.put_back(entropy)
    return rows.put_back(logprobs), rows.put_back(lse), entropy


def _statistics(
    head: Head, with_entropy: bool, kept: _Kept | None
) -> tuple[Tensor, Tensor, Tensor]:
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
    for tile in tiles(head):
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
        if kept is not None:
            kept.write(rows, tile.entries, z, m_new)
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


class GradientSums:
    """dhidden, dweight and dbias of M rows that all count, summed over tiles in their order.

    With weight_grad (V, D) the weight's gradient is added to it and dweight is (0,).
    """

    def __init__(self, head: Head, output_mask: list[bool], weight_grad: Tensor | None) -> None:
        need_hidden, need_weight, need_bias = output_mask
        weight, (m, d) = head.weight, head.hidden.shape
        own = need_weight and weight_grad is None
        self.hidden = head.hidden
        self.dhidden = head.hidden.new_empty((m, d) if need_hidden else 0)
        self.dweight = weight.new_empty(weight.shape if own else 0)
        self.dbias = head.hidden.new_zeros(weight.shape[0] if need_bias else 0)
        self.weight_grad = weight_grad if need_weight else None
        self.need_hidden, self.need_weight, self.need_bias = need_hidden, own, need_bias
        self.block_sums = self.dweight  # of the block of entries that is being summed
        if m == 0:
            self.dweight.zero_()  # there is no tile that would write it

    def add(self, tile: Tile, dz: Tensor) -> None:
        """dz (rows, columns): the gradient of hidden @ weight.T + bias."""
        rows, (m, _) = tile.rows, self.hidden.shape
        if self.need_hidden:
            self.dhidden[rows].addmm_(dz, tile.weight, beta=0 if tile.entries.start == 0 else 1)
        if self.weight_grad is not None:
            self.weight_grad[tile.entries].addmm_(dz.T, self.hidden[rows])
        elif self.need_weight:
            block = self.dweight[tile.entries]
            if rows.start == 0:
                same = block.dtype == dz.dtype
                self.block_sums = block if same else dz.new_empty(block.shape)
            self.block_sums.addmm_(dz.T, self.hidden[rows], beta=0 if rows.start == 0 else 1)
            if rows.stop == m and block.dtype != dz.dtype:
                block.copy_(self.block_sums)
        if self.need_bias:
            self.dbias[tile.entries] += dz.sum(0)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dhidden fp32, dweight, dbias); (0,) for each that was not asked for."""
        return self.dhidden, self.dweight, self.dbias.to(self.dweight.dtype)


def softcap_slope(head: Head, tile: Tile) -> Tensor | None:
    """dz/dx times the temperature, of a tile's logits as they are: 1 - tanh(x / softcap)^2.

    None without a softcap: it is 1.
    """
    if head.softcap == 0.0:
        return None
    temperatures = head.token_temperature
    t = head.temperature if temperatures is None else temperatures[tile.rows].unsqueeze(1)
    return tile.logits.mul(t).div_(head.softcap).square_().neg_().add_(1.0)


def linear_logprobs_bwd(backward: Backward) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias)."""
    head, known = backward.head, backward.known
    rows = counted_rows(head, head.counted())
    counted = upcast(rows.head)
    of_rows = backward._replace(
        upstream=backward.upstream.each(lambda values: rows.take(values).to(counted.hidden.dtype)),
        head=counted,
        known=None if known is None else known.each(rows.take),
    )
    dhidden, dweight, dbias = _gradients(of_rows, _kept(backward.kept_logits, rows))
    # The only rounding: the sums above are fp32.
    dhidden = dhidden.to(head.hidden.dtype)
    return rows.put_back(dhidden) if backward.output_mask[0] else dhidden, dweight, dbias


def _gradients(backward: Backward, kept: _Kept | None) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden fp32, dweight, dbias) of M rows that all count, from logits kept or made again.

    With l_v = z_v - lse and p_v = exp(l_v):
    dz_v = dlogprob (1[v=y] - p_v) - dentropy p_v (l_v + entropy) + dlse p_v + dsum, times dz/dx for
    the product x = hidden @ weight.T + bias that z was made of.
    """
    upstream, head, output_mask, weight_grad, _, known = backward
    sums = GradientSums(head, output_mask, weight_grad)
    if not any(output_mask):
        return sums.results()
    # Without a softcap dz/dx is 1 / temperature, one number a row: the upstream gradients take it.
    temperatures = head.token_temperature
    inverse = 1.0 / (head.temperature if temperatures is None else temperatures)
    dlogprobs, dlse, dentropy, lse, entropy, dsum = upstream
    zeros = torch.zeros_like(lse)
    at_target = zeros if dlogprobs is None else dlogprobs * inverse
    of_p = (zeros if dlse is None else dlse * inverse) - at_target
    of_entropy = None if dentropy is None else dentropy * inverse
    of_all = None if dsum is None else dsum * inverse
    for tile in tiles(head, kept):
        rows, z = tile.rows, tile.logits
        slope = softcap_slope(head, tile)
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
        if of_all is not None:
            dz.add_(of_all[rows].unsqueeze(1))
        if slope is not None:
            dz.mul_(slope)
        if known is not None:
            _overwrite(dz, tile, known)
        sums.add(tile, dz)
    return sums.results()


def mean_logits(head: Head) -> Tensor:
    """(N,): the mean over the vocabulary of each counted row's logits; 0 where ignored.

    It is the logit of the mean row of the weight, 2 N D operations, unless something comes between
    the product and the sum: a softcap or a rounding, with which it is another pass.
    """
    dtype, v = results_dtype(head.hidden), head.weight.shape[0]
    if head.softcap > 0.0 or head.round_logits is not None:
        rows = counted_rows(head, head.counted())
        counted = upcast(rows.head)
        sums = counted.hidden.new_zeros(counted.targets.shape)
        for tile in tiles(counted):
            sums[tile.rows] += tile.logits.sum(1)
        return rows.put_back(sums / v)
    means = (head.hidden.to(dtype) * head.weight.mean(0, dtype=dtype)).sum(1)
    if head.bias is not None:
        means = means + head.bias.mean(dtype=dtype)
    temperatures = head.token_temperature
    means = means / (head.temperature if temperatures is None else temperatures.to(dtype))
    return means.where(head.counted(), 0.0)


def _overwrite(dz: Tensor, tile: Tile, known: KnownEntries) -> None:
    """The entries that are in the tile, over those of dz (rows, columns)."""
    ids, values = known.of_rows(tile.rows)
    inside = (ids >= tile.entries.start) & (ids < tile.entries.stop)
    row, place = inside.nonzero(as_tuple=True)
    dz[row, ids[row, place] - tile.entries.start] = values[row, place]


# --- Log-probs where lse is known -----------------------------------------------------------------


def target_logprobs(head: Head, lse: Tensor) -> Tensor:
    """(N,) target logit - lse: N D operations, for callers that have lse (N,) from before."""
    head.check_values()
    _, logprobs = many_target_logprobs(head, head.targets.unsqueeze(1), lse)
    return logprobs.squeeze(1)


def many_target_logprobs(head: Head, targets: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, logits - lse) of targets (N, K), (N, K) each: N K D operations.

    The head's own targets are not looked at. Logits are those after softcap and temperature; of an
    id that the sampler did not keep the second is -inf, of one outside the vocabulary NaN; of an
    ignored one both are 0, whatever its token's hidden states hold.
    """
    dtype, v, (n, k) = lse.dtype, head.weight.shape[0], targets.shape
    inside = (targets >= 0) & (targets < v)
    ids = targets.where(inside, 0).long()
    logits = lse.new_empty(n, k)
    size = max(1, TOKEN_CHUNK // k)
    for n0 in range(0, n, size):
        rows = slice(n0, n0 + size)
        of_targets = head.weight.index_select(0, ids[rows].reshape(-1)).to(dtype)
        products = head.hidden[rows].to(dtype).unsqueeze(1) * of_targets.unflatten(0, (-1, k))
        torch.sum(products, 2, out=logits[rows])
    if head.bias is not None:
        logits += head.bias[ids].to(dtype)
    if head.round_logits is not None:
        logits = logits.to(head.round_logits).to(dtype)
    if head.softcap > 0.0:
        logits = head.softcap * (logits / head.softcap).tanh()
    temperatures = head.token_temperature
    logits = logits / (
        head.temperature if temperatures is None else temperatures.to(dtype).unsqueeze(1)
    )
    allowed = logits
    if head.kept is not None:
        words = head.kept.gather(1, ids // 32)
        allowed = logits.where((words >> (ids % 32)) & 1 != 0, -torch.inf)
    logprobs = (allowed - lse.unsqueeze(1)).where(inside, torch.nan)
    counted = targets != head.ignore_index
    return logits.where(counted, 0.0), logprobs.where(counted, 0.0)
