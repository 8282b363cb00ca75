"""verl 0.9: the advantage estimator `agro` and the policy loss `agro`.

verl computes advantages on its driver, where groups are whole, and loses them there: the policy
loss sees shuffled micro-batches. So the estimator puts AGRO's coefficients in the advantages' place
and the loss multiplies them with the log-probabilities. With `use_kl_in_reward` verl has already
formed the regularised reward that the coefficients need.

Importing this module registers both; `import verl` does so by the entry point `verl.plugins`.
Options: `algorithm.agro` may hold lr_weight, lr_cap and lr_baseline of `agro_coefficients`, and
taper. verl shows an estimator neither its own log-probabilities nor the rollout engine's, so the
taper acts in the policy loss, to which verl hands min(1, policy / engine) as an importance weight.

How it differs from verl's `rloo` with the `vanilla` loss:

* the loss is linear in the log-probabilities: no ratio, nothing to clip;
* the mean is over groups, of whatever size; a completion whose reward is not finite, or all of
  whose tokens are masked, is left out of its group;
* settings under which the gradient would be another one are refused.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss
from verl.utils.torch_functional import masked_mean

from agro_kernels import agro_coefficients

AGGREGATION = "seq-mean-token-sum"
CORRECTION = "algorithm.rollout_correction"
OPTIONS = ("lr_weight", "lr_cap", "lr_baseline", "taper")

_log = logging.getLogger(__name__)


def agro_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: np.ndarray[Any, Any] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Minus AGRO's coefficients over beta, times the number of sequences verl divides by.

    Args:
        token_level_rewards: (B, T) float: scores minus beta times the log-ratio, token by token.
        response_mask: (B, T): nonzero where a token counts.
        config: verl's `algorithm`: a node of the whole configuration, or an AlgoConfig.
        index: (B,) uids, equal for completions of the same prompt.

    Returns:
        advantages (B, T), the same for all tokens of a sequence and 0 where masked; and once more
        as the returns, which nothing reads.
    """
    beta, options = _algorithm(config)
    if index is None:
        raise ValueError("index: expected the uid of every row, got None; AGRO needs groups")
    num_sequences = _num_sequences(config, len(response_mask), options)
    mask = response_mask.bool()
    counted = mask.any(1)
    rewards = token_level_rewards.double().sum(1).masked_fill(~counted, float("nan"))
    nothing = torch.zeros_like(rewards)  # the rewards are regularised already
    groups = torch.from_numpy(np.unique(index, return_inverse=True)[1]).to(rewards.device)
    coefficients, stats = agro_coefficients(
        rewards, nothing, nothing, groups, beta=beta, scale=1 / beta, **options
    )
    num_lost = int(stats.num_dropped) - int((~counted).sum())
    if num_lost:
        _log.warning(
            "agro: %d of %d completions have a reward or log-ratio that is not finite; left out",
            num_lost,
            len(counted),
        )
    advantages = -num_sequences * coefficients[:, None] * mask
    advantages = advantages.to(token_level_rewards.dtype)
    return advantages, advantages


