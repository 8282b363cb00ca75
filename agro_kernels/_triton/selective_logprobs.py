"""logits, targets -> logprobs, lse and the gradient of the logits, which the caller already stores.

Both kernels stream the logits through registers once, in the dtype they are stored in; they are as
fast as the memory is. Rows that do not count are not read. Formulas: `reference.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from agro_kernels._triton.launch import contiguous
from agro_kernels._triton.primitives import BANNED, LN2, LOG2E
from agro_kernels.logit_rows import LogitRows

# One program takes BLOCK_N rows and BLOCK_V columns at a time: with Triton's default of 4 warps 16
# elements a thread, so that many programs fit a multiprocessor and cover each other's memory
# latency, and a tile's row is 2 KB of 16-bit logits in one piece. Twice as many elements spilled
# registers where an odd V forbids 16-byte loads. The order of the sum over the vocabulary follows
# from BLOCK_V alone. Compiled, not timed.
BLOCK_N = 2
BLOCK_V = 1024


@triton.jit
def row_pointers(ptr, rows, rows_inner, stride_outer, stride_inner):
    """Where the rows (BLOCK_N,) int64 of logits (outer, inner, V) begin."""
    return ptr + rows // rows_inner * stride_outer + rows % rows_inner * stride_inner


@triton.jit(do_not_specialize=["N", "rows_inner", "ignore_index"])
def selective_logprobs_fwd_kernel(
    # inputs
    logits_ptr, targets_ptr, token_temperature_ptr,
    # outputs
    logprobs_ptr, lse_ptr,
    # sizes and strides
    N, V, rows_inner, stride_logits_outer, stride_logits_inner, stride_logits_v,
    temperature, ignore_index,
    # constants
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """logprob = (x_y - m) / temperature - ln s and lse = m / temperature + ln s of BLOCK_N rows.

    With k = log2(e) / temperature, m the running maximum of the logits x, s = sum_v 2^k(x_v - m): a
    tile that raises m by c scales s by 2^-kc. m begins at the finite BANNED, so that logits of -inf
    give 2^-inf = 0 and no NaN. A row whose every token is banned gives lse -inf, else NaN.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < N
    targets = tl.load(targets_ptr + rows, mask=mask_n, other=ignore_index)
    counted = targets != ignore_index
    temperatures = tl.full((BLOCK_N,), 1.0, tl.float32) * temperature
    if token_temperature_ptr is not None:
        temperatures = tl.load(token_temperature_ptr + rows, mask=counted, other=1.0)
    k = LOG2E / temperatures
    row_ptrs = row_pointers(logits_ptr, rows, rows_inner, stride_logits_outer, stride_logits_inner)

    m = tl.full((BLOCK_N,), BANNED, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    for start_v in range(0, V, BLOCK_V):
        offs_v = start_v + tl.arange(0, BLOCK_V).to(tl.int64)
        logits = tl.load(
            row_ptrs[:, None] + offs_v[None, :] * stride_logits_v,
            mask=counted[:, None] & (offs_v[None, :] < V),
            other=float("-inf"),
        ).to(tl.float32)
        m_new = tl.maximum(m, tl.max(logits, axis=1))
        p = tl.exp2((logits - m_new[:, None]) * k[:, None])
        s = s * tl.exp2((m - m_new) * k) + tl.sum(p, axis=1)
        m = m_new

    all_banned = s == 0  # also where the row was not read; a NaN logit makes s NaN
    log_s = tl.log2(tl.where(all_banned, 1.0, s)) * LN2
    lse = tl.where(all_banned, float("-inf"), m / temperatures + log_s)
    # A target outside the vocabulary is not looked up: its logprob is NaN.
    in_vocabulary = (targets >= 0) & (targets < V)
    target_logits = tl.load(
        row_ptrs + targets.to(tl.int64) * stride_logits_v,
        mask=counted & in_vocabulary,
        other=float("nan"),
    ).to(tl.float32)
    logprobs = (target_logits - m) / temperatures - log_s
    logprobs = tl.where(all_banned, float("nan"), logprobs)
    tl.store(logprobs_ptr + rows, tl.where(counted, logprobs, 0.0), mask=mask_n)
    tl.store(lse_ptr + rows, tl.where(counted, lse, 0.0), mask=mask_n)


@triton.jit(do_not_specialize=["N", "rows_inner", "ignore_index"])
def selective_logprobs_bwd_kernel(
    # inputs
    dlogprobs_ptr, logits_ptr, targets_ptr, token_temperature_ptr, lse_ptr,
    # outputs
    dlogits_ptr,
    # sizes and strides
    N, V, rows_inner, stride_logits_outer, stride_logits_inner, stride_logits_v,
    temperature, ignore_index,
    # constants
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dlogits (N, V) = dlogprob (1[v = y] - p_v) / temperature, p_v = exp(x_v / temperature - lse).

    1 - p_y is formed in fp32 before any rounding. Ignored rows, and rows whose upstream gradient is
    0, become exactly 0 and are not read; rows whose target is outside [0, V) become NaN.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < N
    targets = tl.load(targets_ptr + rows, mask=mask_n, other=ignore_index)
    dlogprobs = tl.load(dlogprobs_ptr + rows, mask=mask_n, other=0.0).to(tl.float32)
    live = (targets != ignore_index) & (dlogprobs != 0)
    temperatures = tl.full((BLOCK_N,), 1.0, tl.float32) * temperature
    if token_temperature_ptr is not None:
        temperatures = tl.load(token_temperature_ptr + rows, mask=live, other=1.0)
    lse = tl.load(lse_ptr + rows, mask=live, other=0.0)
    in_vocabulary = (targets >= 0) & (targets < V)
    row_scale = tl.where(in_vocabulary, dlogprobs / temperatures, float("nan"))
    row_ptrs = row_pointers(logits_ptr, rows, rows_inner, stride_logits_outer, stride_logits_inner)

    for start_v in range(0, V, BLOCK_V):
        offs_v = start_v + tl.arange(0, BLOCK_V).to(tl.int64)
        mask_v = offs_v[None, :] < V
        logits = tl.load(
            row_ptrs[:, None] + offs_v[None, :] * stride_logits_v,
            mask=live[:, None] & mask_v,
            other=0.0,
        ).to(tl.float32)
        # A correctly rounded division: a large logit times an approximate inverse errs too much.
        log_p = tl.div_rn(logits, temperatures[:, None]) - lse[:, None]
        p = tl.exp2(log_p * LOG2E)
        is_target = offs_v[None, :] == targets[:, None]
        dlogits = row_scale[:, None] * tl.where(is_target, 1.0 - p, -p)
        # tl.where, not a product with 0: p was not computed for a row that is left out.
        dlogits = tl.where(live[:, None], dlogits, 0.0)
        tl.store(
            dlogits_ptr + rows[:, None] * V + offs_v[None, :],
            dlogits.to(dlogits_ptr.dtype.element_ty),
            mask=mask_n[:, None] & mask_v,
        )


def selective_logprobs_fwd(given: LogitRows) -> tuple[Tensor, Tensor]:
    """(logprobs, lse), each in the shape of targets, fp32, nats; lse is of logits / temperature.

    bf16, fp16 or fp32. A target outside [0, V) that is not ignore_index gives a logprob of NaN:
    looking at it here would stall the device.
    """
    logprobs = given.logits.new_empty(given.targets.shape, dtype=torch.float32)
    lse = torch.empty_like(logprobs)
    if logprobs.numel() > 0:
        _launch(selective_logprobs_fwd_kernel, given, logprobs_ptr=logprobs, lse_ptr=lse)
    return logprobs, lse


def selective_logprobs_bwd(dlogprobs: Tensor, given: LogitRows, lse: Tensor) -> Tensor:
    """dlogits (..., V), contiguous, in the dtype of logits, from dlogprobs and lse (...) fp32."""
    dlogits = given.logits.new_empty(given.logits.shape)
    if dlogits.numel() > 0:
        _launch(
            selective_logprobs_bwd_kernel,
            given,
            dlogprobs_ptr=dlogprobs.contiguous(),
            lse_ptr=lse.contiguous(),
            dlogits_ptr=dlogits,
        )
    return dlogits


def _launch(kernel: triton.JITFunction, given: LogitRows, **arguments: Tensor) -> None:
    """Launch over all rows of logits; a view such as logits[:, :-1] of (B, T, V) is not copied."""
    logits, targets = given.logits, given.targets
    V = logits.shape[-1]
    # Copied only if the axes before the last two have no common stride.
    blocks = logits.reshape(-1, targets.shape[-1] if targets.ndim else 1, V)
    num_outer, rows_inner, _ = blocks.shape
    N = num_outer * rows_inner
    with torch.cuda.device_of(logits):
        kernel[(triton.cdiv(N, BLOCK_N),)](
            logits_ptr=blocks,
            targets_ptr=targets.contiguous(),
            token_temperature_ptr=contiguous(given.token_temperature),
            N=N,
            V=V,
            rows_inner=rows_inner,
            stride_logits_outer=blocks.stride(0) if num_outer > 1 else 0,
            stride_logits_inner=blocks.stride(1),
            stride_logits_v=blocks.stride(2),
            temperature=given.temperature,
            ignore_index=given.ignore_index,
            **arguments,
            BLOCK_N=BLOCK_N,
            BLOCK_V=BLOCK_V,
        )


def compile_cases() -> list[tuple[str, triton.JITFunction, dict[str, str], dict[str, object]]]:
    """(name, kernel, signature, constexprs), a temperature a token, to compile unrun."""
    cases = []
    for kernel in (selective_logprobs_fwd_kernel, selective_logprobs_bwd_kernel):
        for dtype in ("bf16", "fp32"):
            constexprs: dict[str, object] = {
                "BLOCK_N": BLOCK_N,
                "BLOCK_V": BLOCK_V,
                "stride_logits_v": 1,
            }
            types = {
                "logits_ptr": f"*{dtype}",
                "dlogits_ptr": f"*{dtype}",
                "targets_ptr": "*i64",
                "temperature": "fp32",
            }
            signature = {}
            for name in kernel.arg_names:
                other = "*fp32" if name.endswith("_ptr") else "i32"
                signature[name] = "constexpr" if name in constexprs else types.get(name, other)
            cases.append((f"{kernel.fn.__name__} {dtype}", kernel, signature, constexprs))
    return cases
