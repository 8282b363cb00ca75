"""OpenRLHF 0.11: AGRO's coefficients in the place of its advantages.

OpenRLHF has no registry. Its `RemoteExperienceMaker.compute_advantages_and_returns` sees the whole
rollout, every group whole, with rewards and log-ratios; `install` puts the function below there, in
the process that calls it. The policy loss is OpenRLHF's own: with one optimiser step on each
rollout its ratio is 1, so the gradient is the advantage times that of the log-probability, averaged
over the tokens of the step. An advantage that holds the number of tokens makes a sum of it.

How it differs from OpenRLHF's `rloo`:

* the log-ratio is part of the reward before the group's mean is subtracted, and belongs to the
  sequence; OpenRLHF subtracts it afterwards, as a return to go;
* every sequence weighs the same, whatever its length, and every group;
* settings under which the gradient would be another one are refused.
"""

import logging
from functools import partial
from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties
from torch import Tensor

from agro_kernels import agro_coefficients

KL_CLAMP = 10.0  # compute_approx_kl of OpenRLHF bounds the log-ratio of every token by this

_log = logging.getLogger(__name__)


def install(**options: Any) -> None:
    """Have every RemoteExperienceMaker of this process compute AGRO's advantages.

    Args:
        options: lr_weight, lr_cap, lr_baseline and taper of `agro_coefficients`. The taper's
            ratios are those of OpenRLHF's policy to vLLM.
    """
    nothing = torch.zeros(2)  # the op checks its own options
    agro_coefficients(nothing, nothing, nothing, nothing.long(), beta=1.0, **options)

    def compute_advantages_and_returns(maker: Any, experiences: list[Any]) -> list[Any]:
        return agro_advantages(maker, experiences, **options)

    RemoteExperienceMaker.compute_advantages_and_returns = compute_advantages_and_returns


@torch.no_grad()
def agro_advantages(maker: Any, experiences: list[Any], **options: Any) -> list[Any]:
    """Sets `advantages` and `returns` (b, A) of every experience.

    Args:
        maker: the RemoteExperienceMaker; its kl_ctl.value is beta.
        experiences: all of one rollout. Of each: rewards (b,), kl (b, A) log-ratios, action_mask
            (b, A), index: places in the rollout, where a prompt's completions follow each other;
            with a taper action_log_probs and rollout_log_probs (b, A), too.
        options: of `agro_coefficients`.

    Returns:
        experiences.
    """
    args = maker.strategy.args
    check_arguments(args, sum(len(e.index) for e in experiences), **options)
    for experience in experiences:
        rewards = experience.rewards
        experience.rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    apply_length_penalties(experiences, args)

    beta = float(maker.kl_ctl.value)
    log_ratios = torch.cat([_log_ratios(e) for e in experiences])
    rewards = torch.cat([e.rewards for e in experiences]).double()
    if args.reward.clip_range:
        rewards = rewards.clamp(*args.reward.clip_range)
    places = torch.tensor([place for e in experiences for place in e.index])
    groups = places // args.rollout.n_samples_per_prompt
    sampling = None
    if options.get("taper", 0.0) > 0:
        # log(vLLM / reference), because log_ratios are log(policy / reference).
        sampling = log_ratios - torch.cat([_sampler_log_ratios(e) for e in experiences])
    coefficients, _ = agro_coefficients(
        rewards,
        log_ratios,
        torch.zeros_like(log_ratios),
        groups.to(rewards.device),
        sampling_logprobs=sampling,
        beta=beta,
        scale=1 / beta,
        **options,
    )
    num_tokens = sum(int(e.action_mask.sum()) for e in experiences)
    regularised = rewards - beta * log_ratios
    sizes = [len(e.index) for e in experiences]
    for experience, part, returns in zip(
        experiences, coefficients.split(sizes), regularised.split(sizes), strict=True
    ):
        advantages = -num_tokens * part[:, None] * experience.action_mask
        experience.advantages = advantages.float()
        experience.returns = experience.advantages
        experience.info["return"] = returns.float()
        experience.kl = None
    return experiences


def _log_ratios(experience: Any) -> Tensor:
    """(b,) float64 sums over the counted tokens; NaN where none is."""
    mask = experience.action_mask.bool()
    per_token = experience.kl.double().where(mask, 0.0)
    clamped = int((per_token.abs() >= KL_CLAMP).sum())
    if clamped:
        _log.warning("agro: OpenRLHF has bounded the log-ratio of %d tokens by 10", clamped)
    sums: Tensor = per_token.sum(1).masked_fill(~mask.any(1), float("nan"))
    return sums


def _sampler_log_ratios(experience: Any) -> Tensor:
    """(b,) float64 sums of log(policy / vLLM) over the counted tokens."""
    per_token = experience.action_log_probs.double() - experience.rollout_log_probs.double()
    sums: Tensor = per_token.where(experience.action_mask.bool(), 0.0).sum(1)
    return sums


def check_arguments(args: Any, rows: int, **options: Any) -> None:
    """Raises ValueError, naming the command-line argument, where the gradient would be another."""
    expect = partial(_expect, args)
    reason = "AGRO's coefficients are those of the policy as it was scored"
    expect("train.max_epochs", 1, reason)
    expect("train.batch_size", rows, f"{reason}: one optimiser step on each rollout")
    expect("actor.loss_agg_mode", "token-mean", "advantages hold the number of tokens")
    expect("actor.policy_loss_type", "ppo", "its ratio is 1 token by token")
    expect("algo.advantage.estimator", "rloo", "it is what AGRO takes the place of")
    if options.get("taper", 0.0) > 0:
        # OpenRLHF asks vLLM for log-probs only to correct by them: clipped to [1, 1], by 1.
        reason = "the taper needs vLLM's log-probs, and AGRO no other use of them"
        expect("algo.advantage.is_correction_level", "token", reason)
        expect("algo.advantage.is_correction_mode", "clip", reason)
        expect("algo.advantage.is_correction_threshold", [1.0, 1.0], reason)
    else:
        expect("algo.advantage.is_correction_level", "off", "AGRO needs no importance weights")
    expect("algo.kl.estimator", "k1", "AGRO's reward holds the log-ratio itself")
    expect("algo.kl.use_loss", False, "the divergence is in the reward already")
    expect("algo.kl.target", None, "algo.kl.init_coef is AGRO's beta and stays")
    if not args.algo.kl.init_coef > 0:
        raise ValueError(
            f"algo.kl.init_coef: expected > 0, got {args.algo.kl.init_coef}; it is AGRO's beta, in "
            "units of reward"
        )
    if options.get("lr_weight", 0.0) != 0.0:
        expect("train.async_enable", False, "the likelihood-ratio term is for the current policy's")


def _expect(args: Any, name: str, wanted: Any, reason: str) -> None:
    got = args
    for part in name.split("."):
        got = getattr(got, part)
    if got != wanted:
        raise ValueError(f"{name}: expected {wanted}, got {got}; {reason}")
