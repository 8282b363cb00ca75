"""From rewards and log-probabilities to one coefficient a completion: where a loss form goes.

The update minimises sum_i c_i * logprob_i, so the coefficients c are all that tells one algorithm
from another. A new one is a function here and a line in `ALGORITHMS`; one of a user's own is
`algorithm=module:function`, see docs/algorithms.md.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from agro_kernels import (
    AgroCoefficients,
    AgroStats,
    agro_coefficients,
    policy_gradient_coefficients,
)
from agro_train.config import TrainConfig
from agro_train.refusal import Refusal
from agro_train.types import Scores
from agro_train.user_function import load_function

# (B,) coefficients of the completions of whole groups, for a loss that is minimised: the mean over
# groups, so they are divided by the number of groups. At policy gradient's scale: for AGRO the loss
# divided by beta, so that learning rates and clipping compare.
Algorithm = Callable[[Scores, TrainConfig], Tensor]


def agro(scores: Scores, config: TrainConfig) -> Tensor:
    return _agro(scores, config).coefficients


def policy_gradient(scores: Scores, config: TrainConfig, *, form: str) -> Tensor:
    """`form` is one of `agro_kernels.POLICY_GRADIENT_FORMS`, which holds the definitions."""
    data = (scores.rewards, scores.logprobs, scores.ref_logprobs, scores.groups)
    return policy_gradient_coefficients(*data, beta=config.beta, form=form)


ALGORITHMS: dict[str, Algorithm] = {
    "agro": agro,
    "pg_loo": partial(policy_gradient, form="loo"),
    "pg_no_baseline": partial(policy_gradient, form="no_baseline"),
    "pg_reward_baseline_k2": partial(policy_gradient, form="reward_baseline_k2"),
    "pg_reward_baseline_k3": partial(policy_gradient, form="reward_baseline_k3"),
}


def load_algorithm(name: str) -> Algorithm:
    """One of `ALGORITHMS`, or the user's own `module:function`. Raises Refusal where there is none.

    What the user's function returns is checked at every call.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    return partial(_call_checked, load_function("algorithm", name), name)


def try_algorithm(config: TrainConfig) -> None:
    """Raises Refusal for a user's function that cannot be found or returns something else.

    It is called with made-up scores of a step's shape, before there is a model: among them a
    completion without a reward, a group whose rewards are all equal, and one that is off-policy.
    """
    if config.algorithm in ALGORITHMS:
        return
    groups = torch.arange(config.prompts_per_step).repeat_interleave(config.num_generations)
    generator = torch.Generator().manual_seed(0)
    rewards, lengths = torch.rand(2, len(groups), generator=generator, dtype=torch.float64)
    rewards[groups == 0] = 1.0
    rewards[-1] = float("nan")
    fresh = groups < max(1, config.prompts_per_step - 1)  # the last group is replayed
    scores = Scores(
        rewards=rewards,
        logprobs=-10 * lengths,
        ref_logprobs=-11 * lengths,
        sampling_logprobs=(-12 * lengths).masked_fill(fresh, math.nan),
        lengths=torch.full_like(groups, 10),
        groups=groups,
        on_policy=fresh,
        entropy=torch.tensor(1.0, dtype=torch.float64),
        num_tokens=torch.tensor(10 * len(groups)),
    )
    load_algorithm(config.algorithm)(scores, config)


def coefficients(scores: Scores, config: TrainConfig) -> tuple[Tensor, AgroStats]:
    """(B,) coefficients of the configured algorithm, and AGRO's statistics of the batch."""
    return load_algorithm(config.algorithm)(scores, config), _agro(scores, config).stats


def taper(scores: Scores, config: TrainConfig) -> float | Tensor:
    """The exponent of the ratio to the sampler, for all rows or (B,): per token it is divided by
    the completion's length, so that the ratio is the geometric mean of its tokens'."""
    if config.off_policy_taper_per == "token" and math.isfinite(config.off_policy_taper):
        return config.off_policy_taper / scores.lengths.clamp(min=1).double()
    return config.off_policy_taper


def coefficient_sizes(scores: Scores, config: TrainConfig) -> dict[str, float]:
    """Sizes of AGRO's two parts, at the scale of `coefficients`: the mean over groups of the sum of
    |coefficient| over a group's completions, and the proportion of groups in which the
    likelihood-ratio part, as weighted and capped, is the larger one.
    """
    both = _agro(scores, config)
    pathwise = agro(scores, replace(config, lr_weight=0.0, lr_cap=False))
    groups = scores.groups.unique(return_inverse=True)[1]
    paths, ratios = (
        torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, part.double())
        for part in (pathwise.abs(), (both.coefficients - pathwise).abs())
    )
    num_groups = max(1, int(both.stats.num_groups))
    return {
        "agro/coef_pathwise_abs": float(paths.sum()),
        "agro/coef_lr_abs": float(ratios.sum()),
        "agro/frac_groups_lr_dominates": int((ratios > paths).sum()) / num_groups,
    }


def _agro(scores: Scores, config: TrainConfig) -> AgroCoefficients:
    data = (scores.rewards, scores.logprobs, scores.ref_logprobs, scores.groups)
    return agro_coefficients(
        *data,
        beta=config.beta,
        lr_weight=config.lr_weight,
        lr_cap=config.lr_cap,
        lr_baseline=config.variance_baseline(),
        on_policy=scores.on_policy,
        sampling_logprobs=scores.sampling_logprobs,
        taper=taper(scores, config),
        scale=1.0 / config.beta,
    )


def _call_checked(function: Algorithm, name: str, scores: Scores, config: TrainConfig) -> Tensor:
    """The function's coefficients, as float64 on the scores' device. Raises Refusal for others."""
    result = function(scores, config)
    count = len(scores.rewards)
    if not isinstance(result, Tensor):
        raise Refusal(
            f"algorithm: expected a tensor of {count} coefficients from {name}, got "
            f"{type(result).__name__}; return one for each completion"
        )
    if result.shape != (count,) or not result.is_floating_point():
        raise Refusal(
            f"algorithm: expected ({count},) floating-point coefficients from {name}, got "
            f"{tuple(result.shape)} of {result.dtype}; return one for each completion"
        )
    bad = (~result.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise Refusal(
            f"algorithm: expected finite coefficients from {name}, got {float(result[bad[0]])} for "
            f"completion {bad[0] + 1} of {count}, whose reward is {float(scores.rewards[bad[0]])}; "
            "give 0 where there is nothing to learn from"
        )
    return result.detach().to(scores.rewards)
