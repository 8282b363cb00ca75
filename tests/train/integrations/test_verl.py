"""verl 0.9: from its own driver functions through its own actor loss, the gradient is ours.

Run by `make test-verl`, in an environment with verl. Nothing is generated and no Ray is started:
the batch is recorded, everything from the KL penalty to the loss of a micro-batch is verl's.
"""

import copy
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

verl = pytest.importorskip("verl")

# verl and Ray warn of each other's old names, already while they are imported.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf, open_dict
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.config import AlgoConfig, KLControlConfig
    from verl.trainer.ppo.core_algos import (
        get_adv_estimator_fn,
        get_kl_controller,
        get_policy_loss_fn,
    )
    from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
    from verl.utils import tensordict_utils
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

from agro_kernels import agro_coefficients  # noqa: E402
from agro_train.integrations import verl as ours  # noqa: E402
from tests.numerics import assert_close_to_truth, head_inputs  # noqa: E402
from tests.train.integrations import OLD_NAMES  # noqa: E402

pytestmark = [pytest.mark.verl, *OLD_NAMES]

PAGE = Path(__file__).parents[3] / "docs" / "verl.md"
B, T, D, V = 12, 7, 8, 23
BETA = 0.3
# Groups of 5, 2, 3 and 1, scattered; the last row is one of verl's padding.
UIDS = np.array([*"abacadbcaac", "pad"], dtype=object)


def documented_overrides() -> list[str]:
    """The settings that docs/verl.md gives, as Hydra reads them from a command line."""
    (block,) = re.findall(r"```bash\n(python -m verl.*?)```", PAGE.read_text(), flags=re.S)
    overrides = [word for word in block.replace("\\\n", " ").split() if "=" in word]
    assert "algorithm.adv_estimator=agro" in overrides
    return overrides


def settings(*overrides: str) -> Any:
    """verl's whole configuration for a batch of 3 prompts with 4 completions."""
    sizes = (
        "data.train_batch_size=3",
        "actor_rollout_ref.actor.ppo_mini_batch_size=3",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.rollout.n=4",
        f"algorithm.kl_ctrl.kl_coef={BETA}",
    )
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*documented_overrides(), *sizes, *overrides])


class Recorded:
    """What verl's driver has of a batch before it computes advantages.

    The policy is its last layer: logits are `hidden @ weight.T`. Row 3 is masked as a whole (as
    rejection sampling does), row 5 in the middle (as the output of a tool is), row 8 has no finite
    score; beyond its mask a row's log-probs are NaN.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        inputs = head_inputs(B * T, D, V, dtype=torch.float32)
        noise = torch.randn(V, D)
        self.weight = inputs.weight
        self.mask = torch.arange(T) < torch.randint(2, T + 1, (B, 1))
        self.mask[5] = torch.tensor([1, 1, 0, 0, 1, 1, 0]).bool()
        self.mask[3] = self.mask[11] = False
        self.hidden, self.targets = inputs.hidden.view(B, T, D), inputs.targets.view(B, T)
        self.scores = torch.randint(0, 2, (B,)).float() + 0.25 * torch.rand(B)
        self.scores[8] = float("nan")
        self.ref_weight = self.weight + 0.3 * noise
        self.engine_weight = 0.9 * self.weight + 0.2 * noise.roll(1, 0)  # by and large flatter
        self.dtype = dtype

    def logprobs(self, weight: Tensor) -> Tensor:
        """(B, T) by a full softmax, NaN where masked."""
        logits = self.hidden.to(weight.dtype) @ weight.T
        picked = logits.log_softmax(-1).gather(-1, self.targets[..., None]).squeeze(-1)
        return picked.where(self.mask, float("nan"))

    def data(self) -> DataProto:
        last = torch.zeros(B, T)
        last[torch.arange(B), (self.mask * torch.arange(T)).argmax(1)] = self.scores
        return DataProto.from_dict(
            tensors={
                "response_mask": self.mask.long(),
                "token_level_scores": last,
                # verl pads log-probs with 0
                "old_log_probs": self.logprobs(self.weight).nan_to_num(),
                "ref_log_prob": self.logprobs(self.ref_weight).nan_to_num(),
                "rollout_log_probs": self.logprobs(self.engine_weight).nan_to_num(),
            },
            non_tensors={"uid": UIDS},
        )

    def coefficients(self, weight: Tensor, ref_weight: Tensor, **options: Any) -> Tensor:
        """(B,) of this project, from whole rows."""
        rewards = self.scores.masked_fill(~self.mask.any(1), float("nan")).to(weight.dtype)
        sums = [self.logprobs(w).nansum(1) for w in (weight, ref_weight)]
        groups = torch.from_numpy(np.unique(UIDS, return_inverse=True)[1])
        return agro_coefficients(
            rewards, *sums, groups, beta=BETA, scale=1 / BETA, **options
        ).coefficients


def advantages(batch: Recorded, config: Any) -> DataProto:
    """verl's driver: KL penalty, rollout correction, then advantages."""
    data = apply_kl_penalty(
        batch.data(), get_kl_controller(config.algorithm.kl_ctrl), config.algorithm.kl_penalty
    )[0]
    correction = config.algorithm.rollout_correction
    data = compute_rollout_correction_and_add_to_batch(data, correction)[0]
    return compute_advantage(data, config.algorithm.adv_estimator, config=config.algorithm)


