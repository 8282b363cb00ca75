"""The AGRO ops on a GPU: four small kernels, float64, without waiting for the device.

    tokens (N,)   -> sequence_log_ratios    one program a sequence: sum over its tokens
    rows (B,)     -> group_statistics       a program takes BLOCK_I rows and reads all B rows twice
                  -> finalise               one program: totals over groups, and the denominator
    gradient (N,) <- token_gradients        a program takes BLOCK_T tokens, finds their sequences

No sort and no atomics: a row finds its group by comparing ids with every row, O(B^2) comparisons in
a fixed order, so two runs agree bit for bit. Formulas: `agro_kernels/agro_loss.py`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from agro_kernels._triton.launch import contiguous
from agro_kernels.agro_options import AgroOptions, AgroRows, AgroTokens
from agro_kernels.arguments import results_dtype

BLOCK_T = 1024
BLOCK_I, BLOCK_J = 16, 32  # 16 x 64 spilled registers on sm_80 and sm_90
BLOCK_B = 1024

# What a row is, in the bits of its status.
KEPT = tl.constexpr(1)
FIRST_OF_GROUP = tl.constexpr(2)
IN_VALID_GROUP = tl.constexpr(4)
LOWERED = tl.constexpr(8)  # by the pathwise coefficient, before the taper


@triton.jit(do_not_specialize=["num_tokens"])
def sequence_log_ratios_kernel(
    # inputs
    logprobs_ptr, ref_logprobs_ptr, cu_seqlens_ptr, sampling_logprobs_ptr,
    # outputs
    log_ratios_ptr, sampler_log_ratios_ptr,
    # sizes and constants
    num_tokens, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """log_ratio_b = sum over tokens t of sequence b of (logprob_t - ref_logprob_t).

    sampler_log_ratio_b = sum over the same of logprob_t, less sampling_logprob_b, unless
    sampling_logprobs_ptr is None.
    """
    i_b = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + i_b).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + i_b + 1).to(tl.int64)
    inside = (start >= 0) & (start <= end) & (end <= num_tokens)
    end = tl.where(inside, end, start)
    total = tl.zeros((BLOCK_T,), tl.float64)
    total_logprob = tl.zeros((BLOCK_T,), tl.float64)
    for start_t in range(start, end, BLOCK_T):
        offs_t = start_t + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_t = offs_t < end
        logprobs = tl.load(logprobs_ptr + offs_t, mask=mask_t, other=0.0).to(tl.float64)
        ref_logprobs = tl.load(ref_logprobs_ptr + offs_t, mask=mask_t, other=0.0).to(tl.float64)
        total += logprobs - ref_logprobs
        if sampling_logprobs_ptr is not None:
            total_logprob += logprobs
    # Bounds outside the tokens: NaN, so that the row is dropped and counted.
    tl.store(log_ratios_ptr + i_b, tl.where(inside, tl.sum(total, 0), float("nan")))
    if sampling_logprobs_ptr is not None:
        sampling_logprob = tl.load(sampling_logprobs_ptr + i_b).to(tl.float64)
        tl.store(sampler_log_ratios_ptr + i_b, tl.sum(total_logprob, 0) - sampling_logprob)


@triton.jit
def load_rows(rows, offs):
    """(regularised reward, importance weight, kept) of the rows at offs.

    rows: the pointers to all of them and what they are judged by, as group_statistics_kernel has
    it. The first two of a row that is not kept may be anything, NaN included: the caller has to
    select by `kept`. Selecting here would save it that, but Triton before 3.8 cannot compile a
    selection whose result is used both as rows and as columns of a tile.
    """
    rewards_ptr, log_ratios_ptr, _, weights_ptr, num_sequences, beta = rows
    mask = offs < num_sequences
    infinity = float("inf")
    rewards = tl.load(rewards_ptr + offs, mask=mask, other=0.0).to(tl.float64)
    log_ratios = tl.load(log_ratios_ptr + offs, mask=mask, other=0.0)
    kept = mask & (tl.abs(rewards) < infinity) & (tl.abs(log_ratios) < infinity)
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + offs, mask=mask, other=0.0).to(tl.float64)
        kept = kept & (weights >= 0) & (weights < infinity)
    else:
        weights = tl.full(rewards.shape, 1.0, tl.float64)
    return rewards - beta * log_ratios, weights, kept


@triton.jit
def load_members(rows, groups_i, start_j, BLOCK_J: tl.constexpr):
    """Which of the rows j, from start_j on, are of the groups of rows i, and which of those are
    kept, (I, J); the regularised rewards of rows j, (J,); their weights where they are kept
    members, (I, J)."""
    _, _, groups_ptr, _, num_sequences, _ = rows
    offs_j = start_j + tl.arange(0, BLOCK_J)
    mask_j = offs_j < num_sequences
    groups_j = tl.load(groups_ptr + offs_j, mask=mask_j, other=0)
    regularized_j, weights_j, kept_j = load_rows(rows, offs_j)
    same = (groups_i[:, None] == groups_j[None, :]) & mask_j[None, :]
    member = same & kept_j[None, :]
    return same, member, regularized_j, tl.where(member, weights_j[None, :], 0.0)


@triton.jit(do_not_specialize=["num_sequences"])
def group_statistics_kernel(
    # inputs
    rewards_ptr, log_ratios_ptr, groups_ptr, on_policy_ptr, weights_ptr,
    sampler_log_ratios_ptr, row_taper_ptr,
    # outputs
    raw_coefficients_ptr, variances_ptr, deviations_ptr, tapers_ptr, statuses_ptr,
    # sizes and options
    num_sequences, beta: tl.float64, lr_weight: tl.float64, lr_baseline: tl.float64,
    taper: tl.float64,
    # constants
    HAS_LR: tl.constexpr, LR_CAP: tl.constexpr, AUTO_BASELINE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Rows i against all rows j: first the group's count and mean, then its squared deviations.

    Two passes, because the mean square less the squared mean cancels. Writes, for each row, the
    coefficient before scale / num_groups, |d|, its status, and the group's variance at the group's
    first row (0 elsewhere), so that a sum over rows is a sum over groups. Unless tapers_ptr is None
    coefficients are tapered, and the weights written: 1 where nothing is lowered.
    """
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i = offs_i < num_sequences
    groups_i = tl.load(groups_ptr + offs_i, mask=mask_i, other=0)
    rows = rewards_ptr, log_ratios_ptr, groups_ptr, weights_ptr, num_sequences, beta
    regularized_i, weights_i, kept_i = load_rows(rows, offs_i)

    size = tl.zeros((BLOCK_I,), tl.float64)
    weight = tl.zeros((BLOCK_I,), tl.float64)
    total = tl.zeros((BLOCK_I,), tl.float64)
    earlier = tl.zeros((BLOCK_I,), tl.int32)
    for start_j in range(0, num_sequences, BLOCK_J):
        same, member, regularized_j, member_weights = load_members(rows, groups_i, start_j, BLOCK_J)
        size += tl.sum(member.to(tl.float64), 1)
        weight += tl.sum(member_weights, 1)
        total += tl.sum(member_weights * tl.where(member, regularized_j[None, :], 0.0), 1)
        offs_j = start_j + tl.arange(0, BLOCK_J)
        earlier += tl.sum((same & (offs_j[None, :] < offs_i[:, None])).to(tl.int32), 1)
    mean = total / tl.where(weight > 0, weight, 1.0)

    squares = tl.zeros((BLOCK_I,), tl.float64)
    largest = tl.zeros((BLOCK_I,), tl.float64)
    for start_j in range(0, num_sequences, BLOCK_J):
        _, member, regularized_j, member_weights = load_members(rows, groups_i, start_j, BLOCK_J)
        deviations = tl.where(member, regularized_j[None, :] - mean[:, None], 0.0)
        squares += tl.sum(member_weights * deviations * deviations, 1)
        if LR_CAP:
            largest = tl.maximum(largest, tl.max(deviations, 1))

    valid = size >= 2
    used = kept_i & valid
    n = tl.where(valid, size, 2.0)
    pairs = weight / (n * (n - 1))
    deviation = tl.where(used, regularized_i - mean, 0.0)
    coefficients = -beta * tl.where(used, weights_i, 0.0) * deviation * pairs
    status = tl.where(kept_i, KEPT, 0) + tl.where(mask_i & valid, IN_VALID_GROUP, 0)
    if tapers_ptr is not None:
        lowered = coefficients > 0
        sampler_log_ratio = tl.load(sampler_log_ratios_ptr + offs_i, mask=mask_i, other=0.0)
        known = tl.abs(sampler_log_ratio) < float("inf")
        shortfall = tl.where(known & (sampler_log_ratio < 0), sampler_log_ratio, 0.0)
        exponent = tl.zeros((BLOCK_I,), tl.float64) + taper
        if row_taper_ptr is not None:
            exponent = tl.load(row_taper_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float64)
        one_sided = exponent == float("inf")  # apart, because inf * 0 is NaN
        tapers = tl.exp(tl.where(one_sided, 0.0, exponent) * shortfall)
        tapers = tl.where(lowered & known, tl.where(one_sided, 0.0, tapers), 1.0)
        coefficients *= tapers
        status += tl.where(lowered, LOWERED, 0)
        tl.store(tapers_ptr + offs_i, tapers, mask=mask_i)
    if HAS_LR:
        square = deviation * deviation
        of_others = (squares - n / (n - 1) * square) / tl.where(n > 2, n - 2, 1.0)
        if AUTO_BASELINE:
            shrink = tl.where(n >= 8, 1.0, 0.5).to(tl.float64)
        else:
            shrink = tl.zeros((BLOCK_I,), tl.float64) + lr_baseline
        baseline = tl.where(n >= 3, shrink / (2 * (n - 1)) * of_others, 0.0)
        lr_term = n / (2 * (n - 1) * (n - 1)) * square - baseline
        if LR_CAP:
            others_left = tl.where(n > 2, n - 2, 1.0)
            shrinkage = tl.where(n > 2, others_left / (others_left + shrink), 1.0)
            bound = beta * (n - 1) / n * shrinkage / tl.where(largest > 0, largest, 1.0)
            lr_term *= tl.where((largest > 0) & (bound < lr_weight), bound, lr_weight)
        else:
            lr_term *= lr_weight
        if on_policy_ptr is not None:
            on_policy = tl.load(on_policy_ptr + offs_i, mask=mask_i, other=0) != 0
            lr_term = tl.where(on_policy, lr_term, 0.0)
        coefficients += lr_term

    first = mask_i & (earlier == 0)
    status += tl.where(first, FIRST_OF_GROUP, 0)
    tl.store(raw_coefficients_ptr + offs_i, tl.where(used, coefficients, 0.0), mask=mask_i)
    tl.store(variances_ptr + offs_i, tl.where(first & valid, pairs * squares, 0.0), mask=mask_i)
    tl.store(deviations_ptr + offs_i, tl.abs(deviation), mask=mask_i)
    tl.store(statuses_ptr + offs_i, status, mask=mask_i)


