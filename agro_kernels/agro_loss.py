"""AGRO: the variance, within a group of generations of one prompt, of the regularised reward.

For a generation y of prompt x, with log-ratio l = log pi(y|x) - log pi_ref(y|x),

    R = r - beta * l                              the regularised reward
    loss = mean over prompts of Var(R) / 2        the variance over generations of the same prompt

(Tang et al. 2025, arXiv 2503.19612). R is the same for every generation exactly when pi is the
optimum pi_ref * exp(r / beta) / Z, so the loss is zero there, whoever wrote the generations: they
need not come from the policy, and no importance weights are needed.

How it differs from GRPO and the like:

* the log-ratio sits inside the variance, not in a penalty beside it, so off-policy data have the
  same optimum as on-policy data;
* no division by a standard deviation, no clipping, no length normalisation;
* a group whose rewards are all equal still has a gradient: it pulls pi back to pi_ref.

On policy the sampling law moves too. `lr_weight` adds that likelihood-ratio term: 1.0 gives the
exact gradient of the on-policy loss, 0.0 (the default) is beta times the KL-regularised policy
gradient. Read the warning at `agro_coefficients` before using it.

On recorded generations the loss asks for differences of log-ratios within a group, and nothing
holds their common level: a language model can lower the bad ones and lose the good ones with them.
`taper` lowers a generation only as far as the policy still gives it what its sampler gave it, with
the same optimum. The taper is this project's, not the paper's; docs/losses.md has the proof.

Everything the gradient needs is one number a sequence, so there are two ways in: `agro_loss`, one
differentiable call, and `agro_coefficients`, the numbers themselves for a trainer that splits its
batch. Both give the same gradient.
"""

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

import agro_kernels.ops  # noqa: F401  (registers the ops)
from agro_kernels.agro_options import (
    AgroKeywords,
    AgroOptions,
    AgroTokens,
    LinearAgroKeywords,
    check_sequences,
    check_tokens,
)
from agro_kernels.head import HeadOptions, check_names
from agro_kernels.linear_logprobs import linear_logprobs
from agro_kernels.ops.derivatives import refuse_forward_mode


class AgroStats(NamedTuple):
    """What to log of a batch. 0-d tensors on the batch's device: reading one waits for the device.

    Rows are sequences. `agro_coefficients` says which are kept; a group is valid if it has at least
    two kept rows. A mean over nothing is 0, but that of taper_weight is 1.
    """

    reward: Tensor
    """Mean reward of the kept rows, float64."""
    log_ratio: Tensor
    """Mean log(pi / pi_ref) of the kept rows, nats a sequence, float64. On policy: KL to ref."""
    variance: Tensor
    """Mean over valid groups of the unbiased variance v of R, reward squared, float64."""
    kl_to_optimum: Tensor
    """variance / (2 beta^2), nats, float64: near the optimum and on policy, KL(pi || optimum)."""
    lr_dominance: Tensor
    """max |R_i - group mean| / (2 beta), float64: size of the likelihood-ratio term at lr_weight 1
    relative to the pathwise one, at the worst row. Above 1, read the warning."""
    num_groups: Tensor
    """Valid groups, int64."""
    num_short_groups: Tensor
    """Groups with fewer than two kept rows, which contribute nothing, int64."""
    num_dropped: Tensor
    """Rows that were not kept, int64."""
    taper_weight: Tensor
    """Mean taper weight t of the rows with d < 0 in valid groups, float64; 1 without a taper."""
    sampler_log_ratio: Tensor
    """Mean log(pi / mu) of the kept rows with finite sampling_logprobs, nats, float64."""


class AgroCoefficients(NamedTuple):
    coefficients: Tensor
    """(B,), no gradient: minimise sum_b coefficients[b] * logprob of sequence b."""
    stats: AgroStats


