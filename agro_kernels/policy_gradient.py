"""KL-regularised policy gradients as coefficients: what AGRO is compared with.

On policy, every form but k3's is the gradient of -(E r - beta KL(pi || pi_ref)). Off policy they
differ: with the group's mean of the whole regularised reward as baseline, recomputed at the current
policy, the policy gradient *is* AGRO up to a factor beta, whatever the data; every other form below
that does not reweight its samples has another fixed point than the optimum
pi_ref * exp(r / beta) / Z. So a comparison has to name its form: there is no default.

Two customary forms have no coefficient per sequence and are not here. A baseline on the rewards
with the exact gradient of KL(pi || pi_ref), summed over the whole vocabulary or response space,
needs the full distribution: subtract (r_i - mean(r)) / (n - 1) * logprob_i and add beta * KL by
autograd. Clipped per-token ratios (GRPO, Dr. GRPO) have another objective, normalised by standard
deviations or lengths.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from agro_kernels._torch.agro_loss import check_cu_seqlens, group_index
from agro_kernels.agro_options import AgroOptions, check_sequences, check_tokens
from agro_kernels.arguments import results_dtype

# exp of more nats overflows fp32. A weight of this size outweighs every other one already, so that
# clipping the log-ratio here changes nothing.
MAX_LOG_WEIGHT = 80.0


class PolicyGradientForm(NamedTuple):
    definition: str
    """Coefficient of row i in a group of n, as a loss; l = log(pi / pi_ref), R = r - beta * l."""
    optimum_is_fixed_point_off_policy: bool
    """Whether the expected update vanishes at pi_ref * exp(r / beta) / Z on any data."""
    needs_sampling_logprobs: bool


POLICY_GRADIENT_FORMS: dict[str, PolicyGradientForm] = {
    "loo": PolicyGradientForm(
        "-(R_i - mean of the others' R) / n, which is AGRO's coefficient / beta", True, False
    ),
    "no_baseline": PolicyGradientForm("-R_i / n", False, False),
    "reward_baseline_k2": PolicyGradientForm(
        "-(r_i - mean of the others' r) / n + beta * l_i / n", False, False
    ),
    "reward_baseline_k3": PolicyGradientForm(
        "-(r_i - mean of the others' r) / n + beta * (1 - exp(-l_i)) / n, the gradient of k3 as a "
        "loss: on policy that of KL(pi_ref || pi), with another optimum already there",
        False,
        False,
    ),
    "stale": PolicyGradientForm(
        "-(S_i - mean of the others' S) / n, S = r - beta * log(pi_sampling / pi_ref): the KL is "
        "frozen when the samples are made, and is 0 for samples of pi_ref",
        False,
        True,
    ),
    "importance_weighted": PolicyGradientForm(
        "-w_i * (R_i - mean of the others' R) / n, w = pi / pi_sampling", True, True
    ),
}


@torch.no_grad()
def policy_gradient_coefficients(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    groups: Tensor,
    *,
    beta: float,
    form: str,
    sampling_logprobs: Tensor | None = None,
    num_groups: int | Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """What to multiply each sequence's log-probability with, so that minimising the sum is `form`.

    Args:
        rewards, logprobs, ref_logprobs, groups, beta, num_groups, scale: as for
            `agro_coefficients`; these coefficients are the size of AGRO's at scale = 1 / beta.
        form: a key of `POLICY_GRADIENT_FORMS`, which holds each definition. When the samples are
            from the current policy every form but "reward_baseline_k3" is the same gradient in
            expectation ("stale": at the first step after sampling). k3 is that of whole sequences,
            not of tokens. Exponents are limited to MAX_LOG_WEIGHT = 80 nats.
        sampling_logprobs: (B,) sums of token log-probabilities under the policy that made the
            samples, at the time. Read by "stale" and "importance_weighted" only.

    Returns:
        (B,), no gradient, fp32 (float64 if rewards, logprobs and ref_logprobs all are), divided
        by the number of valid groups. Rows with a non-finite input are left out of their group
        and get exactly 0, and so do groups with fewer than two valid rows, in every form.
    """
    if form not in list(POLICY_GRADIENT_FORMS):
        raise ValueError(
            f"form: expected one of {', '.join(POLICY_GRADIENT_FORMS)}, got {form!r}; "
            "POLICY_GRADIENT_FORMS holds their definitions"
        )
    check_sequences(rewards, groups, logprobs=logprobs, ref_logprobs=ref_logprobs)
    options = AgroOptions.of(rewards, beta=beta, scale=scale, num_groups=num_groups)
    if sampling_logprobs is not None:
        check_sequences(rewards, groups, sampling_logprobs=sampling_logprobs)
    all_double = rewards.dtype == logprobs.dtype == ref_logprobs.dtype == torch.float64

    reward = rewards.double()
    log_ratio = logprobs.double() - ref_logprobs.double()
    kept = reward.isfinite() & log_ratio.isfinite()
    if POLICY_GRADIENT_FORMS[form].needs_sampling_logprobs:
        if sampling_logprobs is None:
            raise ValueError(
                f"sampling_logprobs: expected (B,) = {tuple(rewards.shape)} for form {form!r}, got "
                "None; record them when sampling"
            )
        sampled = sampling_logprobs.double()
        kept &= sampled.isfinite()
    in_groups = _Groups(groups, kept)
    reward, log_ratio = reward.where(kept, 0.0), log_ratio.where(kept, 0.0)
    regularized = reward - beta * log_ratio

    if form == "loo":
        advantage = in_groups.less_others(regularized)
    elif form == "no_baseline":
        advantage = regularized
    elif form == "reward_baseline_k2":
        advantage = in_groups.less_others(reward) - beta * log_ratio
    elif form == "reward_baseline_k3":
        k3_slope = 1 - (-log_ratio).clamp(max=MAX_LOG_WEIGHT).exp()
        advantage = in_groups.less_others(reward) - beta * k3_slope
    elif form == "stale":
        frozen = (sampled - ref_logprobs.double()).where(kept, 0.0)
        advantage = in_groups.less_others(reward - beta * frozen)
    else:
        weight = (logprobs.double() - sampled).where(kept, 0.0).clamp(max=MAX_LOG_WEIGHT).exp()
        advantage = weight * in_groups.less_others(regularized)
    coefficients = in_groups.mean_loss(advantage, options)
    return coefficients.to(torch.float64 if all_double else torch.float32)


@torch.no_grad()
def reward_to_go_coefficients(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    groups: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float,
    on_policy: Tensor,
    num_groups: int | Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """AGRO's pathwise coefficients token by token, each seeing only the log-ratios from itself on.

    With l_u the log-ratio of token u, R_{i,t} = r_i - beta * sum_{u >= t} l_{i,u}, and R_{i,t} =
    r_i past the end of sequence i,

        c_{i,t} = -beta / n * (R_{i,t} - mean over the others of R_{j,t})

    On policy, the same expected gradient as `agro_coefficients` with lr_weight 0, since earlier
    log-ratios are independent of a token's score; less noise far from the optimum, more near it,
    where the sequence form has none. Off policy it is biased, with another fixed point, and
    refused.

    Args:
        logprobs, ref_logprobs, rewards, groups, cu_seqlens: as for `agro_loss`.
        beta, num_groups, scale: as for `agro_coefficients`.
        on_policy: (B,) bool, must all be True: which sequences the current policy has made.

    Returns:
        (N,), no gradient, fp32 (float64 if logprobs is). Tokens of dropped sequences and of
        groups with fewer than two valid ones get exactly 0.

    Reads on_policy and cu_seqlens on the host: on a GPU this waits for the device.
    """
    check_sequences(rewards, groups)
    check_tokens(cu_seqlens, rewards, logprobs=logprobs, ref_logprobs=ref_logprobs)
    options = AgroOptions.of(
        rewards, beta=beta, scale=scale, num_groups=num_groups, on_policy=on_policy
    )
    check_cu_seqlens(cu_seqlens, logprobs.shape[0])
    num_stale = int((~on_policy).sum())
    if num_stale > 0:
        raise ValueError(
            f"on_policy: expected all True, got {num_stale} of {on_policy.shape[0]} False; the "
            "reward-to-go form is biased off policy, use agro_coefficients"
        )
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() > 0 else 0
    counted = torch.arange(longest, device=logprobs.device) < lengths[:, None]
    log_ratios = torch.zeros(counted.shape, dtype=torch.float64, device=logprobs.device)
    log_ratios[counted] = logprobs.double() - ref_logprobs.double()
    kept = rewards.isfinite() & log_ratios.isfinite().all(1)
    log_ratios = log_ratios.where(kept[:, None], 0.0)
    reward = rewards.double().where(kept, 0.0)
    to_go = reward[:, None] - beta * log_ratios.flip(1).cumsum(1).flip(1)

    in_groups = _Groups(groups, kept)
    advantage = beta * in_groups.less_others(to_go)
    coefficients = in_groups.mean_loss(advantage, options)[counted]
    return coefficients.to(results_dtype(logprobs))


class _Groups:
    """Means over the kept rows of each group, of values (B,) or (B, T) that are 0 elsewhere."""

    def __init__(self, groups: Tensor, kept: Tensor) -> None:
        self.index = group_index(groups)
        size = self._sum(kept.double())
        self.num_valid = (torch.zeros_like(size).index_put_((self.index,), size) >= 2).sum()
        self.used = kept & (size >= 2)
        self.size = size.clamp(min=2)  # mean_loss sets the rows of smaller groups to 0

    def less_others(self, values: Tensor) -> Tensor:
        """Each row less the mean of its group's other rows: n / (n - 1) times its deviation."""
        size = _like(self.size, values)
        deviation = values - self._sum(values) / size
        return size / (size - 1) * deviation

    def mean_loss(self, advantage: Tensor, options: AgroOptions) -> Tensor:
        """-advantage / n, averaged over groups, times the scale, and 0 where not kept."""
        count = self.num_valid if options.num_groups is None else options.num_groups
        count = count.double().clamp(min=1)
        coefficients = -advantage / _like(self.size, advantage) * (options.scale / count)
        return coefficients.where(_like(self.used, advantage), 0.0)

    def _sum(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add_(0, self.index, values)[self.index]


def _like(per_row: Tensor, values: Tensor) -> Tensor:
    """(B,) shaped to broadcast against (B,) or (B, T)."""
    return per_row.reshape(-1, *[1] * (values.ndim - 1))
