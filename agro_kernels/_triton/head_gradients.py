"""Gradients of the head: the kernel that makes the gradient of the logits, and the GEMMs with it.

The logits are cut into chunks of columns (vocabulary entries), and for many tokens each of these
into chunks of rows. For each chunk one kernel recomputes the logits and writes their gradient. Two
GEMMs of cuBLAS or hipBLAS then add its part of dhidden and of dweight, both summed in fp32. dweight
is rounded once, after its last chunk of rows. Of logits that the forward pass kept there is nothing
to recompute: the same kernel reads them. Of many targets a token a small kernel then writes their
entries over those of the chunk.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from agro_kernels import tiles as configs
from agro_kernels._triton.gemm import add_product, rounded_product
from agro_kernels._triton.launch import (
    gemm_arguments,
    kept_arguments,
    programs_at_once,
    select_config,
)
from agro_kernels._triton.primitives import (
    BANNED,
    LOG2E,
    grouped_blocks,
    kept_tile,
    logits_tile,
    rounded,
)
from agro_kernels.backward import Backward
from agro_kernels.head import Head, Upstream
from agro_kernels.kept_logits import KeptLogits
from agro_kernels.many_targets import KnownEntries

# Largest size in bytes of a chunk of the logits' gradient, which has at least one tile of columns.
# Larger is faster: each chunk of columns reads and writes the fp32 dhidden.
# With COLUMN_CHUNK: chunks of 33 tiles of 256 columns, or twice or four times as many, are whole
# waves of the 132 multiprocessors of a Hopper for every number of tokens that 512 divides.
DLOGITS_CHUNK_BYTES = 528 * 2**20

# Most tokens of a chunk. With 16-bit operands that leaves 8192 columns, a shape at which both GEMMs
# are efficient: the one that sums over columns and the one that sums over tokens.
TOKEN_CHUNK = 32768

# Most columns of a chunk. It bounds the fp32 sum of the chunk's dweight: 554 MB where D is 4096.
COLUMN_CHUNK = 33792

# fp16 gradients are scaled by a power of two so that they do not underflow: the largest gradient of
# a logprob becomes this in absolute value. The entropy's gradient is at most some ten times larger,
# and the largest fp16 number is 65504.
FP16_GRADIENT_PEAK = 256.0

# Entries of a program that writes those of many targets a token.
KNOWN_BLOCK = 256

# Tokens of a program that makes the gradient of kept logits: no product, so few registers.
KEPT_BLOCK_N = 32


@triton.jit(do_not_specialize=["N", "start_chunk", "num_columns"])
def linear_logprobs_bwd_kernel(
    # inputs
    hidden, weight, bias_ptr, targets_ptr, token_temperature_ptr, kept_ptr,
    lse_ptr, entropy_ptr, dlogprobs_ptr, dlse_ptr, dentropy_ptr, dsum_ptr,
    kept_logits_ptr, kept_maxima_ptr, kept_rows_ptr,
    # outputs
    dlogits_ptr,
    # sizes and strides
    N, V, D, start_chunk, num_columns, stride_kept_logits_n, stride_kept_maxima_n,
    stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d, stride_dlogits_n,
    temperature, softcap, ignore_index,
    # constants
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    EVEN_V: tl.constexpr, EVEN_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ROUND_LOGITS: tl.constexpr, KEPT_TILE: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, BLOCK_V) tile of the gradient of hidden @ weight.T + bias.

    With the logits z, made again or, given kept_logits_ptr, those that the forward pass kept,
    p = exp(z - lse) and H the entropy:

        dz_v = dlogprob (1[v = y] - p_v) - dentropy p_v (z_v - lse + H) + dlse p_v + dsum

    times 1 / temperature and the softcap's slope, all of it in fp32 and rounded once. Upstream
    gradients that are None cost nothing. Writes dlogits (N, num_columns) for the columns
    from start_chunk on. Rows whose target is outside [0, V) become NaN, ignored rows 0.
    """
    i_n, i_v = grouped_blocks(tl.cdiv(N, BLOCK_N), tl.cdiv(num_columns, BLOCK_V), GROUP_N)
    start_n = i_n.to(tl.int64) * BLOCK_N
    start_v = start_chunk + i_v * BLOCK_V
    offs_n = tl.arange(0, BLOCK_N)
    offs_v = tl.arange(0, BLOCK_V)
    mask_n = offs_n < N - start_n
    rows = tl.minimum(offs_n, (N - 1 - start_n).to(tl.int32))  # rows past the end load the last one
    inverse_temperature = tl.full((BLOCK_N,), 1.0, tl.float32)
    if token_temperature_ptr is not None:
        inverse_temperature /= tl.load(token_temperature_ptr + start_n + rows)
    else:
        inverse_temperature /= temperature
    if kept_logits_ptr is not None:
        kept_rows = start_n + rows
        if kept_rows_ptr is not None:
            kept_rows = tl.load(kept_rows_ptr + start_n + rows)
        kept_rows_start = kept_logits_ptr + kept_rows * stride_kept_logits_n + start_v
        logits = tl.load(kept_rows_start[:, None] + offs_v[None, :]).to(tl.float32)
        maxima_start = kept_maxima_ptr + kept_rows * stride_kept_maxima_n
        for i_tile in tl.static_range(BLOCK_V // KEPT_TILE):
            maxima = tl.load(maxima_start + (start_v // KEPT_TILE + i_tile))
            of_tile = offs_v // KEPT_TILE == i_tile
            logits += tl.where(of_tile[None, :], maxima[:, None], 0.0)
        logits /= inverse_temperature[:, None]
    else:
        logits = logits_tile(
            hidden, weight, bias_ptr, start_n, start_v, N, V, D,
            stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d, softcap,
            BLOCK_N, BLOCK_V, BLOCK_D, EVEN_V, EVEN_D, DESCRIPTORS, ROUND_LOGITS,
        )  # fmt: skip
    allowed = logits
    if kept_ptr is not None:
        kept = kept_tile(kept_ptr, start_n, start_v, N, V, BLOCK_N, BLOCK_V)
        allowed = tl.where(kept, logits, BANNED)  # the softcap's slope is computed from `logits`
    targets = tl.load(targets_ptr + start_n + rows)
    lse = tl.load(lse_ptr + start_n + rows)
    log_p = allowed * inverse_temperature[:, None] - lse[:, None]
    # 32 bits: comparing every column with a 64-bit target would take twice the registers.
    in_tile = (targets >= start_v) & (targets < min(start_v + BLOCK_V, V))
    target_column = tl.where(in_tile, targets - start_v, -1).to(tl.int32)
    is_target = offs_v[None, :] == target_column[:, None]

    # dz_v = p_v (of_p + of_log_p log_p_v) + at_target 1[v = y], one number a row each.
    row_scale = tl.where((targets >= 0) & (targets < V), inverse_temperature, float("nan"))
    at_target = tl.zeros((BLOCK_N,), dtype=tl.float32)
    of_p = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if dlogprobs_ptr is not None:
        at_target = tl.load(dlogprobs_ptr + start_n + rows) * row_scale
        of_p -= at_target
    if dlse_ptr is not None:
        of_p += tl.load(dlse_ptr + start_n + rows) * row_scale
    if dentropy_ptr is not None:
        of_log_p = -tl.load(dentropy_ptr + start_n + rows) * row_scale
        of_p += of_log_p * tl.load(entropy_ptr + start_n + rows)
        dlogits = tl.exp2(log_p * LOG2E) * (of_p[:, None] + of_log_p[:, None] * log_p)
    else:
        dlogits = tl.exp2(log_p * LOG2E) * of_p[:, None]
    if dlogprobs_ptr is not None:
        dlogits = tl.where(is_target, dlogits + at_target[:, None], dlogits)
    if dsum_ptr is not None:
        dlogits += (tl.load(dsum_ptr + start_n + rows) * row_scale)[:, None]
    if softcap is not None:
        capped = logits / softcap
        dlogits *= (1.0 - capped) * (1.0 + capped)  # the slope of tanh, 1 - tanh^2
    # tl.where, not a product with 0: an ignored row may hold NaN.
    counted = targets != ignore_index
    dlogits = tl.where(counted[:, None], dlogits, 0.0)
    mask = mask_n[:, None] if EVEN_V else mask_n[:, None] & (offs_v[None, :] < V - start_v)
    tl.store(
        dlogits_ptr
        + (start_n * stride_dlogits_n + i_v * BLOCK_V)
        + (offs_n[:, None] * stride_dlogits_n + offs_v[None, :]),
        rounded(dlogits, dlogits_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit(do_not_specialize=["num_entries", "start_chunk", "num_columns"])
def write_known_entries_kernel(
    # inputs
    ids_ptr, values_ptr,
    # outputs
    dlogits_ptr,
    # sizes and strides
    num_entries, K, start_chunk, num_columns, stride_dlogits_n,
    # constants
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes values (N, K) over the entries ids (N, K) of dlogits (N, num_columns).

    The columns of dlogits are the vocabulary's from start_chunk on; other ids are left out. An id
    is at most once in a row.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_entries
    columns = tl.load(ids_ptr + offs, mask=mask, other=-1) - start_chunk
    mask &= (columns >= 0) & (columns < num_columns)
    values = tl.load(values_ptr + offs, mask=mask, other=0.0)
    tl.store(
        dlogits_ptr + (offs // K) * stride_dlogits_n + columns,
        rounded(values, dlogits_ptr.dtype.element_ty),
        mask=mask,
    )


def head_gradients(
    backward: Backward, kept_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """linear_logprobs_bwd of rows that all count; what upstream and known hold is contiguous.

    kept_rows (N,): their rows in kept_logits; None: all of them in order.
    """
    upstream, head, output_mask, weight_grad, kept_logits, known = backward
    hidden, weight = head.hidden, head.weight
    (N, D), V = hidden.shape, weight.shape[0]
    need_hidden, need_weight, need_bias = output_mask
    dbias = weight.new_zeros(V if need_bias else 0, dtype=torch.float32)
    if N == 0 or not upstream.gradients() or not any(output_mask):
        dhidden = hidden.new_zeros((N, D) if need_hidden else 0)
        dweight = weight.new_zeros((V, D) if need_weight and weight_grad is None else 0)
        return dhidden, dweight, dbias.to(weight.dtype)
    dhidden = hidden.new_empty((N, D) if need_hidden else 0, dtype=torch.float32)
    scale = None
    if hidden.dtype == torch.float16:
        scale = _fp16_scale(upstream.gradients(), head, known)
    if scale is not None:
        upstream = upstream.times(scale)
        if known is not None:
            known = known._replace(values=known.values * scale)

    config = select_config("linear_logprobs_bwd", head)
    rows_per_chunk, columns_per_chunk = chunk_shape(
        N, V, hidden.element_size(), config, programs_at_once(config, hidden)
    )
    row_chunks = _row_chunks(upstream, head, config, rows_per_chunk)
    kept_columns = 0 if kept_logits is None else kept_logits.columns
    dlogits_buffer = hidden.new_empty(rows_per_chunk, columns_per_chunk)
    weight_sum = _WeightSum(
        weight,
        weight_grad,
        scale,
        columns_per_chunk,
        needed=need_weight,
        one_sum=rows_per_chunk >= N,
    )
    with torch.cuda.device_of(hidden):
        for entries in _column_chunks(V, kept_columns, columns_per_chunk):
            start_v = entries.start
            for rows, arguments in row_chunks:
                dlogits = dlogits_buffer[: rows.stop - rows.start, : entries.stop - start_v]
                if start_v < kept_columns:
                    tile = _of_kept(config)
                    kept = _kept_arguments(tile, kept_logits, kept_rows, rows)
                    _write_dlogits(dlogits, start_v, arguments | kept, tile)
                else:
                    _write_dlogits(dlogits, start_v, arguments, config)
                if known is not None:
                    _write_known(dlogits, start_v, known.of_rows(rows))
                if need_hidden:
                    add_product(dhidden[rows], dlogits, weight[entries], keep=start_v > 0)
                if need_weight:
                    weight_sum.add(entries, dlogits, hidden[rows], first=rows.start == 0)
                if need_bias:
                    dbias[entries] += dlogits.sum(0, dtype=torch.float32)
            if need_weight:
                weight_sum.finish(entries)
    if scale is not None:
        dhidden /= scale
        dbias /= scale
    return dhidden.to(hidden.dtype), weight_sum.dweight, dbias.to(weight.dtype)


def _row_chunks(
    upstream: Upstream, head: Head, config: configs.TileConfig, size: int
) -> list[tuple[slice, dict[str, object]]]:
    """`size` rows at a time, with the kernel's arguments for them."""
    chunks = []
    for start in range(0, head.hidden.shape[0], size):
        rows = slice(start, min(start + size, head.hidden.shape[0]))
        arguments = gemm_arguments(config, head.part(rows))
        arguments |= kept_arguments()
        arguments["ignore_index"] = head.ignore_index
        for name, values in upstream._asdict().items():
            arguments[f"{name}_ptr"] = None if values is None else values[rows]
        chunks.append((rows, arguments))
    return chunks


def _column_chunks(vocabulary: int, kept_columns: int, size: int) -> Iterator[slice]:
    """At most `size` columns at a time: first the kept ones."""
    for start, stop in ((0, kept_columns), (kept_columns, vocabulary)):
        for start_v in range(start, stop, size):
            yield slice(start_v, min(start_v + size, stop))


def _of_kept(config: configs.TileConfig) -> configs.TileConfig:
    """The tile of the same kernel where it makes no product: nothing but loads and stores."""
    return replace(config, block_n=KEPT_BLOCK_N, num_warps=4, num_stages=1, descriptors=False)


def _kept_arguments(
    tile: configs.TileConfig,
    kept_logits: KeptLogits | None,
    kept_rows: Tensor | None,
    rows: slice,
) -> dict[str, object]:
    """The kernel's arguments for some rows whose logits were kept: no product, no operands."""
    return kept_arguments(kept_logits, kept_rows, rows) | {
        "hidden": None,
        "weight": None,
        "bias_ptr": None,
        "DESCRIPTORS": tile.descriptors,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _write_dlogits(
    dlogits: Tensor, start_v: int, arguments: dict[str, object], config: configs.TileConfig
) -> None:
    """Launches the kernel for the columns from start_v on; dlogits (rows, columns)."""
    num_rows, num_columns = dlogits.shape
    grid = triton.cdiv(num_rows, config.block_n) * triton.cdiv(num_columns, config.block_v)
    linear_logprobs_bwd_kernel[(grid,)](
        **arguments,
        dlogits_ptr=dlogits,
        start_chunk=start_v,
        num_columns=num_columns,
        stride_dlogits_n=dlogits.stride(0),
    )


def _write_known(dlogits: Tensor, start_v: int, known: KnownEntries) -> None:
    """Launches the kernel for the columns from start_v on; dlogits (rows, columns)."""
    ids, values = known
    write_known_entries_kernel[(triton.cdiv(ids.numel(), KNOWN_BLOCK),)](
        ids_ptr=ids,
        values_ptr=values,
        dlogits_ptr=dlogits,
        num_entries=ids.numel(),
        K=ids.shape[1],
        start_chunk=start_v,
        num_columns=dlogits.shape[1],
        stride_dlogits_n=dlogits.stride(0),
        BLOCK=KNOWN_BLOCK,
        num_warps=4,
    )


class _WeightSum:
    """The gradient of the weight, summed in fp32 over chunks of tokens.

    Where it is fp32 already and not scaled it is summed in place. Where a single chunk has all
    tokens each of its rows is one sum, which the product itself rounds. Otherwise it is summed in a
    buffer for one chunk of columns, from which it is rounded once.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_grad: Tensor | None,
        scale: Tensor | None,
        columns_per_chunk: int,
        *,
        needed: bool,
        one_sum: bool,
    ) -> None:
        (V, D), self.scale = weight.shape, scale
        self.dweight = weight.new_empty((V, D) if needed and weight_grad is None else 0)
        self.adds = weight_grad is not None
        self.total = self.dweight if weight_grad is None else weight_grad
        self.in_place = self.total.dtype == torch.float32 and scale is None
        self.at_once = one_sum and not (self.in_place or self.adds) and scale is None
        buffered = needed and not (self.in_place or self.at_once)
        buffer_rows = columns_per_chunk if buffered else 0
        self.buffer = weight.new_empty(buffer_rows, D, dtype=torch.float32)

    def add(self, entries: slice, dlogits: Tensor, hidden: Tensor, *, first: bool) -> None:
        """dlogits.T @ hidden, of the first chunk of tokens or a later one."""
        if self.at_once:
            rounded_product(self.total[entries], dlogits.T, hidden)
            return
        keep = not first or (self.in_place and self.adds)
        add_product(self._chunk(entries), dlogits.T, hidden, keep=keep)

    def finish(self, entries: slice) -> None:
        """After the last chunk of tokens."""
        if self.in_place or self.at_once:
            return
        chunk = self._chunk(entries)
        if self.scale is not None:
            chunk /= self.scale
        if self.adds:
            self.total[entries] += chunk
        else:
            self.total[entries] = chunk

    def _chunk(self, entries: slice) -> Tensor:
        return self.total[entries] if self.in_place else self.buffer[: entries.stop - entries.start]


def chunk_shape(
    num_tokens: int,
    vocabulary: int,
    itemsize: int,
    config: configs.TileConfig,
    at_once: int | None,
) -> tuple[int, int]:
    """(rows, columns) of the logits' gradient that are made at a time, both of whole tiles.

    at_once: programs that the GPU runs at once, if known: then the columns are whole waves, as far
    as that is possible.
    """
    num_chunks = triton.cdiv(num_tokens, TOKEN_CHUNK)
    rows = triton.cdiv(num_tokens, num_chunks * config.block_n) * config.block_n
    rows = min(rows, num_tokens)
    columns = min(DLOGITS_CHUNK_BYTES // (rows * itemsize), COLUMN_CHUNK)
    most = max(columns // config.block_v, 1)
    num_tiles = triton.cdiv(vocabulary, config.block_v)
    if most >= num_tiles:
        return rows, num_tiles * config.block_v
    if at_once is not None:
        most = configs.whole_waves(num_tiles, triton.cdiv(rows, config.block_n), most, at_once)
    return rows, most * config.block_v


def _fp16_scale(gradients: list[Tensor], head: Head, known: KnownEntries | None) -> Tensor:
    """The power of two, 0-d fp32 on the device, that lifts the largest gradient to the fp16 peak.

    A coefficient divided by the number of tokens is below fp16's smallest number soon; scaling by a
    power of two and back is exact. NaN and inf do not count.
    """
    largest = torch.stack([gradient.abs() for gradient in gradients]).amax(0)
    temperatures = head.token_temperature
    largest = largest / (head.temperature if temperatures is None else temperatures)
    if known is not None:
        largest = torch.maximum(largest, known.values.abs().amax(1))
    counted = (head.targets != head.ignore_index) & largest.isfinite()
    largest = largest.where(counted, 0.0).amax().clamp_min(1e-30)
    ratio = FP16_GRADIENT_PEAK / largest
    mantissa, _ = torch.frexp(ratio)
    return ratio / mantissa