def agro_coefficients(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    groups: Tensor,
    *,
    beta: float,
    lr_weight: float = 0.0,
    lr_cap: bool = False,
    on_policy: Tensor | None = None,
    lr_baseline: float | str = "auto",
    importance_weights: Tensor | None = None,
    num_groups: int | Tensor | None = None,
    scale: float = 1.0,
    sampling_logprobs: Tensor | None = None,
    taper: float | Tensor = 0.0,
) -> AgroCoefficients:
    """What to multiply each sequence's log-probability with, so that minimising the sum is AGRO.

    For one group of n, with R_i = r_i - beta * log(pi / pi_ref)_i and d_i = R_i - mean(R),

        c_i = -beta * d_i / (n - 1) * t_i                                  pathwise, tapered
            + lr_weight * n / (2 (n-1)^2) * d_i^2                          likelihood ratio,
            - lr_weight * lr_baseline / (2 (n-1)) * v_{-i}                 on-policy rows only

    where t_i = min(1, pi / mu)_i ^ taper if d_i < 0, else 1, mu being the law that sampled row i,
    and v_{-i} is the unbiased variance of R over the other n - 1 rows; then times `scale` and
    divided by the number of groups. This is a loss: a negative coefficient raises the
    probability. sum_b c_b * logprob_b may be split over micro-batches and devices at will, and a
    group with it, as long as the coefficients came from whole groups. Everything is float64 inside.

    Warning. With lr_weight 1 the loss also falls when the policy becomes deterministic, right or
    wrong. For 0/1 rewards at pi = pi_ref and success rate p, success minus failure is
    -beta + (1 - 2p) / 2 in expectation: below p = 1/2 - beta the exact on-policy gradient lowers
    the success rate. `lr_cap` bounds the term, `AgroStats.lr_dominance` shows its size.

    Args:
        rewards: (B,) any float dtype.
        logprobs: (B,) any float dtype: sum of token log-probabilities of each sequence under the
            current policy, nats. Recompute after every optimiser step. Sums of thousands of nats
            lose their difference in fp32: sum in float64, or pass the summed log-ratio here and
            zeros as ref_logprobs.
        ref_logprobs: (B,) the same of the reference policy: same tokens, mask and temperature.
        groups: (B,) integers: equal for sequences of the same prompt. Any values, rows in any
            order, groups of any sizes.
        beta: strength of the KL regularisation, > 0, in units of reward.
        lr_weight: weight of the likelihood-ratio term, >= 0.
        lr_cap: lower a group's lr_weight to the largest value at which, among rows of one kind
            (on-policy or not), a better R still never has a larger coefficient:
            beta / max_i d_i * (n - 1) (n - 2) / (n (n - 2 + lr_baseline)), (n - 1) / n in place of
            the fraction for n = 2. No longer an unbiased gradient of the on-policy loss, but free
            of its wrong turns.
        on_policy: (B,) bool: rows sampled from the current policy, which alone get the
            likelihood-ratio term. None: all are.
        lr_baseline: in [0, 1]: unbiased at every value, which only moves the variance. "auto"
            goes by the group's number of kept rows: 0.5 from 3 to 7, 1 from 8. Groups of two
            always have 0.
        importance_weights: (B,) w >= 0, for instance min(pi / mu, cap). The coefficient becomes
            -beta * w_i * sum(w) * (R_i - weighted mean) / (n (n - 1)): off-policy AGRO on data
            reweighted by w, with the same optimum. Needs lr_weight 0.
        num_groups: the number to divide by, if not the number of valid groups found here: the
            global count when this call holds only some of the groups. A count below 1 is taken as
            1.
        scale: factor on everything, > 0. 1 / beta gives the size of a policy gradient.
        sampling_logprobs: (B,) any float dtype, nats: log mu, the sum of token log-probabilities of
            each sequence under whatever sampled it, at the time. If logprobs holds summed
            log-ratios to the reference, so must this, log(mu / pi_ref), which is 0 for samples of
            the reference. NaN or infinite: unknown, and the row is not tapered. None: no row is,
            whatever taper says.
        taper: exponent >= 0 of t_i. The weight is a constant: no gradient flows through it. 0 is
            AGRO as it stands, 1 the ratio itself, and inf gives t_i = 0 in every row with d_i < 0
            and a known sampler, also where pi >= mu (one-sided AGRO; on the policy's own samples,
            pi = mu but for rounding, a limit would be 0 or 1 by chance). A tensor (B,) of any float
            dtype has an exponent for each row: 1 / length makes it the ratio per token. Whatever
            the exponents, the optimum is the same from any data; while pi = mu every finite one
            gives AGRO. With importance_weights the same t_i multiply their coefficients. TOPR
            tapers policy gradients in this way and AsymRE shifts their baseline; neither has the
            KL inside, and neither this optimum.

    Returns:
        coefficients (B,) fp32 (float64 if rewards, logprobs and ref_logprobs all are), and the
        stats. Rows whose reward, log-ratio or importance weight is not finite (or whose weight is
        negative, or whose entry in a tensor taper is negative or NaN) are left out of their group
        before anything is computed, get exactly 0 and are counted. So do the rows of groups with
        fewer than two kept rows.
    """
    check_sequences(rewards, groups, logprobs=logprobs, ref_logprobs=ref_logprobs)
    options = AgroOptions.of(
        rewards,
        beta=beta,
        lr_weight=lr_weight,
        lr_cap=lr_cap,
        on_policy=on_policy,
        lr_baseline=lr_baseline,
        importance_weights=importance_weights,
        num_groups=num_groups,
        scale=scale,
        sampling_logprobs=sampling_logprobs,
        taper=taper,
    )
    coefficients, moments, counts = torch.ops.agro.agro_coefficients(
        rewards.detach(), logprobs.detach(), ref_logprobs.detach(), groups, *options
    )
    means = moments.unbind()  # the last two are the taper's
    stats = AgroStats(*means[:5], *counts.unbind(), *means[5:])
    return AgroCoefficients(coefficients, stats)


