"""hidden, weight, targets -> logprobs, lse, entropy and their gradients, without the (N, V) logits.

    z = cap(hidden @ weight.T + bias) / temperature     cap(x) = softcap * tanh(x / softcap)
    lse = log sum_v exp(z_v)     logprob = z_y - lse     entropy = lse - sum_v p_v z_v

Forward: one GEMM kernel keeps each tile of logits in registers and reduces it on the spot; a
finaliser merges the splits of the vocabulary. Backward: a GEMM kernel recomputes a vocabulary
chunk's logits and writes their gradient; the two GEMMs with it are the library's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from agro_kernels import configs
from agro_kernels._triton.primitives import (
    BANNED,
    LN2,
    LOG2E,
    grouped_blocks,
    logits_tile,
)

# The gradient of the logits is made in vocabulary chunks of at most this many bytes, but never
# less than one tile of columns. Larger is faster: each chunk reads and writes the fp32 dhidden.
DLOGITS_CHUNK_BYTES = 512 * 2**20

# Largest |gradient of a logprob| after the power-of-two scaling that keeps fp16 from underflowing;
# the entropy's gradient is some ten times larger at most, and fp16 ends at 65504.
FP16_GRADIENT_PEAK = 256.0

MERGE_BLOCK_N = 128  # rows of one program that merges splits; without influence on results


@triton.jit(do_not_specialize=["N"])
def linear_logprobs_fwd_kernel(
    # inputs
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    token_temperature_ptr,
    # outputs
    max_ptr,
    sum_ptr,
    moment_ptr,
    target_logit_ptr,
    # sizes and strides
    N,
    V,
    D,
    tiles_per_split,
    num_splits,
    stride_hidden_n,
    stride_hidden_d,
    stride_weight_v,
    stride_weight_d,
    temperature,
    softcap,
    # constants
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Softmax statistics of BLOCK_N rows over one split of the vocabulary.

    With k = log2(e) / temperature, m the running maximum of the logits, d_v = k (logit_v - m):

        s = sum_v 2^d_v          e = sum_v 2^d_v d_v

    and when a tile raises m by c / k:  e <- (e - c s) 2^-c,  s <- s 2^-c. The subtraction comes
    before the scaling, so a common offset of the logits costs no accuracy.
    Writes m, s, e as (num_splits, N) fp32 (moment_ptr None: no e), and the target's logit (N,),
    before the temperature, by the one program that meets it.
    """
    i_n, i_split = grouped_blocks(tl.cdiv(N, BLOCK_N), num_splits, GROUP_N)
    start_n = i_n.to(tl.int64) * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N - start_n
    # Rows and columns past the end repeat the last one, so no load of the main loop has a mask.
    rows = tl.minimum(offs_n, (N - 1 - start_n).to(tl.int32))
    targets = tl.load(targets_ptr + start_n + rows)
    k = tl.full((BLOCK_N,), LOG2E, tl.float32)
    if token_temperature_ptr is not None:
        k /= tl.load(token_temperature_ptr + start_n + rows)
    else:
        k /= temperature

    m = tl.full((BLOCK_N,), BANNED, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    e = tl.zeros((BLOCK_N,), tl.float32)
    start_split = i_split * tiles_per_split * BLOCK_V
    for start_v in range(start_split, min(start_split + tiles_per_split * BLOCK_V, V), BLOCK_V):
        offs_v = tl.arange(0, BLOCK_V)
        columns = offs_v if EVEN_V else tl.minimum(offs_v, V - 1 - start_v)
        logits = logits_tile(
            hidden_ptr=hidden_ptr + start_n * stride_hidden_n,
            weight_ptr=weight_ptr + tl.cast(start_v, tl.int64) * stride_weight_v,
            bias_ptr=None if bias_ptr is None else bias_ptr + start_v,
            offs_n=rows,
            offs_v=columns,
            D=D,
            stride_hidden_n=stride_hidden_n,
            stride_hidden_d=stride_hidden_d,
            stride_weight_v=stride_weight_v,
            stride_weight_d=stride_weight_d,
            softcap=softcap,
            BLOCK_N=BLOCK_N,
            BLOCK_V=BLOCK_V,
            BLOCK_D=BLOCK_D,
            EVEN_D=EVEN_D,
            INPUT_PRECISION=INPUT_PRECISION,
            INTERPRETED=INTERPRETED,
        )
        if not EVEN_V:
            # After the transform: tanh would turn a padding column into a logit of -softcap.
            logits = tl.where(offs_v[None, :] < V - start_v, logits, BANNED)
        target_column = targets - start_v
        in_tile = (target_column >= 0) & (target_column < min(BLOCK_V, V - start_v)) & mask_n
        if tl.max(in_tile.to(tl.int32), axis=0) > 0:
            is_target = offs_v[None, :] == target_column[:, None]
            target_logit = tl.sum(tl.where(is_target, logits, 0.0), axis=1)
            tl.store(target_logit_ptr + start_n + offs_n, target_logit, mask=in_tile)

        m_new = tl.maximum(m, tl.max(logits, axis=1))
        d = (logits - m_new[:, None]) * k[:, None]
        p = tl.exp2(d)
        change = (m - m_new) * k
        if moment_ptr is not None:
            e = (e + change * s) * tl.exp2(change) + tl.sum(p * d, axis=1)
        s = s * tl.exp2(change) + tl.sum(p, axis=1)
        m = m_new

    offs_out = i_split.to(tl.int64) * N + start_n + offs_n
    tl.store(max_ptr + offs_out, m, mask=mask_n)
    tl.store(sum_ptr + offs_out, s, mask=mask_n)
    if moment_ptr is not None:
        tl.store(moment_ptr + offs_out, e, mask=mask_n)


@triton.jit(do_not_specialize=["N"])
def linear_logprobs_fwd_merge_kernel(
    # inputs
    max_ptr,
    sum_ptr,
    moment_ptr,
    target_logit_ptr,
    targets_ptr,
    token_temperature_ptr,
    # outputs
    logprobs_ptr,
    lse_ptr,
    entropy_ptr,
    # sizes and strides
    N,
    num_splits,
    temperature,
    ignore_index,
    # constants
    BLOCK_N: tl.constexpr,
):
    """Merge the splits' (m, s, e) in their order, by the recurrence of the GEMM kernel; to nats.

    lse = m / temperature + ln s, logprob = (target logit - m) / temperature - ln s,
    entropy = ln s - ln(2) e / s. A row whose every token is banned gives lse -inf, else NaN.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    temperatures = tl.full((BLOCK_N,), 1.0, tl.float32) * temperature
    if token_temperature_ptr is not None:
        temperatures = tl.load(token_temperature_ptr + offs_n, mask=mask_n, other=1.0)
    m = tl.full((BLOCK_N,), BANNED, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    e = tl.zeros((BLOCK_N,), tl.float32)
    for i_split in range(num_splits):
        offs = tl.cast(i_split, tl.int64) * N + offs_n
        m_split = tl.load(max_ptr + offs, mask=mask_n, other=0.0)
        s_split = tl.load(sum_ptr + offs, mask=mask_n, other=1.0)
        m_new = tl.maximum(m, m_split)
        change = (m - m_new) / temperatures * LOG2E
        change_split = (m_split - m_new) / temperatures * LOG2E
        if moment_ptr is not None:
            e_split = tl.load(moment_ptr + offs, mask=mask_n, other=0.0)
            e = (e + change * s) * tl.exp2(change)
            e += (e_split + change_split * s_split) * tl.exp2(change_split)
        s = s * tl.exp2(change) + s_split * tl.exp2(change_split)
        m = m_new

    log_s = tl.log2(s) * LN2
    all_banned = (m <= BANNED) & (s == s)  # a NaN leaves m where it was, and is in s
    lse = tl.where(all_banned, float("-inf"), m / temperatures + log_s)
    target_logit = tl.load(target_logit_ptr + offs_n, mask=mask_n, other=0.0)
    logprobs = (target_logit - m) / temperatures - log_s
    logprobs = tl.where(target_logit <= BANNED, float("-inf"), logprobs)
    logprobs = tl.where(all_banned, float("nan"), logprobs)
    counted = tl.load(targets_ptr + offs_n, mask=mask_n, other=ignore_index) != ignore_index
    tl.store(logprobs_ptr + offs_n, tl.where(counted, logprobs, 0.0), mask=mask_n)
    tl.store(lse_ptr + offs_n, tl.where(counted, lse, 0.0), mask=mask_n)
    if entropy_ptr is not None:
        entropy = tl.where(all_banned, float("nan"), log_s - e / s * LN2)
        tl.store(entropy_ptr + offs_n, tl.where(counted, entropy, 0.0), mask=mask_n)


def linear_logprobs_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    ignore_index: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), each (N,) fp32 in nats; entropy is (0,) unless asked for.

    hidden (N, D) and weight (V, D): bf16, fp16 or fp32, any strides; targets (N,) int32 or int64;
    token_temperature (N,) fp32 or None; softcap 0.0 for none. A target outside [0, V) that is not
    ignore_index gives a logprob of NaN: looking at it here would stall the device.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    logprobs, lse = hidden.new_empty((2, N), dtype=torch.float32)
    entropy = hidden.new_empty(N if with_entropy else 0, dtype=torch.float32)
    if N == 0:
        return logprobs, lse, entropy
    config = _select_config("linear_logprobs_fwd", hidden)
    tiles_per_split, num_splits = configs.split_vocabulary(V, config)
    partials = hidden.new_empty((3 if with_entropy else 2, num_splits, N), dtype=torch.float32)
    # A target outside the vocabulary is met by no program: its logit, and logprob, stay NaN.
    target_logit = hidden.new_full((N,), float("nan"), dtype=torch.float32)
    targets = targets.contiguous()
    token_temperature = None if token_temperature is None else token_temperature.contiguous()
    with torch.cuda.device_of(hidden):
        linear_logprobs_fwd_kernel[(triton.cdiv(N, config.block_n) * num_splits,)](
            hidden_ptr=hidden,
            weight_ptr=weight,
            bias_ptr=None if bias is None else bias.contiguous(),
            targets_ptr=targets,
            token_temperature_ptr=token_temperature,
            max_ptr=partials[0],
            sum_ptr=partials[1],
            moment_ptr=partials[2] if with_entropy else None,
            target_logit_ptr=target_logit,
            N=N,
            V=V,
            D=D,
            tiles_per_split=tiles_per_split,
            num_splits=num_splits,
            stride_hidden_n=hidden.stride(0),
            stride_hidden_d=hidden.stride(1),
            stride_weight_v=weight.stride(0),
            stride_weight_d=weight.stride(1),
            temperature=temperature,
            softcap=softcap if softcap > 0 else None,
            **_gemm_constants(config, hidden, weight),
        )
        linear_logprobs_fwd_merge_kernel[(triton.cdiv(N, MERGE_BLOCK_N),)](
            max_ptr=partials[0],
            sum_ptr=partials[1],
            moment_ptr=partials[2] if with_entropy else None,
            target_logit_ptr=target_logit,
            targets_ptr=targets,
            token_temperature_ptr=token_temperature,
            logprobs_ptr=logprobs,
            lse_ptr=lse,
            entropy_ptr=entropy if with_entropy else None,
            N=N,
            num_splits=num_splits,
            temperature=temperature,
            ignore_index=ignore_index,
            BLOCK_N=MERGE_BLOCK_N,
            num_warps=4,
        )
    return logprobs, lse, entropy


@triton.jit(do_not_specialize=["N", "start_chunk", "num_columns"])
def linear_logprobs_bwd_kernel(
    # inputs
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    token_temperature_ptr,
    lse_ptr,
    entropy_ptr,
    dlogprobs_ptr,
    dlse_ptr,
    dentropy_ptr,
    # outputs
    dlogits_ptr,
    logprobs_ptr,
    # sizes and strides
    N,
    V,
    D,
    start_chunk,
    num_columns,
    stride_hidden_n,
    stride_hidden_d,
    stride_weight_v,
    stride_weight_d,
    stride_dlogits_n,
    temperature,
    softcap,
    ignore_index,
    # constants
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One (BLOCK_N, BLOCK_V) tile of the gradient of hidden @ weight.T + bias.

    With the recomputed logits z, p = exp(z - lse) and H the entropy:

        dz_v = dlogprob (1[v = y] - p_v) - dentropy p_v (z_v - lse + H) + dlse p_v

    times 1 / temperature and the softcap's slope. Upstream gradients that are None cost nothing.
    1 - p_y is formed in fp32 before any rounding. Writes dlogits (N, num_columns) for the columns
    from start_chunk on and, if asked, logprobs (N,) of the targets the chunk holds. Rows whose
    target is outside [0, V) become NaN, ignored rows 0.
    """
    i_n, i_v = grouped_blocks(tl.cdiv(N, BLOCK_N), tl.cdiv(num_columns, BLOCK_V), GROUP_N)
    start_n = i_n.to(tl.int64) * BLOCK_N
    start_v = start_chunk + i_v * BLOCK_V
    offs_n = tl.arange(0, BLOCK_N)
    offs_v = tl.arange(0, BLOCK_V)
    mask_n = offs_n < N - start_n
    # Rows and columns past the end repeat the last one, so no load of the main loop has a mask.
    rows = tl.minimum(offs_n, (N - 1 - start_n).to(tl.int32))
    columns = offs_v if EVEN_V else tl.minimum(offs_v, V - 1 - start_v)
    logits = logits_tile(
        hidden_ptr=hidden_ptr + start_n * stride_hidden_n,
        weight_ptr=weight_ptr + tl.cast(start_v, tl.int64) * stride_weight_v,
        bias_ptr=None if bias_ptr is None else bias_ptr + start_v,
        offs_n=rows,
        offs_v=columns,
        D=D,
        stride_hidden_n=stride_hidden_n,
        stride_hidden_d=stride_hidden_d,
        stride_weight_v=stride_weight_v,
        stride_weight_d=stride_weight_d,
        softcap=softcap,
        BLOCK_N=BLOCK_N,
        BLOCK_V=BLOCK_V,
        BLOCK_D=BLOCK_D,
        EVEN_D=EVEN_D,
        INPUT_PRECISION=INPUT_PRECISION,
        INTERPRETED=INTERPRETED,
    )
    targets = tl.load(targets_ptr + start_n + rows)
    lse = tl.load(lse_ptr + start_n + rows)
    inverse_temperature = tl.full((BLOCK_N,), 1.0, tl.float32)
    if token_temperature_ptr is not None:
        inverse_temperature /= tl.load(token_temperature_ptr + start_n + rows)
    else:
        inverse_temperature /= temperature
    log_p = logits * inverse_temperature[:, None] - lse[:, None]
    p = tl.exp2(log_p * LOG2E)
    target_column = targets - start_v
    is_target = offs_v[None, :] == target_column[:, None]

    if logprobs_ptr is not None:
        in_tile = (target_column >= 0) & (target_column < min(BLOCK_V, V - start_v)) & mask_n
        target_logit = tl.sum(tl.where(is_target, logits, 0.0), axis=1)
        logprobs = target_logit * inverse_temperature - lse
        logprobs = tl.where(target_logit <= BANNED, float("-inf"), logprobs)
        tl.store(logprobs_ptr + start_n + offs_n, logprobs, mask=in_tile)

    dlogits = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if dlogprobs_ptr is not None:
        dlogprobs = tl.load(dlogprobs_ptr + start_n + rows)
        dlogits += dlogprobs[:, None] * tl.where(is_target, 1.0 - p, -p)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + start_n + rows)
        dlogits += dlse[:, None] * p
    if dentropy_ptr is not None:
        dentropy = tl.load(dentropy_ptr + start_n + rows)
        entropy = tl.load(entropy_ptr + start_n + rows)
        dlogits -= dentropy[:, None] * p * (log_p + entropy[:, None])
    in_vocabulary = (targets >= 0) & (targets < V)
    row_scale = tl.where(in_vocabulary, inverse_temperature, float("nan"))
    dlogits *= row_scale[:, None]
    if softcap is not None:
        capped = logits / softcap
        dlogits *= (1.0 - capped) * (1.0 + capped)  # the slope of tanh, 1 - tanh^2
    # A selection, not a product: an ignored row may hold NaN.
    counted = targets != ignore_index
    dlogits = tl.where(counted[:, None], dlogits, 0.0)
    tl.store(
        dlogits_ptr
        + start_n * stride_dlogits_n
        + i_v * BLOCK_V
        + offs_n[:, None].to(tl.int64) * stride_dlogits_n
        + offs_v[None, :],
        dlogits.to(dlogits_ptr.dtype.element_ty),
        mask=mask_n[:, None] & (offs_v[None, :] < V - start_v),
    )


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
    lse: Tensor,
    entropy: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden (N, D), dweight (V, D), dbias (V,)); (0,) for each that output_mask leaves out.

    dlogprobs, dlse, dentropy: (N,) fp32 upstream gradients, None where there is none. lse (N,) and,
    if dentropy is given, entropy (N,) are the forward's. The rest is linear_logprobs_fwd's.
    """
    return _gradients(
        dlogprobs=dlogprobs,
        dlse=dlse,
        dentropy=dentropy,
        hidden=hidden,
        weight=weight,
        targets=targets,
        bias=bias,
        temperature=temperature,
        token_temperature=token_temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        lse=lse,
        entropy=entropy,
        output_mask=output_mask,
        logprobs=None,
    )


def weighted_logprob_sum_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    lse: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    ignore_index: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, dhidden, dweight, dbias): sum_t coefficients_t * logprob_t, 0-d fp32, its gradients.

    coefficients (N,) fp32; a row whose coefficient is 0 is an ignored row. With lse (N,) from an
    earlier pass over the same hidden the logits are computed once (3 GEMMs), else twice (4).
    """
    targets = targets.where(coefficients != 0, ignore_index)
    if lse is None or not any(output_mask):
        logprobs, lse, _ = linear_logprobs_fwd(
            hidden, weight, targets, bias, temperature, token_temperature, softcap, ignore_index,
            with_entropy=False,
        )  # fmt: skip
        logprobs_of_bwd = None
    else:
        # A target outside the vocabulary is in no chunk: its logprob, and the total, stay NaN.
        logprobs = logprobs_of_bwd = torch.full_like(lse, float("nan"))
    gradients = _gradients(
        dlogprobs=coefficients,
        dlse=None,
        dentropy=None,
        hidden=hidden,
        weight=weight,
        targets=targets,
        bias=bias,
        temperature=temperature,
        token_temperature=token_temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        lse=lse,
        entropy=lse,
        output_mask=output_mask,
        logprobs=logprobs_of_bwd,
    )
    terms = torch.where(targets != ignore_index, coefficients.double() * logprobs, 0.0)
    return terms.sum().float(), *gradients


