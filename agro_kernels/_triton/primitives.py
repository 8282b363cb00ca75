"""Device functions that more than one kernel uses."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Whether Triton's interpreter runs the kernels: `triton.jit` asks the same, once, where it stands.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Stands for -inf: the logit of a banned token or past the end of the vocabulary, and the maximum of
# no logits. It is finite so that exp2(BANNED - m) and 0 * BANNED are 0, where -inf would give NaN.
BANNED = tl.constexpr(-1e30)


@triton.jit
def grouped_blocks(num_blocks_n, num_blocks_v, GROUP_N: tl.constexpr):
    """(row block, column block) of this program, both int32.

    GROUP_N row blocks run over all column blocks before the next GROUP_N begin, rows fastest, so
    that programs alive together form a near-square patch and share their operands in L2.
    """
    i_program = tl.program_id(0)
    i_group = i_program // (GROUP_N * num_blocks_v)
    first = i_group * GROUP_N
    rows = tl.minimum(num_blocks_n - first, GROUP_N)
    i_in_group = i_program - i_group * GROUP_N * num_blocks_v
    return first + i_in_group % rows, i_in_group // rows


@triton.jit
def tanh(x):
    """tanh(x), x fp32, to fp32 accuracy everywhere.

    sign(x) (1 - e) / (1 + e) with e = exp(-2|x|). 1 - e cancels near zero, so below 1/4 it is the
    Taylor series, whose next term is 1e-8 of the sum there.
    """
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    near = 62.0 / 2835.0
    near = near * x2 - 17.0 / 315.0
    near = near * x2 + 2.0 / 15.0
    near = near * x2 - 1.0 / 3.0
    near = x + x * x2 * near
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x, fp32, to the nearest number of a dtype, ties to even; of that dtype."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        # Triton's interpreter truncates; here the bits that it drops are zeros already.
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def logits_tile(
    hidden, weight, bias_ptr, start_n, start_v, N, V, D,
    stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_V: tl.constexpr, EVEN_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ROUND_LOGITS: tl.constexpr,
):  # fmt: skip
    """softcap * tanh(round(hidden @ weight.T + bias) / softcap), (BLOCK_N, BLOCK_V) fp32.

    The tile begins at row start_n (int64) and token start_v. With DESCRIPTORS hidden and weight are
    tensor descriptors with blocks (BLOCK_N, BLOCK_D) and (BLOCK_V, BLOCK_D), else pointers. Rows
    and columns past the end hold numbers without meaning. bias_ptr, softcap and ROUND_LOGITS (a
    16-bit dtype) may be None. A bias of -inf gives BANNED, or -softcap if there is one.
    Products of fp32 operands are fp32's, which Triton would round to tf32 unless told not to.
    """
    offs_v = tl.arange(0, BLOCK_V)
    # Columns past the end load the last one, as rows do below, so that the loads of the main loop
    # need no mask for them.
    columns = offs_v if EVEN_V else tl.minimum(offs_v, V - 1 - start_v)
    logits = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if DESCRIPTORS:
        row = start_n.to(tl.int32)
        for start_d in range(0, D, BLOCK_D):
            hidden_tile = hidden.load([row, start_d])
            weight_tile = weight.load([start_v, start_d]).T
            if INTERPRETED:
                # Triton's interpreter would multiply the bit patterns of bf16 operands.
                hidden_tile, weight_tile = hidden_tile.to(tl.float32), weight_tile.to(tl.float32)
            logits = tl.dot(hidden_tile, weight_tile, logits, input_precision="ieee")
    else:
        offs_d = tl.arange(0, BLOCK_D)
        rows = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - start_n).to(tl.int32))
        # The tile's corner in int64; the offsets inside the tile fit int32.
        hidden_ptrs = (
            hidden
            + start_n * stride_hidden_n
            + (rows[:, None] * stride_hidden_n + offs_d[None, :] * stride_hidden_d)
        )
        weight_ptrs = (
            weight
            + tl.cast(start_v, tl.int64) * stride_weight_v
            + (columns[None, :] * stride_weight_v + offs_d[:, None] * stride_weight_d)
        )
        for start_d in range(0, D, BLOCK_D):
            if EVEN_D:
                hidden_tile = tl.load(hidden_ptrs)
                weight_tile = tl.load(weight_ptrs)
            else:
                mask_d = offs_d < D - start_d
                hidden_tile = tl.load(hidden_ptrs, mask=mask_d[None, :], other=0.0)
                weight_tile = tl.load(weight_ptrs, mask=mask_d[:, None], other=0.0)
            if INTERPRETED:
                hidden_tile, weight_tile = hidden_tile.to(tl.float32), weight_tile.to(tl.float32)
            logits = tl.dot(hidden_tile, weight_tile, logits, input_precision="ieee")
            hidden_ptrs += BLOCK_D * stride_hidden_d
            weight_ptrs += BLOCK_D * stride_weight_d
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + start_v + columns)[None, :].to(tl.float32)
    if ROUND_LOGITS is not None:
        logits = rounded(logits, ROUND_LOGITS).to(tl.float32)
    if softcap is not None:
        logits = softcap * tanh(logits / softcap)
    elif bias_ptr is not None:
        logits = tl.where(logits < BANNED, BANNED, logits)  # keeps NaN, unlike a maximum
    return logits


@triton.jit
def kept_tile(kept_ptr, start_n, start_v, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Which tokens of a tile the sampler kept, (BLOCK_N, BLOCK_V) bool.

    kept (N, ceil(V / 32)) int32: bit v % 32 of word v // 32 is token v. start_v and BLOCK_V are
    multiples of 32.
    """
    num_words = tl.cdiv(V, 32)
    rows = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - start_n).to(tl.int32))
    offs_word = start_v // 32 + tl.arange(0, BLOCK_V // 32)
    words = tl.load(
        kept_ptr + start_n * num_words + (rows[:, None] * num_words + offs_word[None, :]),
        mask=(offs_word < num_words)[None, :],
        other=0,
    )
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_N, BLOCK_V)) != 0