@triton.jit(do_not_specialize=["num_sequences"])
def finalise_kernel(
    # inputs
    rewards_ptr, log_ratios_ptr, sampler_log_ratios_ptr, raw_coefficients_ptr, variances_ptr,
    deviations_ptr, tapers_ptr, statuses_ptr, num_groups_ptr,
    # outputs
    coefficients_ptr, loss_ptr, moments_ptr, counts_ptr,
    # sizes, options and constants
    num_sequences, beta: tl.float64, scale: tl.float64, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One program: sums over rows in a fixed order, then every coefficient by its denominator."""
    reward = tl.zeros((BLOCK_B,), tl.float64)
    log_ratio = tl.zeros((BLOCK_B,), tl.float64)
    variance = tl.zeros((BLOCK_B,), tl.float64)
    largest = tl.zeros((BLOCK_B,), tl.float64)
    num_kept = tl.zeros((BLOCK_B,), tl.int32)
    num_first = tl.zeros((BLOCK_B,), tl.int32)
    num_valid = tl.zeros((BLOCK_B,), tl.int32)
    for start_b in range(0, num_sequences, BLOCK_B):
        offs_b = start_b + tl.arange(0, BLOCK_B)
        mask_b = offs_b < num_sequences
        status = tl.load(statuses_ptr + offs_b, mask=mask_b, other=0)
        kept = (status & KEPT) != 0
        first = (status & FIRST_OF_GROUP) != 0
        valid = first & ((status & IN_VALID_GROUP) != 0)
        rewards = tl.load(rewards_ptr + offs_b, mask=kept, other=0.0).to(tl.float64)
        log_ratios = tl.load(log_ratios_ptr + offs_b, mask=kept, other=0.0)
        reward += rewards
        log_ratio += log_ratios
        variance += tl.load(variances_ptr + offs_b, mask=mask_b, other=0.0)
        largest = tl.maximum(largest, tl.load(deviations_ptr + offs_b, mask=mask_b, other=0.0))
        num_kept += kept.to(tl.int32)
        num_first += first.to(tl.int32)
        num_valid += valid.to(tl.int32)

    rows_kept = tl.sum(num_kept, 0)
    groups_found = tl.sum(num_first, 0)
    groups_valid = tl.sum(num_valid, 0)
    found = tl.where(groups_valid > 1, groups_valid, 1).to(tl.float64)
    denominator = found
    if num_groups_ptr is not None:
        given = tl.load(num_groups_ptr)
        denominator = tl.where(given > 1.0, given, 1.0)
    divisor = tl.where(rows_kept > 1, rows_kept, 1).to(tl.float64)
    total_variance = tl.sum(variance, 0)
    mean_variance = total_variance / found
    tl.store(loss_ptr, 0.5 * scale * total_variance / denominator)
    tl.store(moments_ptr + 0, tl.sum(reward, 0) / divisor)
    tl.store(moments_ptr + 1, tl.sum(log_ratio, 0) / divisor)
    tl.store(moments_ptr + 2, mean_variance)
    tl.store(moments_ptr + 3, mean_variance / (2 * beta * beta))
    tl.store(moments_ptr + 4, tl.max(largest, 0) / (2 * beta))
    tl.store(counts_ptr + 0, groups_valid.to(tl.int64))
    tl.store(counts_ptr + 1, (groups_found - groups_valid).to(tl.int64))
    tl.store(counts_ptr + 2, (num_sequences - rows_kept).to(tl.int64))

    # In the second loop, when the registers of the sums above are free again.
    sampler_log_ratio = tl.zeros((BLOCK_B,), tl.float64)
    taper = tl.zeros((BLOCK_B,), tl.float64)
    num_known = tl.zeros((BLOCK_B,), tl.int32)
    num_lowered = tl.zeros((BLOCK_B,), tl.int32)
    factor = scale / denominator
    for start_b in range(0, num_sequences, BLOCK_B):
        offs_b = start_b + tl.arange(0, BLOCK_B)
        mask_b = offs_b < num_sequences
        coefficients = tl.load(raw_coefficients_ptr + offs_b, mask=mask_b, other=0.0) * factor
        tl.store(coefficients_ptr + offs_b, coefficients, mask=mask_b)
        if sampler_log_ratios_ptr is not None:
            status = tl.load(statuses_ptr + offs_b, mask=mask_b, other=0)
            ratios = tl.load(sampler_log_ratios_ptr + offs_b, mask=mask_b, other=0.0)
            known = ((status & KEPT) != 0) & (tl.abs(ratios) < float("inf"))
            sampler_log_ratio += tl.where(known, ratios, 0.0)
            num_known += known.to(tl.int32)
            if tapers_ptr is not None:
                lowered = (status & LOWERED) != 0
                taper += tl.load(tapers_ptr + offs_b, mask=lowered, other=0.0)
                num_lowered += lowered.to(tl.int32)
    rows_known = tl.sum(num_known, 0)
    rows_lowered = tl.sum(num_lowered, 0)
    mean_taper = tl.sum(taper, 0) / tl.where(rows_lowered > 0, rows_lowered, 1).to(tl.float64)
    divisor = tl.where(rows_known > 0, rows_known, 1).to(tl.float64)
    tl.store(moments_ptr + 5, tl.where(rows_lowered > 0, mean_taper, 1.0))
    tl.store(moments_ptr + 6, tl.sum(sampler_log_ratio, 0) / divisor)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_steps"])
def token_gradients_kernel(
    # inputs
    dloss_ptr, coefficients_ptr, cu_seqlens_ptr,
    # outputs
    dlogprobs_ptr,
    # sizes and constants
    num_tokens, num_sequences, num_steps, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dlogprob_t = dloss * coefficient of the sequence of token t, found by bisection.

    The sequence of t is the number of b >= 1 with cu_seqlens[b] <= t; num_steps halvings of [0, B]
    find it. Tokens after the last sequence get 0.
    """
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    low = tl.zeros((BLOCK_T,), tl.int32)
    high = tl.zeros((BLOCK_T,), tl.int32) + num_sequences
    for _ in range(num_steps):
        middle = (low + high) // 2
        ends = tl.load(cu_seqlens_ptr + middle + 1, mask=low < high, other=0).to(tl.int64)
        before = (low < high) & (ends <= offs_t)
        high = tl.where((low < high) & (ends > offs_t), middle, high)
        low = tl.where(before, middle + 1, low)
    coefficients = tl.load(coefficients_ptr + low, mask=mask_t & (low < num_sequences), other=0.0)
    dloss = tl.load(dloss_ptr).to(tl.float64)
    dlogprobs = dloss * coefficients
    if dlogprobs_ptr.dtype.element_ty != tl.float64:
        dlogprobs = dlogprobs.to(tl.float32)  # there is no direct way from float64 to bf16
    tl.store(dlogprobs_ptr + offs_t, dlogprobs.to(dlogprobs_ptr.dtype.element_ty), mask=mask_t)


def agro_coefficients(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, groups: Tensor, options: AgroOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (B,), moments (7,) float64, counts (3,) int64; `AgroStats` has both in it."""
    all_double = rewards.dtype == logprobs.dtype == ref_logprobs.dtype == torch.float64
    coefficients, _, moments, counts = _from_log_ratios(
        AgroRows.of_sums(rewards, logprobs, ref_logprobs, groups, options.sampling_logprobs),
        options,
        coefficients_dtype=torch.float64 if all_double else torch.float32,
        loss_dtype=torch.float64,
    )
    return coefficients, moments, counts


def agro_loss_fwd(tokens: AgroTokens, options: AgroOptions) -> tuple[Tensor, Tensor]:
    """Loss, 0-d, and the coefficients (B,) float64 that the backward needs."""
    logprobs, ref_logprobs, rewards, groups, cu_seqlens = tokens
    num_sequences = rewards.shape[0]
    log_ratios = torch.empty(num_sequences, dtype=torch.float64, device=rewards.device)
    sampled = options.sampling_logprobs
    sampler_log_ratios = None if sampled is None else torch.empty_like(log_ratios)
    if num_sequences > 0:
        with torch.cuda.device_of(rewards):
            sequence_log_ratios_kernel[(num_sequences,)](
                logprobs_ptr=logprobs.contiguous(),
                ref_logprobs_ptr=ref_logprobs.contiguous(),
                cu_seqlens_ptr=cu_seqlens.contiguous(),
                sampling_logprobs_ptr=contiguous(sampled),
                log_ratios_ptr=log_ratios,
                sampler_log_ratios_ptr=sampler_log_ratios,
                num_tokens=logprobs.shape[0],
                BLOCK_T=BLOCK_T,
            )
    coefficients, loss, _, _ = _from_log_ratios(
        AgroRows(rewards, groups, log_ratios, sampler_log_ratios),
        options,
        coefficients_dtype=torch.float64,
        loss_dtype=results_dtype(logprobs),
    )
    return loss, coefficients


def agro_loss_bwd(
    dloss: Tensor, coefficients: Tensor, cu_seqlens: Tensor, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """dlogprobs (N,): every token of a sequence gets its sequence's coefficient."""
    num_sequences = coefficients.shape[0]
    dlogprobs = torch.empty(num_tokens, dtype=dtype, device=coefficients.device)
    if num_tokens > 0:
        with torch.cuda.device_of(coefficients):
            token_gradients_kernel[(triton.cdiv(num_tokens, BLOCK_T),)](
                dloss_ptr=dloss,
                coefficients_ptr=coefficients,
                cu_seqlens_ptr=cu_seqlens.contiguous(),
                dlogprobs_ptr=dlogprobs,
                num_tokens=num_tokens,
                num_sequences=num_sequences,
                num_steps=num_sequences.bit_length(),
                BLOCK_T=BLOCK_T,
            )
    return dlogprobs


def _from_log_ratios(
    rows: AgroRows,
    options: AgroOptions,
    *,
    coefficients_dtype: torch.dtype,
    loss_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients (B,), loss, moments and counts."""
    rewards, groups, log_ratios, sampler_log_ratios = rows
    num_sequences, device = rewards.shape[0], rewards.device
    row_taper = options.row_taper if options.tapers else None
    if row_taper is not None:
        # A row whose exponent is negative or NaN is dropped like one without a log-ratio.
        log_ratios = log_ratios.where(row_taper >= 0, math.nan)
    raw_coefficients = torch.empty(num_sequences, dtype=torch.float64, device=device)
    # What both kernels take: the inputs of the first, and what it writes and the second reads.
    shared = {
        "rewards_ptr": rewards.contiguous(),
        "log_ratios_ptr": log_ratios,
        "sampler_log_ratios_ptr": sampler_log_ratios,
        "raw_coefficients_ptr": raw_coefficients,
        "variances_ptr": torch.empty_like(raw_coefficients),
        "deviations_ptr": torch.empty_like(raw_coefficients),
        "tapers_ptr": torch.empty_like(raw_coefficients) if options.tapers else None,
        "statuses_ptr": torch.empty(num_sequences, dtype=torch.int32, device=device),
    }
    coefficients = torch.empty(num_sequences, dtype=coefficients_dtype, device=device)
    loss = torch.empty((), dtype=loss_dtype, device=device)
    moments = torch.empty(7, dtype=torch.float64, device=device)
    counts = torch.empty(3, dtype=torch.int64, device=device)
    with torch.cuda.device_of(rewards):
        if num_sequences > 0:
            group_statistics_kernel[(triton.cdiv(num_sequences, BLOCK_I),)](
                **shared,
                groups_ptr=groups.contiguous(),
                on_policy_ptr=contiguous(options.on_policy),
                weights_ptr=contiguous(options.importance_weights),
                row_taper_ptr=contiguous(row_taper),
                num_sequences=num_sequences,
                beta=options.beta,
                lr_weight=options.lr_weight,
                lr_baseline=0.0 if options.lr_baseline is None else options.lr_baseline,
                taper=options.taper,
                HAS_LR=options.lr_weight > 0,
                LR_CAP=options.lr_cap,
                AUTO_BASELINE=options.lr_baseline is None,
                BLOCK_I=BLOCK_I,
                BLOCK_J=BLOCK_J,
            )
        finalise_kernel[(1,)](
            **shared,
            num_groups_ptr=None if options.num_groups is None else options.num_groups.double(),
            coefficients_ptr=coefficients,
            loss_ptr=loss,
            moments_ptr=moments,
            counts_ptr=counts,
            num_sequences=num_sequences,
            beta=options.beta,
            scale=options.scale,
            BLOCK_B=BLOCK_B,
        )
    return coefficients, loss, moments, counts