def _gradients(
    *,
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
    lse: Tensor,
    entropy: Tensor,
    output_mask: list[bool],
    logprobs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """linear_logprobs_bwd; also fills logprobs (N,), if given, from the recomputed logits."""
    (N, D), V = hidden.shape, weight.shape[0]
    need_hidden, need_weight, need_bias = output_mask
    dhidden = hidden.new_zeros((N, D) if need_hidden else 0, dtype=torch.float32)
    dweight = weight.new_empty((V, D) if need_weight else 0)
    dbias = weight.new_empty(V if need_bias else 0)
    upstream = [g for g in (dlogprobs, dlse, dentropy) if g is not None]
    if N == 0 or not upstream or not any(output_mask):
        return dhidden.to(hidden.dtype), dweight.zero_(), dbias.zero_()

    # Rows without an upstream gradient are left out like ignored ones. Their hidden may be NaN, and
    # NaN * 0 would reach dweight through the library's GEMM, hence the copy without them.
    live = targets != ignore_index
    live &= torch.stack([gradient != 0 for gradient in upstream]).any(0)
    targets = targets.where(live, ignore_index)
    hidden_live = hidden.where(live[:, None], 0.0) if need_weight else hidden
    scale = None
    if hidden.dtype == torch.float16:
        scale = _fp16_scale(upstream, live, temperature, token_temperature)
        dlogprobs, dlse, dentropy = (
            None if gradient is None else gradient * scale
            for gradient in (dlogprobs, dlse, dentropy)
        )

    config = _select_config("linear_logprobs_bwd", hidden)
    widest = DLOGITS_CHUNK_BYTES // (N * hidden.element_size()) // config.block_v * config.block_v
    chunk = min(max(widest, config.block_v), triton.cdiv(V, config.block_v) * config.block_v)
    dlogits_buffer = hidden.new_empty(N, chunk)
    arguments = dict(
        hidden_ptr=hidden,
        weight_ptr=weight,
        bias_ptr=None if bias is None else bias.contiguous(),
        targets_ptr=targets,
        token_temperature_ptr=_contiguous(token_temperature),
        lse_ptr=lse.contiguous(),
        entropy_ptr=None if dentropy is None else entropy.contiguous(),
        dlogprobs_ptr=_contiguous(dlogprobs),
        dlse_ptr=_contiguous(dlse),
        dentropy_ptr=_contiguous(dentropy),
        dlogits_ptr=dlogits_buffer,
        logprobs_ptr=logprobs,
    )
    with torch.cuda.device_of(hidden):
        for start in range(0, V, chunk):
            columns = min(chunk, V - start)
            num_tiles = triton.cdiv(N, config.block_n) * triton.cdiv(columns, config.block_v)
            linear_logprobs_bwd_kernel[(num_tiles,)](
                **arguments,
                N=N,
                V=V,
                D=D,
                start_chunk=start,
                num_columns=columns,
                stride_hidden_n=hidden.stride(0),
                stride_hidden_d=hidden.stride(1),
                stride_weight_v=weight.stride(0),
                stride_weight_d=weight.stride(1),
                stride_dlogits_n=chunk,
                temperature=temperature,
                softcap=softcap if softcap > 0 else None,
                ignore_index=ignore_index,
                **_gemm_constants(config, hidden, weight),
            )
            dlogits = dlogits_buffer[:, :columns]
            if need_hidden:
                dhidden += _mm_fp32(dlogits, weight[start : start + columns])
            if need_weight:
                product = _mm_fp32(dlogits.T, hidden_live)
                dweight[start : start + columns] = product if scale is None else product / scale
            if need_bias:
                total = dlogits.sum(0, dtype=torch.float32)
                dbias[start : start + columns] = total if scale is None else total / scale
    if scale is not None:
        dhidden /= scale
    return dhidden.to(hidden.dtype), dweight, dbias


def _fp16_scale(
    upstream: list[Tensor], live: Tensor, temperature: float, token_temperature: Tensor | None
) -> Tensor:
    """The power of two, 0-d fp32 on the device, that lifts the largest gradient to the fp16 peak.

    A coefficient divided by the number of tokens is below fp16's smallest number soon; scaling by a
    power of two and back is exact. NaN and inf do not count.
    """
    largest = torch.stack([gradient.abs() for gradient in upstream]).amax(0)
    largest = largest / (temperature if token_temperature is None else token_temperature)
    largest = largest.where(live & largest.isfinite(), 0.0).amax().clamp_min(1e-30)
    ratio = FP16_GRADIENT_PEAK / largest
    mantissa, _ = torch.frexp(ratio)
    return ratio / mantissa


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result: no rounding between the sum and whoever adds to it."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())  # no out_dtype on CPU, and not everywhere on ROCm


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _select_config(kernel: str, hidden: Tensor) -> configs.TileConfig:
    return configs.select(kernel, _architecture(hidden.device), hidden.element_size())


def _architecture(device: torch.device) -> str:
    """The device's name in the tables of configs.py; CPU tensors are for Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _gemm_constants(
    config: configs.TileConfig, hidden: Tensor, weight: Tensor
) -> dict[str, object]:
    """The keyword arguments that the two GEMM kernels' launches share."""
    return dict(
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_D=config.block_d,
        GROUP_N=config.group_n,
        EVEN_V=weight.shape[0] % config.block_v == 0,
        EVEN_D=weight.shape[1] % config.block_d == 0,
        # Triton's default would round fp32 operands to tf32; bf16 and fp16 ones are not affected.
        INPUT_PRECISION="ieee",
        INTERPRETED=hidden.device.type == "cpu",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
