"""Gradients of the head: the kernel that makes the gradient of the logits, and the GEMMs with it.

Both linear_logprobs_bwd and weighted_logprob_sum_fwd end here. The vocabulary is cut into chunks;
for each, one kernel recomputes the logits and writes their gradient, and the library's GEMMs give
that chunk of dweight, rounded once, and a term of dhidden, which is summed in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from agro_kernels._triton.launch import gemm_constants, select_config
from agro_kernels._triton.primitives import BANNED, LOG2E, grouped_blocks, logits_tile

# The gradient of the logits is made in vocabulary chunks of at most this many bytes, but never
# less than one tile of columns. Larger is faster: each chunk reads and writes the fp32 dhidden.
DLOGITS_CHUNK_BYTES = 512 * 2**20

# Largest |gradient of a logprob| after the power-of-two scaling that keeps fp16 from underflowing;
# the entropy's gradient is some ten times larger at most, and fp16 ends at 65504.
FP16_GRADIENT_PEAK = 256.0


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


def head_gradients(
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

    config = select_config("linear_logprobs_bwd", hidden)
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
                **gemm_constants(config, hidden, weight),
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
