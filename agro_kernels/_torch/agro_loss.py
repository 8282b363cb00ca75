"""The AGRO ops in plain torch, float64 throughout: serves every device without a faster kernel.

Groups are renumbered by a sort and summed by index, so nothing waits for the
device and no (B, B) table is formed.
"""

import math

import torch
from torch import Tensor

from agro_kernels.agro_options import AgroOptions, AgroRows, AgroTokens
from agro_kernels.arguments import results_dtype


def agro_coefficients(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, groups: Tensor, options: AgroOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (B,), moments (7,) float64, counts (3,) int64; `AgroStats` has both in it."""
    all_double = rewards.dtype == logprobs.dtype == ref_logprobs.dtype == torch.float64
    rows = AgroRows.of_sums(rewards, logprobs, ref_logprobs, groups, options.sampling_logprobs)
    coefficients, _, moments, counts = _from_log_ratios(rows, options)
    return coefficients.to(torch.float64 if all_double else torch.float32), moments, counts


def agro_loss_fwd(tokens: AgroTokens, options: AgroOptions) -> tuple[Tensor, Tensor]:
    """Loss, 0-d, and the coefficients (B,) float64 that the backward needs."""
    logprobs, ref_logprobs, rewards, groups, cu_seqlens = tokens
    check_cu_seqlens(cu_seqlens, logprobs.shape[0])
    owner = sequence_of_token(cu_seqlens, logprobs.shape[0])

    def per_sequence(values: Tensor) -> Tensor:
        return values.new_zeros(rewards.shape[0]).index_add_(0, owner, values)

    # The log-ratio of every token comes first: two sums of thousands of nats would cancel.
    log_ratios = per_sequence(logprobs.double() - ref_logprobs.double())
    sampled, sampler_log_ratios = options.sampling_logprobs, None
    if sampled is not None:
        sampler_log_ratios = per_sequence(logprobs.double()) - sampled.double()
    rows = AgroRows(rewards, groups, log_ratios, sampler_log_ratios)
    coefficients, loss, _, _ = _from_log_ratios(rows, options)
    return loss.to(results_dtype(logprobs)), coefficients


def agro_loss_bwd(
    dloss: Tensor, coefficients: Tensor, cu_seqlens: Tensor, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """dlogprobs (N,): every token of a sequence gets its sequence's coefficient."""
    owner = sequence_of_token(cu_seqlens, num_tokens)
    return (coefficients * dloss.double()).to(dtype)[owner]


def group_index(groups: Tensor) -> Tensor:
    """Group ids renumbered to 0, 1, ... in ascending order of id, (B,) int64."""
    ordered, order = torch.sort(groups)
    starts = torch.ones_like(ordered, dtype=torch.int64)
    starts[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(starts).scatter_(0, order, starts.cumsum(0) - 1)


def _from_log_ratios(rows: AgroRows, options: AgroOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients (B,), loss, moments and counts; all float64."""
    rewards, groups, log_ratios, sampler_log_ratios = rows
    beta, importance_weights = options.beta, options.importance_weights
    rewards = rewards.double()
    weights = (
        torch.ones_like(rewards) if importance_weights is None else importance_weights.double()
    )
    kept = rewards.isfinite() & log_ratios.isfinite() & weights.isfinite() & (weights >= 0)
    if options.tapers and options.row_taper is not None:
        kept &= options.row_taper >= 0
    # Selected, not multiplied: a mask times NaN is NaN.
    rewards, log_ratios = rewards.where(kept, 0.0), log_ratios.where(kept, 0.0)
    weights = weights.where(kept, 0.0)
    regularized = rewards - beta * log_ratios

    group = group_index(groups)

    def per_group(values: Tensor) -> Tensor:
        return torch.zeros_like(rewards).index_add_(0, group, values)

    size = per_group(kept.double())
    valid = size >= 2
    weight = per_group(weights)
    mean = per_group(weights * regularized) / weight.where(weight > 0, 1.0)
    deviation = (regularized - mean[group]).where(kept & valid[group], 0.0)
    squares = per_group(weights * deviation**2)
    n = size.clamp(min=2)  # rows of smaller groups are set to 0 at the end
    variance = (weight * squares / (n * (n - 1))).where(valid, 0.0)

    coefficients = -beta * weights * deviation * (weight / (n * (n - 1)))[group]
    taper_weight, sampler_log_ratio = rewards.new_ones(()), rewards.new_zeros(())
    if sampler_log_ratios is not None:
        known = kept & sampler_log_ratios.isfinite()
        sampler_log_ratios = sampler_log_ratios.where(known, 0.0)
        sampler_log_ratio = sampler_log_ratios.sum() / known.sum().clamp(min=1)
        if options.tapers:
            lowered = coefficients > 0
            tapers = taper_weights(sampler_log_ratios, options).where(known & lowered, 1.0)
            coefficients = coefficients * tapers
            mean_taper = tapers.where(lowered, 0.0).sum() / lowered.sum().clamp(min=1)
            taper_weight = mean_taper.where(lowered.any(), 1.0)
    if options.lr_weight > 0:
        lr_term = _likelihood_ratio_term(deviation, squares[group], n[group], group, options)
        coefficients = coefficients + lr_term

    counted = torch.stack(
        [valid.sum(), (per_group(torch.ones_like(size)) > 0).sum() - valid.sum(), (~kept).sum()]
    )
    count = counted[0] if options.num_groups is None else options.num_groups
    denominator = count.double().clamp(min=1)
    coefficients = coefficients.where(kept & valid[group], 0.0) * (options.scale / denominator)
    loss = 0.5 * options.scale * variance.sum() / denominator
    num_kept = kept.sum().clamp(min=1)
    mean_variance = variance.sum() / counted[0].clamp(min=1)
    largest_deviation = torch.cat([deviation.new_zeros(1), deviation.abs()]).max()
    moments = torch.stack(
        [
            rewards.sum() / num_kept,
            log_ratios.sum() / num_kept,
            mean_variance,
            mean_variance / (2 * beta**2),
            largest_deviation / (2 * beta),
            taper_weight,
            sampler_log_ratio,
        ]
    )
    return coefficients, loss, moments, counted


def taper_weights(sampler_log_ratios: Tensor, options: AgroOptions) -> Tensor:
    """min(1, pi / mu) ** taper, (B,) float64, of finite log(pi / mu) (B,); 0 where taper is inf."""
    shortfall = sampler_log_ratios.clamp(max=0.0)
    if options.row_taper is None:
        if options.taper == math.inf:
            return torch.zeros_like(shortfall)
        return (options.taper * shortfall).exp()
    one_sided = options.row_taper == math.inf  # apart, because inf * 0 is NaN
    exponents = options.row_taper.double().where(~one_sided, 0.0)
    return (exponents * shortfall).exp().where(~one_sided, 0.0)


def _likelihood_ratio_term(
    deviation: Tensor, squares: Tensor, n: Tensor, group: Tensor, options: AgroOptions
) -> Tensor:
    """The coefficients' likelihood-ratio term (B,), weighted, capped, and 0 off policy.

    All (B,): the deviation of each row, and of its group the sum of squares, the size, the index.
    """
    of_others = (squares - n / (n - 1) * deviation**2) / (n - 2).clamp(min=1)
    shrink = (
        torch.where(n >= 8, 1.0, 0.5)
        if options.lr_baseline is None
        else torch.full_like(n, options.lr_baseline)
    )
    baseline = (shrink / (2 * (n - 1)) * of_others).where(n >= 3, 0.0)
    lr_term = n / (2 * (n - 1) ** 2) * deviation**2 - baseline
    if options.lr_cap:
        largest = torch.zeros_like(n).scatter_reduce_(0, group, deviation, "amax")[group]
        others_left = (n - 2).clamp(min=1)
        shrinkage = torch.where(n >= 3, others_left / (others_left + shrink), 1.0)
        bound = options.beta * (n - 1) / n * shrinkage / largest
        weight = bound.clamp(max=options.lr_weight).where(largest > 0, options.lr_weight)
        lr_term = lr_term * weight
    else:
        lr_term = lr_term * options.lr_weight
    return lr_term if options.on_policy is None else lr_term.where(options.on_policy, 0.0)


def sequence_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Which sequence each of the N packed tokens belongs to, (N,) int64."""
    rows = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(rows, cu_seqlens.diff().long(), output_size=num_tokens)


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raise unless the values make sense; on the CPU only, since reading them waits for a GPU."""
    if cu_seqlens.device.type != "cpu":
        return
    rising = bool((cu_seqlens.diff() >= 0).all())
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != num_tokens or not rising:
        raise ValueError(
            f"cu_seqlens: expected values rising from 0 to N = {num_tokens}, got {first} to {last}"
            f"{'' if rising else ', falling in between'}; pack_sequences makes them"
        )
