"""From rewards and log-probabilities to one coefficient a completion: where a loss form goes."""

from dataclasses import replace

import torch
from torch import Tensor

from agro_kernels import AgroStats, agro_coefficients, policy_gradient_coefficients
from agro_train.config import TrainConfig
from agro_train.types import Scores


def coefficients(scores: Scores, config: TrainConfig) -> tuple[Tensor, AgroStats]:
    """(B,) coefficients of the configured algorithm and AGRO's statistics of the batch.

    All algorithms come at policy gradient's scale: AGRO's loss is divided by beta, so that its
    pathwise term equals the policy gradient and learning rates and clipping compare.
    """
    data = (scores.rewards, scores.logprobs, scores.ref_logprobs, scores.groups)
    agro = agro_coefficients(
        *data,
        beta=config.beta,
        lr_weight=config.lr_weight,
        lr_cap=config.lr_cap,
        lr_baseline=config.variance_baseline(),
        on_policy=scores.on_policy,
        scale=1.0 / config.beta,
    )
    if config.algorithm == "agro":
        return agro.coefficients, agro.stats
    form = config.algorithm.removeprefix("pg_")
    return policy_gradient_coefficients(*data, beta=config.beta, form=form), agro.stats


def coefficient_sizes(scores: Scores, config: TrainConfig) -> dict[str, float]:
    """Sizes of AGRO's two parts, at the scale of `coefficients`: the mean over groups of the sum of
    |coefficient| over a group's completions, and the share of groups in which the likelihood-ratio
    part, as weighted and capped, is the larger one.
    """
    both, stats = coefficients(scores, replace(config, algorithm="agro"))
    plain = replace(config, algorithm="agro", lr_weight=0.0, lr_cap=False)
    pathwise, _ = coefficients(scores, plain)
    groups = scores.groups.unique(return_inverse=True)[1]
    paths, ratios = (
        torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, part.double())
        for part in (pathwise.abs(), (both - pathwise).abs())
    )
    num_groups = max(1, int(stats.num_groups))
    return {
        "agro/coef_pathwise_abs": float(paths.sum()),
        "agro/coef_lr_abs": float(ratios.sum()),
        "agro/frac_groups_lr_dominates": int((ratios > paths).sum()) / num_groups,
    }