def micro_batch(data: DataProto, rows: Tensor, dp_size: int) -> TensorDict:
    """What verl's engine hands its loss function."""
    responses = data.batch["response_mask"][rows]
    names = ("response_mask", "old_log_probs", "advantages", "rollout_is_weights")
    tensors = {name: data.batch[name][rows] for name in names if name in data.batch}
    lengths = torch.ones(len(rows), 1 + T, dtype=torch.long)
    micro = TensorDict(
        {
            **tensors,
            "prompts": torch.zeros(len(rows), 1, dtype=torch.long),
            "responses": torch.zeros_like(responses),
            "attention_mask": lengths,
        },
        batch_size=len(rows),
    )
    tensordict_utils.assign_non_tensor(
        micro,
        dp_size=dp_size,
        batch_num_tokens=int(data.batch["response_mask"].sum()),
        global_batch_size=B,
    )
    return micro


def gradient(
    batch: Recorded, data: DataProto, config: Any, micro_batches: list[list[list[int]]]
) -> tuple[Tensor, dict[str, Any]]:
    """By verl's ppo_loss, of each rank's micro-batches, averaged over ranks as FSDP does."""
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    weight = batch.weight.clone().requires_grad_()
    metrics: dict[str, Any] = {}
    for rank in micro_batches:
        for chosen in rank:
            rows = torch.tensor(chosen)
            # One token longer on the left: verl shifts the outputs of its engine by one itself.
            outputs = torch.nn.functional.pad(batch.logprobs(weight)[rows], (0, 1))
            loss, metrics = ppo_loss(
                actor,
                {"log_probs": outputs.flatten()},
                micro_batch(data, rows, len(micro_batches)),
            )
            assert loss.isfinite()  # the NaN of what is masked stays out
            (loss / len(micro_batches)).backward()
    assert weight.grad is not None
    return weight.grad, metrics