def agro_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Minus advantage times log-probability, summed over tokens and averaged over sequences.

    Args:
        old_log_prob, log_prob, advantages, response_mask: (b, T), one micro-batch. The old
            log-probs serve only the metric actor/ppo_kl, 0 up to noise while the coefficients are
            those of the policy.
        loss_agg_mode: "seq-mean-token-sum".
        config: verl's ActorConfig; its global_batch_info holds what verl divides by.
        rollout_is_weights: with `algorithm.agro.taper`, (b, T): min(1, policy / engine) of the
            sequence in each of its tokens, else None.

    Returns:
        loss (0-d), metrics.
    """
    _expect("actor.loss_agg_mode", loss_agg_mode, (AGGREGATION,), "AGRO sums over tokens")
    _check_actor(config)
    if config.global_batch_info.get("global_batch_size") is None:
        raise ValueError(
            "global_batch_size: expected the number of sequences of the step, got None; micro-"
            "batches would be averaged each by its own"
        )
    mask = response_mask.bool()
    metrics: dict[str, Any] = {}
    if rollout_is_weights is not None:
        advantages, metrics["actor/taper_weight"] = _tapered(advantages, rollout_is_weights, mask)
    # agg_loss multiplies with the mask, and 0 times a NaN of the padding is NaN.
    losses = (-advantages * log_prob).where(mask, 0.0)
    loss: Tensor = agg_loss(losses, mask, loss_agg_mode, **config.global_batch_info)
    drift = masked_mean(old_log_prob - log_prob.detach(), mask)
    return loss, {"actor/ppo_kl": drift.item(), **metrics}


def _tapered(advantages: Tensor, ratios: Tensor, mask: Tensor) -> tuple[Tensor, float]:
    """The advantages, those below 0 times min(1, policy / engine), and the mean of these factors.

    As `agro_coefficients` tapers: an advantage below 0 is a coefficient above 0. Where the engine
    gave no number the row is left as it is.
    """
    ratios = ratios.nan_to_num(nan=1.0).where(mask, 0.0)
    ratio = ratios.amax(1, keepdim=True)
    if ((ratios != ratio) & mask).any() or (ratio > 1).any():
        raise ValueError(
            "rollout_is_weights: expected min(1, policy / engine) of whole sequences, got others; "
            f"set {CORRECTION}.rollout_is=sequence and {CORRECTION}.rollout_is_threshold=1.0, or "
            "rollout_is=null without algorithm.agro.taper"
        )
    lowered = (advantages < 0) & mask
    factors = ratio[lowered.any(1)]
    mean = float(factors.mean()) if factors.numel() else 1.0
    return advantages * ratio.where(lowered, 1.0), mean


def _algorithm(config: Any) -> tuple[float, dict[str, Any]]:
    """beta and the options of `agro_coefficients`, from verl's `algorithm`, checked.

    The taper is checked and left out: the policy loss has it.
    """
    if config is None:
        raise ValueError("config: expected verl's algorithm settings, got None; they hold beta")
    _expect(
        "algorithm.use_kl_in_reward",
        config.use_kl_in_reward,
        (True,),
        "the divergence from the reference is part of AGRO's reward",
    )
    _expect(
        "algorithm.kl_penalty",
        config.kl_penalty,
        ("kl", "k1"),
        "AGRO's reward holds the log-ratio itself",
    )
    _expect(
        "algorithm.kl_ctrl.type",
        config.kl_ctrl.type,
        ("fixed",),
        "kl_ctrl.kl_coef is AGRO's beta and stays",
    )
    beta = float(config.kl_ctrl.kl_coef)
    if beta <= 0:
        raise ValueError(
            f"algorithm.kl_ctrl.kl_coef: expected > 0, got {beta}; it is AGRO's beta, in units of "
            "reward"
        )
    correction = config.get("rollout_correction") or {}
    _expect(
        f"{CORRECTION}.bypass_mode",
        correction.get("bypass_mode") or False,
        (False,),
        "AGRO needs the log-probs of the policy, not of the rollout engine",
    )
    rejection = correction.get("rollout_rs")
    if rejection is not None and "token_" in rejection:
        raise ValueError(
            f"{CORRECTION}.rollout_rs: expected null or seq_..., got {rejection}; AGRO's reward is "
            "that of whole sequences, so reject whole sequences"
        )
    given: Mapping[str, Any] = config.get("agro") or {}
    for option in given:
        _expect("algorithm.agro", option, OPTIONS, "beta is algorithm.kl_ctrl.kl_coef")
    options = dict(given)
    _check_taper(options.pop("taper", 0.0), correction, options)
    return beta, options


def _check_taper(taper: Any, correction: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise unless verl's importance weights are the taper's ratios, or there are neither."""
    _expect("algorithm.agro.taper", taper, (0, 1), "verl hands on the ratio itself, not a power")
    if taper == 0:
        _expect(
            f"{CORRECTION}.rollout_is",
            correction.get("rollout_is"),
            (None,),
            "AGRO needs no importance weights; algorithm.agro.taper=1 would use them",
        )
        return
    reason = "the taper is min(1, policy / engine) of the sequence"
    for name, wanted in (
        ("rollout_is", "sequence"),
        ("rollout_is_threshold", 1.0),
        ("rollout_is_batch_normalize", False),
    ):
        _expect(f"{CORRECTION}.{name}", correction.get(name), (wanted,), reason)
    _expect(
        "algorithm.agro.lr_weight",
        options.get("lr_weight", 0.0),
        (0,),
        "the policy loss cannot taper the pathwise part of an advantage alone, set taper=0",
    )