def agro_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    groups: Tensor,
    cu_seqlens: Tensor,
    **options: Unpack[AgroKeywords],
) -> Tensor:
    """Half the variance of the regularised reward within groups, averaged over groups.

    With the default options the same value and gradient as

        lengths = cu_seqlens.diff().tolist()
        log_ratio = torch.stack([t.sum() for t in (logprobs - ref_logprobs).split(lengths)])
        R = rewards - beta * log_ratio
        loss = torch.stack([R[groups == g].var() / 2 for g in groups.unique()]).mean()

    `lr_weight` and `taper` change the gradient and not the value, which stays half the variance of
    every row. The gradient of each token is the coefficient of its sequence, see
    `agro_coefficients`, which also says what the options mean.

    Args:
        logprobs: (N,) any float dtype, nats: log-probabilities of the tokens of all B sequences,
            end to end (`pack_sequences` packs padded ones).
        ref_logprobs: (N,) the same tokens under the reference policy, same temperature.
        rewards: (B,) any float dtype.
        groups: (B,) integers: equal for sequences of the same prompt.
        cu_seqlens: (B + 1,) int32 or int64: sequence b is tokens cu_seqlens[b]:cu_seqlens[b + 1].
            On CUDA the values cannot be checked without waiting for the device: a sequence with
            bounds outside 0..N is dropped there, on CPU it is an error.
        beta, lr_weight, lr_cap, on_policy, lr_baseline, importance_weights, num_groups, scale,
        sampling_logprobs, taper: as for `agro_coefficients`, sampling_logprobs being (B,) sums
            of token log-probabilities.

    Returns:
        0-d, fp32 (float64 if logprobs is). 0 if no group has two valid sequences.

    Gradients flow to logprobs only. The log-ratio is formed token by token and then summed, both in
    float64. Tokens that are 0.0 in logprobs and in ref_logprobs, as ignored ones are, add nothing
    to it; `linear_logprobs` passes on no gradient to them. A sequence that holds a NaN or infinite
    log-ratio is dropped, and all its tokens get gradient 0.
    """
    check_names("agro_loss", options, AgroKeywords)
    check_sequences(rewards, groups)
    check_tokens(cu_seqlens, rewards, logprobs=logprobs, ref_logprobs=ref_logprobs)
    record = AgroOptions.of(rewards, **options)
    tokens = AgroTokens(logprobs, ref_logprobs, rewards, groups, cu_seqlens)
    return _loss_of_tokens(tokens, record)


def linear_agro_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    groups: Tensor,
    cu_seqlens: Tensor,
    **options: Unpack[LinearAgroKeywords],
) -> Tensor:
    """`agro_loss` straight from hidden states, the logits never stored.

    Same result as

        logprobs = linear_logprobs(hidden, weight, targets, bias=bias, temperature=temperature, ...)
        loss = agro_loss(logprobs, ref_logprobs, rewards, groups, cu_seqlens, beta=beta, ...)

    Args:
        hidden: (N, D), weight: (V, D), targets: (N,) and options of the head, bias, temperature
            and the like: as for `linear_logprobs`. hidden[t] is the state that predicts targets[t].
        ref_logprobs: (N,). Must be 0.0 where targets == ignore_index, as `linear_logprobs` makes
        it. rewards, groups, cu_seqlens and the other options: as for `agro_loss`.

    Returns:
        0-d, fp32 (float64 if hidden is).

    Gradients flow to hidden, weight and bias.
    """
    check_names("linear_agro_loss", options, LinearAgroKeywords)
    check_sequences(rewards, groups)
    check_tokens(cu_seqlens, rewards, targets=targets, ref_logprobs=ref_logprobs)
    of_loss: Any = {k: v for k, v in options.items() if k in AgroKeywords.__annotations__}
    of_head: Any = {k: v for k, v in options.items() if k in HeadOptions.__annotations__}
    record = AgroOptions.of(rewards, **of_loss)
    logprobs = linear_logprobs(hidden, weight, targets, **of_head)
    tokens = AgroTokens(logprobs, ref_logprobs, rewards, groups, cu_seqlens)
    return _loss_of_tokens(tokens, record)


def _loss_of_tokens(tokens: AgroTokens, options: AgroOptions) -> Tensor:
    """The loss, 0-d, of arguments that have been checked; all but logprobs are constants."""
    logprobs, *constants = tokens
    refuse_forward_mode("agro_loss", logprobs=logprobs)
    outputs: tuple[Tensor, Tensor] = torch.ops.agro.agro_loss_fwd(
        logprobs, *(tensor.detach() for tensor in constants), *options
    )
    return outputs[0]