ORDER = [11, 3, 8, 0, 6, 1, 9, 4, 10, 2, 7, 5]
SPLITS = {
    "whole": [[ORDER]],
    "micro-batches": [[ORDER[:1], ORDER[1:6], ORDER[6:8], ORDER[8:]]],
    "two ranks": [[ORDER[:2], ORDER[2:6]], [ORDER[6:9], ORDER[9:]]],
}
CASES = {
    "pathwise": {},
    "on-policy": {"lr_weight": 1.0},
    "capped": {"lr_weight": 1.0, "lr_cap": True, "lr_baseline": 0.25},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", CASES)
def test_gradient_is_this_projects(case: str, split: str) -> None:
    """Against coefficients of sums of log-probabilities times a full softmax, all rows at once."""
    options: dict[str, Any] = CASES[case]
    config = settings(*(f"+algorithm.agro.{name}={value}" for name, value in options.items()))
    batch = Recorded()
    found, metrics = gradient(batch, advantages(batch, config), config, SPLITS[split])
    assert metrics["actor/ppo_kl"].values == [0.0]
    results = []
    for dtype in (torch.float64, torch.float32):
        weight = batch.weight.to(dtype)
        coefficients = batch.coefficients(weight, batch.ref_weight.to(dtype), **options)
        assert int((coefficients == 0).sum()) == 4  # rows 3, 8, 11 and the group of one
        weight.requires_grad_()
        (coefficients * batch.logprobs(weight).nansum(1)).sum().backward()
        assert weight.grad is not None and weight.grad.abs().max() > 0.1
        results.append(weight.grad)
    assert_close_to_truth(found, *results)


def tapered(*more: str) -> Any:
    """The settings with the taper that docs/verl.md prints."""
    page = PAGE.read_text()
    (block,) = re.findall(r"```bash\n(    \+algorithm.agro.taper.*?)```", page, flags=re.S)
    words = [word for word in block.replace("\\\n", " ").split() if "=" in word]
    assert len(words) == 3
    return settings(*words, *more)


@pytest.mark.parametrize("split", SPLITS)
def test_tapered_gradient_is_this_projects(split: str) -> None:
    """verl's ratios of policy to rollout engine, over the counted tokens of each sequence."""
    config, batch = tapered(), Recorded()
    found, metrics = gradient(batch, advantages(batch, config), config, SPLITS[split])
    assert "actor/taper_weight" in metrics
    results = []
    for dtype in (torch.float64, torch.float32):
        weight, ref_weight = batch.weight.to(dtype), batch.ref_weight.to(dtype)
        sampling = batch.logprobs(batch.engine_weight.to(dtype)).nansum(1)
        known = {"sampling_logprobs": sampling, "taper": 1.0}
        coefficients = batch.coefficients(weight, ref_weight, **known)
        plain = batch.coefficients(weight, ref_weight)
        changed = coefficients != plain
        assert int(changed.sum()) >= 2 and (plain[changed] > 0).all()  # only what is lowered
        weight.requires_grad_()
        (coefficients * batch.logprobs(weight).nansum(1)).sum().backward()
        assert weight.grad is not None and weight.grad.abs().max() > 0.1
        results.append(weight.grad)
    assert_close_to_truth(found, *results)


def test_log_of_the_taper_is_the_mean_weight_of_what_is_lowered() -> None:
    config, batch = tapered(), Recorded()
    _, metrics = gradient(batch, advantages(batch, config), config, SPLITS["whole"])
    _, stats = agro_coefficients(
        batch.scores.masked_fill(~batch.mask.any(1), float("nan")),
        *(batch.logprobs(w).nansum(1) for w in (batch.weight, batch.ref_weight)),
        torch.from_numpy(np.unique(UIDS, return_inverse=True)[1]),
        beta=BETA,
        sampling_logprobs=batch.logprobs(batch.engine_weight).nansum(1),
        taper=1.0,
    )
    assert 0.1 < float(stats.taper_weight) < 0.9
    assert metrics["actor/taper_weight"].values == pytest.approx([float(stats.taper_weight)])


def test_policy_loss_tapers_nothing_where_the_engine_gave_no_number() -> None:
    config, batch = tapered(), Recorded()
    data = advantages(batch, config)
    lowered = (data.batch["advantages"] < 0).any(1).nonzero()[0, 0]
    data.batch["rollout_is_weights"][lowered] = float("nan")
    found, _ = gradient(batch, data, config, SPLITS["whole"])
    data.batch["rollout_is_weights"][lowered] = 1.0 * batch.mask[lowered]
    expected, _ = gradient(batch, data, config, SPLITS["whole"])
    assert torch.equal(found, expected)


def test_gradient_is_that_of_the_variance_over_beta() -> None:
    """Without agro_coefficients: autograd through the variances of the regularised reward."""
    config, batch = settings(), Recorded()
    found, _ = gradient(batch, advantages(batch, config), config, SPLITS["two ranks"])
    results = []
    for dtype in (torch.float64, torch.float32):
        weight = batch.weight.to(dtype).requires_grad_()
        log_ratio = (batch.logprobs(weight) - batch.logprobs(batch.ref_weight.to(dtype))).nansum(1)
        regularised = batch.scores - BETA * log_ratio
        # a, b and c, without row 3 (masked) and row 8 (no score); d is a group of one.
        groups = ([0, 2, 4, 9], [1, 6], [7, 10])
        loss = torch.stack([regularised[rows].var() / 2 for rows in groups]).mean() / BETA
        loss.backward()
        results.append(weight.grad)
    truth, plain = results
    assert truth is not None and plain is not None
    assert_close_to_truth(found, truth, plain)


def test_equal_groups_give_verls_rloo() -> None:
    rewards, mask = torch.randn(B, T), torch.ones(B, T)
    index = np.array([*"abcabcabcabc"], dtype=object)
    config = AlgoConfig(use_kl_in_reward=True, kl_ctrl=KLControlConfig(kl_coef=BETA))
    found, returns = get_adv_estimator_fn("agro")(rewards, mask, config=config, index=index)
    expected, _ = get_adv_estimator_fn("rloo")(rewards, mask, index=index)
    assert torch.equal(found, returns)
    torch.testing.assert_close(found, expected)


def test_lost_completions_are_logged_and_masked_ones_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    advantages(Recorded(), settings())
    (record,) = caplog.records
    assert "1 of 12 completions" in record.message


def test_plugin_registers_both_names_in_a_new_process() -> None:
    """By the entry point of the installed package: nothing of ours is imported by name."""
    script = (
        "import verl, sys; from verl.trainer.ppo import core_algos as c; "
        "c.get_adv_estimator_fn('agro'), c.get_policy_loss_fn('agro'); "
        "assert 'agro_train.integrations.verl' in sys.modules"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


ACTOR = "actor_rollout_ref.actor"
REFUSED = [
    ("algorithm.use_kl_in_reward=false", "algorithm.use_kl_in_reward: expected True, got False"),
    ("algorithm.kl_penalty=low_var_kl", "algorithm.kl_penalty: expected kl or k1, got low_var_kl"),
    ("algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.type: expected fixed, got adaptive"),
    ("algorithm.kl_ctrl.kl_coef=0.0", "algorithm.kl_ctrl.kl_coef: expected > 0, got 0.0"),
    ("algorithm.rollout_correction.bypass_mode=true", "bypass_mode: expected False, got True"),
    ("algorithm.rollout_correction.rollout_is=token", "rollout_is: expected null, got token"),
    (
        "algorithm.rollout_correction.rollout_rs=token_k1 "
        "algorithm.rollout_correction.rollout_rs_threshold=0.5_2.0",
        "expected null or seq_..., got token_k1",
    ),
    ("+algorithm.agro.beta=0.1", "algorithm.agro: expected lr_weight or lr_cap or lr_baseline"),
    ("+algorithm.agro.lr_weight=-1.0", "lr_weight: expected"),
    ("+algorithm.agro.taper=0.5", "algorithm.agro.taper: expected 0 or 1, got 0.5"),
    ("+algorithm.agro.taper=1.0", "rollout_is: expected sequence, got None"),
    (f"{ACTOR}.policy_loss.loss_mode=vanilla", "loss_mode: expected agro, got vanilla"),
    (f"{ACTOR}.loss_agg_mode=token-mean", "expected seq-mean-token-sum, got token-mean"),
    (f"{ACTOR}.ppo_epochs=2", "actor.ppo_epochs: expected 1, got 2"),
    (f"{ACTOR}.use_kl_loss=true", "actor.use_kl_loss: expected False, got True"),
    (f"{ACTOR}.ppo_mini_batch_size=1", "expected all 12 rows of the batch in one mini-batch"),
    ("trainer.v1.trainer_mode=separate_async", "parameter_sync_step: expected 1, got 4"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=[o for o, _ in REFUSED])
def test_driver_refuses_what_would_be_another_gradient(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        advantages(Recorded(), settings(*override.split()))


ROLLOUT = "actor_rollout_ref.rollout"
TAPER_REFUSED = [
    ("algorithm.rollout_correction.rollout_is=token", "rollout_is: expected sequence, got token"),
    ("algorithm.rollout_correction.rollout_is_threshold=2.0", "threshold: expected 1.0, got 2.0"),
    (
        "algorithm.rollout_correction.rollout_is_batch_normalize=true",
        "rollout_is_batch_normalize: expected False, got True",
    ),
    ("+algorithm.agro.lr_weight=1.0", "algorithm.agro.lr_weight: expected 0, got 1.0"),
    (f"{ROLLOUT}.calculate_log_probs=false", "calculate_log_probs: expected True, got False"),
    ("algorithm.agro.taper=0.0", "rollout_is: expected null, got sequence"),
]


@pytest.mark.parametrize(("override", "message"), TAPER_REFUSED, ids=[o for o, _ in TAPER_REFUSED])
def test_driver_refuses_a_taper_that_would_be_another(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        advantages(Recorded(), tapered(override))


def test_driver_refuses_the_on_policy_term_for_older_completions() -> None:
    config = settings("trainer.v1.trainer_mode=colocate_async", "+algorithm.agro.lr_weight=1.0")
    with pytest.raises(ValueError, match="lr_weight: expected 0 with trainer_mode=colocate_async"):
        advantages(Recorded(), config)
    config.algorithm.agro.lr_weight = 0.0
    assert advantages(Recorded(), config).batch["advantages"].abs().max() > 0.1


def test_driver_refuses_a_batch_without_groups() -> None:
    config, data = settings(), Recorded().data()
    data.batch["token_level_rewards"] = data.batch["token_level_scores"]
    del data.non_tensor_batch["uid"]
    with pytest.raises(ValueError, match="index: expected the uid of every row, got None"):
        compute_advantage(data, "agro", config=config.algorithm)
    with pytest.raises(ValueError, match="config: expected verl's algorithm settings, got None"):
        compute_advantage(data, "agro")


def test_loss_refuses_what_only_the_workers_know() -> None:
    """The same settings again, for estimators and drivers that are not ours."""
    config = settings()
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.global_batch_info["global_batch_size"] = B
    rows = torch.zeros(2, T)
    loss = partial(get_policy_loss_fn("agro"), rows, rows, rows, torch.ones(2, T))
    for name, value in (("ppo_epochs", 2), ("use_kl_loss", True)):
        changed = copy.deepcopy(config.actor_rollout_ref.actor)
        with open_dict(changed):
            OmegaConf.update(changed, name, value)
        with pytest.raises(ValueError, match=f"actor.{name}: expected"):
            loss(ours.AGGREGATION, omega_conf_to_dataclass(changed))
    with pytest.raises(ValueError, match="actor.loss_agg_mode: expected seq-mean-token-sum"):
        loss("token-mean", actor)
    per_token = torch.linspace(0.1, 0.9, T).expand(2, T)
    for weights in (rows + 2.0, per_token):
        with pytest.raises(ValueError, match=r"rollout_is_weights: expected min\(1, policy"):
            loss(ours.AGGREGATION, actor, rollout_is_weights=weights)
    actor.global_batch_info.clear()
    with pytest.raises(ValueError, match="global_batch_size: expected the number of sequences"):
        loss(ours.AGGREGATION, actor)
