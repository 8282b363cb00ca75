"""hidden, weight, targets -> logprobs, lse, entropy and their gradients, without the (N, V) logits.

    z = cap(round(hidden @ weight.T + bias)) / temperature   cap(x) = softcap * tanh(x / softcap)
    lse = log sum_v exp(z_v)     logprob = z_y - lse     entropy = lse - sum_v p_v z_v

Forward: one GEMM kernel keeps each tile of logits in registers and reduces it on the spot; a
finaliser merges the splits of the vocabulary. Backward: head_gradients.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from agro_kernels import tiles as configs
from agro_kernels._triton.head_gradients import head_gradients
from agro_kernels._triton.launch import (
    gather_counted,
    gemm_arguments,
    kept_arguments,
    programs_at_once,
    select_config,
)
from agro_kernels._triton.primitives import (
    BANNED,
    LN2,
    LOG2E,
    grouped_blocks,
    kept_tile,
    logits_tile,
)
from agro_kernels.backward import Backward
from agro_kernels.head import Head
from agro_kernels.kept_logits import LOWEST, KeptLogits

MERGE_BLOCK_N = 16  # rows of one program that merges splits; results do not depend on it

# Most tokens of a launch, which has two or three numbers a token and split of the vocabulary: 25 MB
# for 128 splits. A multiple of every tile, so results do not depend on it.
TOKEN_CHUNK = 16384


@triton.jit(do_not_specialize=["N"])
def linear_logprobs_fwd_kernel(
    # inputs
    hidden, weight, bias_ptr, targets_ptr, token_temperature_ptr, kept_ptr, kept_rows_ptr,
    # outputs
    max_ptr, sum_ptr, moment_ptr, target_logit_ptr, kept_logits_ptr, kept_maxima_ptr,
    # sizes and strides
    N, V, D, tiles_per_split, num_splits,
    kept_columns, stride_kept_logits_n, stride_kept_maxima_n,
    stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d, temperature, softcap,
    # constants
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    EVEN_V: tl.constexpr, EVEN_D: tl.constexpr, FLATTEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ROUND_LOGITS: tl.constexpr,
    KEPT_TILE: tl.constexpr, LOWEST_KEPT: tl.constexpr,
):  # fmt: skip
    """Softmax statistics of BLOCK_N rows over one split of the vocabulary.

    With k = log2(e) / temperature, m the running maximum of the logits, d_v = k (logit_v - m):

        s = sum_v 2^d_v          e = sum_v 2^d_v d_v

    and when a tile raises m by c / k:  e <- (e - c s) 2^-c,  s <- s 2^-c. The subtraction comes
    before the scaling, so a common offset of the logits costs no accuracy.
    Writes m, s, e as (num_splits, N) fp32 (moment_ptr None: no e), and the target's logit (N,),
    before the temperature, by the one program that meets it. With kept_logits_ptr also
    max(d_v ln 2, LOWEST_KEPT) of the columns below kept_columns, (tokens, kept_columns) fp16, and
    m / temperature for each KEPT_TILE columns, in the rows kept_rows_ptr (N,) of both. Blocks are
    whole tiles, and kept_columns whole blocks.
    """
    i_n, i_split = grouped_blocks(tl.cdiv(N, BLOCK_N), num_splits, GROUP_N)
    start_n = i_n.to(tl.int64) * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N - start_n
    rows = tl.minimum(offs_n, (N - 1 - start_n).to(tl.int32))  # rows past the end load the last one
    targets = tl.load(targets_ptr + start_n + rows)
    k = tl.full((BLOCK_N,), LOG2E, tl.float32)
    if token_temperature_ptr is not None:
        k /= tl.load(token_temperature_ptr + start_n + rows)
    else:
        k /= temperature

    m = tl.full((BLOCK_N,), BANNED, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    e = tl.zeros((BLOCK_N,), tl.float32)
    if kept_logits_ptr is not None:
        kept_rows = start_n + rows
        if kept_rows_ptr is not None:
            kept_rows = tl.load(kept_rows_ptr + start_n + rows)
        kept_rows_start = kept_logits_ptr + kept_rows * stride_kept_logits_n
        kept_maxima_start = kept_maxima_ptr + kept_rows * stride_kept_maxima_n
    start_split = i_split * tiles_per_split * BLOCK_V
    end_split = min(start_split + tiles_per_split * BLOCK_V, V)
    # Flattened, this loop and that over D are one: the next tile's operands are on their way during
    # the softmax.
    for start_v in tl.range(start_split, end_split, BLOCK_V, flatten=FLATTEN):
        offs_v = tl.arange(0, BLOCK_V)
        logits = logits_tile(
            hidden, weight, bias_ptr, start_n, start_v, N, V, D,
            stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d, softcap,
            BLOCK_N, BLOCK_V, BLOCK_D, EVEN_V, EVEN_D, DESCRIPTORS, ROUND_LOGITS,
        )  # fmt: skip
        # Columns without a token are masked after the softcap: it turns BANNED into -softcap.
        if not EVEN_V:
            logits = tl.where(offs_v[None, :] < V - start_v, logits, BANNED)
        if kept_ptr is not None:
            kept = kept_tile(kept_ptr, start_n, start_v, N, V, BLOCK_N, BLOCK_V)
            logits = tl.where(kept, logits, BANNED)
        in_tile = (targets >= start_v) & (targets < min(start_v + BLOCK_V, V)) & mask_n
        # A branch in a flattened loop would make ptxas 12.8 wait for each wgmma.
        if FLATTEN or tl.max(in_tile.to(tl.int32), axis=0) > 0:
            target_column = tl.where(in_tile, targets - start_v, -1).to(tl.int32)
            is_target = offs_v[None, :] == target_column[:, None]
            target_logit = tl.sum(tl.where(is_target, logits, 0.0), axis=1)
            tl.store(target_logit_ptr + start_n + offs_n, target_logit, mask=in_tile)

        m_new = tl.maximum(m, tl.max(logits, axis=1))
        d = (logits - m_new[:, None]) * k[:, None]
        if kept_logits_ptr is not None:
            within = mask_n & (start_v < kept_columns)
            tl.store(
                (kept_rows_start + start_v)[:, None] + offs_v[None, :],
                tl.maximum(d * LN2, LOWEST_KEPT).to(tl.float16),
                mask=within[:, None],
            )
            for i_tile in tl.static_range(BLOCK_V // KEPT_TILE):
                tl.store(
                    kept_maxima_start + (start_v // KEPT_TILE + i_tile),
                    m_new * k * LN2,
                    mask=within,
                )
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
    max_ptr, sum_ptr, moment_ptr, target_logit_ptr, targets_ptr, token_temperature_ptr,
    # outputs
    logprobs_ptr, lse_ptr, entropy_ptr,
    # sizes and strides
    N, num_splits, temperature, ignore_index,
    # constants
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merge the splits' (m, s, e), all at once, by the recurrence of the GEMM kernel; to nats.

    lse = m / temperature + ln s, logprob = (target logit - m) / temperature - ln s,
    entropy = ln s - ln(2) e / s. A row whose every token is banned gives lse -inf, else NaN.
    BLOCK_S is num_splits or more.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    temperatures = tl.full((BLOCK_N,), 1.0, tl.float32) * temperature
    if token_temperature_ptr is not None:
        temperatures = tl.load(token_temperature_ptr + offs_n, mask=mask_n, other=1.0)
    splits = tl.arange(0, BLOCK_S)
    offs = splits[:, None].to(tl.int64) * N + offs_n[None, :]
    mask = (splits < num_splits)[:, None] & mask_n[None, :]
    m_split = tl.load(max_ptr + offs, mask=mask, other=BANNED)
    s_split = tl.load(sum_ptr + offs, mask=mask, other=0.0)
    m = tl.max(m_split, axis=0)
    change = (m_split - m[None, :]) / temperatures[None, :] * LOG2E
    s = tl.sum(tl.where(mask, s_split * tl.exp2(change), 0.0), axis=0)
    s = tl.where(mask_n, s, 1.0)
    if moment_ptr is not None:
        e_split = tl.load(moment_ptr + offs, mask=mask, other=0.0)
        e_split = (e_split + change * s_split) * tl.exp2(change)
        e = tl.sum(tl.where(mask, e_split, 0.0), axis=0)

    log_s = tl.log2(s) * LN2
    all_banned = (m <= BANNED) & (s == s)  # a NaN logit does not change m, but makes s NaN
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
    head: Head, with_entropy: bool, kept_logits: KeptLogits | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), each (N,) fp32 in nats; entropy is (0,) unless asked for.

    bf16, fp16 or fp32. A target outside [0, V) that is not ignore_index gives a logprob of NaN:
    looking at it here would stall the device. Writes the counted rows of kept_logits.
    """
    rows = gather_counted(head, head.counted())
    logprobs, lse, entropy = _statistics(rows.head, with_entropy, kept_logits, rows.index)
    if with_entropy:
        entropy = rows.put_back(entropy)
    return rows.put_back(logprobs), rows.put_back(lse), entropy