def _num_sequences(config: Any, rows: int, options: dict[str, Any]) -> int:
    """What verl divides the loss by: the sequences of a mini-batch, which must be all rows."""
    # The whole configuration is reached upwards from `algorithm`; an AlgoConfig stands alone.
    whole = config._get_root() if isinstance(config, DictConfig) else None
    if whole is None or "actor_rollout_ref" not in whole:
        return rows
    actor = whole.actor_rollout_ref.actor
    _expect("actor.policy_loss.loss_mode", actor.policy_loss.loss_mode, ("agro",), "they go along")
    _expect("actor.loss_agg_mode", actor.loss_agg_mode, (AGGREGATION,), "AGRO sums over tokens")
    _check_actor(actor)
    if OmegaConf.select(whole, "algorithm.agro.taper"):
        _expect(
            "actor_rollout_ref.rollout.calculate_log_probs",
            whole.actor_rollout_ref.rollout.calculate_log_probs,
            (True,),
            "the taper needs the rollout engine's log-probs",
        )
    num_sequences = int(actor.ppo_mini_batch_size * whole.actor_rollout_ref.rollout.n)
    if rows > num_sequences:
        raise ValueError(
            f"actor.ppo_mini_batch_size: expected all {rows} rows of the batch in one mini-batch, "
            f"got {actor.ppo_mini_batch_size} prompts of {whole.actor_rollout_ref.rollout.n}; "
            "AGRO's coefficients are those of the policy as it was scored, so set it to "
            "data.train_batch_size, with one row for each completion"
        )
    mode = OmegaConf.select(whole, "trainer.v1.trainer_mode") or "sync"
    if mode == "separate_async":
        name = "trainer.v1.separate_async.parameter_sync_step"
        _expect(
            name,
            OmegaConf.select(whole, name),
            (1,),
            "later steps would take the log-probs of an older policy",
        )
    if mode != "sync" and options.get("lr_weight", 0.0) != 0.0:
        raise ValueError(
            f"algorithm.agro.lr_weight: expected 0 with trainer_mode={mode}, got "
            f"{options['lr_weight']}; the likelihood-ratio term is for completions of the current "
            "policy, set trainer.v1.trainer_mode=sync"
        )
    return num_sequences


def _check_actor(actor: Any) -> None:
    _expect(
        "actor.ppo_epochs",
        actor.ppo_epochs,
        (1,),
        "AGRO's coefficients are those of the policy as it was scored",
    )
    _expect(
        "actor.use_kl_loss",
        actor.use_kl_loss,
        (False,),
        "the divergence is in the reward already, it would count twice",
    )


def _expect(name: str, got: Any, allowed: tuple[Any, ...], reason: str) -> None:
    if got not in allowed:
        wanted = " or ".join("null" if value is None else str(value) for value in allowed)
        raise ValueError(f"{name}: expected {wanted}, got {got}; {reason}")


register_adv_est("agro")(agro_advantages)
register_policy_loss("agro")(agro_policy_loss)
