"""Device functions that more than one kernel uses."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Stands for -inf where a logit or a running maximum is missing: vocabulary tail, banned token.
# Being finite it needs no guard: exp2(BANNED - m) is 0 and 0 * BANNED is 0, where -inf makes NaN.
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
def logits_tile(
    # inputs
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    offs_n,
    offs_v,
    # sizes and strides
    D,
    stride_hidden_n,
    stride_hidden_d,
    stride_weight_v,
    stride_weight_d,
    softcap,
    # constants
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """softcap * tanh((hidden @ weight.T + bias) / softcap) of one tile, (BLOCK_N, BLOCK_V) fp32.

    The pointers are already those of the tile's first row (hidden) and first token (weight, bias),
    so that the offsets inside the tile fit int32. offs_n (BLOCK_N,) and offs_v (BLOCK_V,) must be
    in range: no row or column of the main loop is masked. bias_ptr and softcap may be None. A bias
    of -inf gives BANNED, or -softcap if there is one.
    """
    offs_d = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + offs_n[:, None] * stride_hidden_n + offs_d[None, :] * stride_hidden_d
    weight_ptrs = weight_ptr + offs_v[None, :] * stride_weight_v + offs_d[:, None] * stride_weight_d
    logits = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start_d in range(0, D, BLOCK_D):
        if EVEN_D:
            hidden = tl.load(hidden_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            mask_d = offs_d < D - start_d
            hidden = tl.load(hidden_ptrs, mask=mask_d[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=mask_d[:, None], other=0.0)
        if INTERPRETED:
            # Triton's interpreter would multiply the bit patterns of bf16 operands.
            hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
        logits = tl.dot(hidden, weight, logits, input_precision=INPUT_PRECISION)
        hidden_ptrs += BLOCK_D * stride_hidden_d
        weight_ptrs += BLOCK_D * stride_weight_d
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + offs_v)[None, :].to(tl.float32)
    if softcap is not None:
        logits = softcap * tanh(logits / softcap)
    elif bias_ptr is not None:
        logits = tl.where(logits < BANNED, BANNED, logits)  # keeps NaN, unlike a maximum
    return logits