def _statistics(
    head: Head,
    with_entropy: bool,
    kept_logits: KeptLogits | None = None,
    kept_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """linear_logprobs_fwd of rows that all count; kept_rows (N,): their rows in kept_logits."""
    hidden = head.hidden
    N, V = hidden.shape[0], head.weight.shape[0]
    logprobs = hidden.new_empty(N, dtype=torch.float32)
    lse = torch.empty_like(logprobs)
    entropy = hidden.new_empty(N if with_entropy else 0, dtype=torch.float32)
    if N == 0:
        return logprobs, lse, entropy
    config = select_config("linear_logprobs_fwd", head)
    split = configs.split_vocabulary(V, hidden.shape[1], config, programs_at_once(config, hidden))
    size = min(N, TOKEN_CHUNK)
    partials = hidden.new_empty((3 if with_entropy else 2) * split[1] * size, dtype=torch.float32)
    # No program finds a target outside the vocabulary: its logit and its logprob stay NaN.
    target_logits = hidden.new_full((N,), float("nan"), dtype=torch.float32)
    for start in range(0, N, TOKEN_CHUNK):
        rows = slice(start, min(start + TOKEN_CHUNK, N))
        n = rows.stop - start
        of_splits = partials[: partials.shape[0] // size * n].view(-1, split[1], n)
        results = {
            "logprobs_ptr": logprobs[rows],
            "lse_ptr": lse[rows],
            "entropy_ptr": entropy[rows] if with_entropy else None,
        }
        kept = kept_arguments(kept_logits, kept_rows, rows)
        kept["kept_columns"] = 0 if kept_logits is None else kept_logits.columns
        _launch(config, split, head.part(rows), of_splits, target_logits[rows], results, kept)
    return logprobs, lse, entropy


def _launch(
    config: configs.TileConfig,
    split: tuple[int, int],
    head: Head,
    partials: Tensor,
    target_logits: Tensor,
    results: dict[str, Tensor | None],
    kept: dict[str, object],
) -> None:
    """Both kernels for some tokens: partials (2 or 3, splits, N), target_logits (N,) NaN so far.

    split: (tiles of a split, number of splits). results, kept: arguments of the merge kernel and
    of the other.
    """
    hidden, (tiles_per_split, num_splits) = head.hidden, split
    N = hidden.shape[0]
    statistics = {
        "max_ptr": partials[0],
        "sum_ptr": partials[1],
        "moment_ptr": partials[2] if partials.shape[0] > 2 else None,
        "target_logit_ptr": target_logits,
    }
    with torch.cuda.device_of(hidden):
        linear_logprobs_fwd_kernel[(triton.cdiv(N, config.block_n) * num_splits,)](
            **statistics,
            tiles_per_split=tiles_per_split,
            num_splits=num_splits,
            **kept,
            LOWEST_KEPT=LOWEST,
            FLATTEN=config.flatten,
            **gemm_arguments(config, head),
        )
        linear_logprobs_fwd_merge_kernel[(triton.cdiv(N, MERGE_BLOCK_N),)](
            **statistics,
            targets_ptr=head.targets,
            token_temperature_ptr=head.token_temperature,
            **results,
            N=N,
            num_splits=num_splits,
            temperature=head.temperature,
            ignore_index=head.ignore_index,
            BLOCK_S=triton.next_power_of_2(num_splits),
            BLOCK_N=MERGE_BLOCK_N,
            num_warps=8,
        )


def linear_logprobs_bwd(backward: Backward) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias); rows whose upstream gradients are all 0 are left out, too."""
    upstream, head, known = backward.upstream, backward.head, backward.known
    live = torch.zeros_like(head.targets, dtype=torch.bool)
    for gradient in upstream.gradients():
        live |= gradient != 0
    if known is not None:
        live |= (known.values != 0).any(1)
    rows = gather_counted(head, live & head.counted())
    of_rows = backward._replace(
        upstream=upstream.each(rows.take),
        head=rows.head,
        known=None if known is None else known.each(rows.take),
    )
    dhidden, dweight, dbias = head_gradients(of_rows, rows.index)
    return rows.put_back(dhidden) if backward.output_mask[0] else dhidden, dweight, dbias
