"""The recipes of docs/other-trainers.md: the gradient is ours, on recorded tensors.

NeMo-RL and prime-rl are not on PyPI: their blocks run as printed, and what the trainers do with the
results is written out here. OpenRLHF is run by `make test-openrlhf`, in an environment with it.
"""

import importlib
import itertools
import re
import runpy
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agro_kernels import agro_coefficients
from tests.numerics import assert_close_to_truth, head_inputs

PAGE = Path(__file__).parents[3] / "docs" / "other-trainers.md"
G, B, T, D, V = 4, 12, 7, 8, 23
BETA = 0.3
MICRO_BATCHES = ([3, 8], [0, 6, 1, 9, 11], [4, 10, 2, 7, 5])


def blocks(word: str, language: str = "python") -> str:
    """The one block of the page that holds `word`."""
    every = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.S)
    (block,) = [block for block in every if word in block]
    return str(block)


def run(word: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(blocks(word), PAGE.name, "exec"), names)
    return names


class Recorded:
    """Three prompts with four completions each; the policy is its last layer.

    Row 5 is masked in the middle, row 3 as a whole; what a row's mask leaves out is NaN.
    """

    def __init__(self) -> None:
        inputs = head_inputs(B * T, D, V, dtype=torch.float32)
        self.weight = inputs.weight
        self.ref_weight = self.weight + 0.3 * torch.randn(V, D)
        self.engine_weight = self.weight + 0.2 * self.ref_weight.roll(1, 0)
        self.mask = torch.arange(T) < torch.randint(2, T + 1, (B, 1))
        self.mask[5] = torch.tensor([1, 1, 0, 0, 1, 1, 0]).bool()
        self.mask[3] = False
        self.hidden, self.targets = inputs.hidden.view(B, T, D), inputs.targets.view(B, T)
        self.rewards = torch.randint(0, 2, (B,)).float() + 0.25 * torch.rand(B)
        self.groups = torch.arange(B) // G

    def logprobs(self, weight: Tensor) -> Tensor:
        """(B, T) by a full softmax."""
        logits = self.hidden.to(weight.dtype) @ weight.T
        picked = logits.log_softmax(-1).gather(-1, self.targets[..., None]).squeeze(-1)
        return picked.where(self.mask, float("nan"))

    def expected(self, **options: Any) -> list[Tensor]:
        """The gradient of this project over beta, in float64 and in fp32."""
        results = []
        for dtype in (torch.float64, torch.float32):
            weight = self.weight.to(dtype)
            if "taper" in options:
                options["sampling_logprobs"] = self.logprobs(self.engine_weight.to(dtype)).nansum(1)
            coefficients, stats = agro_coefficients(
                self.rewards.masked_fill(~self.mask.any(1), float("nan")).to(dtype),
                self.logprobs(weight).nansum(1),
                self.logprobs(self.ref_weight.to(dtype)).nansum(1),
                self.groups,
                beta=BETA,
                scale=1 / BETA,
                **options,
            )
            assert int(stats.num_dropped) == 1
            assert ("taper" in options) == (float(stats.taper_weight) < 1)
            weight.requires_grad_()
            (coefficients * self.logprobs(weight).nansum(1)).sum().backward()
            assert weight.grad is not None and weight.grad.abs().max() > 0.1
            results.append(weight.grad)
        return results


CASES: list[dict[str, Any]] = [
    {},
    {"lr_weight": 1.0, "lr_cap": True, "lr_baseline": 0.25},
]


@pytest.mark.parametrize("options", CASES, ids=["pathwise", "on-policy"])
def test_nemo_rl_estimator_and_token_level_loss_have_our_gradient(options: dict[str, Any]) -> None:
    batch = Recorded()
    estimator = run("class AgroEstimator")["AgroEstimator"](BETA, **options)
    valid = torch.ones(B)
    valid[3] = 0.0
    advantages = estimator.compute_advantage(
        prompt_ids=torch.tensor([[7, 1], [7, 0], [2, 9]]).repeat_interleave(G, 0),
        rewards=batch.rewards,
        mask=batch.mask.float(),
        repeated_batch={},
        logprobs_policy=batch.logprobs(batch.weight).nan_to_num(),
        logprobs_reference=batch.logprobs(batch.ref_weight).nan_to_num(),
        valid_mask=valid,
    )
    assert advantages.shape == (B, T) and advantages.dtype == torch.float32
    weight = batch.weight.clone().requires_grad_()
    for rows in MICRO_BATCHES:  # disable_ppo_ratio, token_level_loss: summed over micro-batches
        terms = (-advantages * batch.logprobs(weight).nan_to_num())[rows] * batch.mask[rows]
        (terms.sum() / batch.mask.sum()).backward()
    assert weight.grad is not None
    assert_close_to_truth(weight.grad, *batch.expected(**options))


def test_nemo_rl_estimator_leaves_invalid_completions_out_of_their_group() -> None:
    """A row that valid_mask rules out has no vote, whatever its reward."""
    batch, valid = Recorded(), torch.ones(B)
    valid[6] = 0.0
    found = []
    for reward in (0.0, 100.0):
        batch.rewards[6] = reward
        advantages = run("class AgroEstimator")["AgroEstimator"](BETA).compute_advantage(
            batch.groups,
            batch.rewards,
            batch.mask,
            logprobs_policy=batch.logprobs(batch.weight).nan_to_num(),
            logprobs_reference=batch.logprobs(batch.ref_weight).nan_to_num(),
            valid_mask=valid,
        )
        found.append(advantages)
    assert torch.equal(*found) and not found[0][6].any() and found[0][7].any()


@dataclass
class LossInputs:
    """What prime-rl hands a custom loss, as read at the revision that the page names."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


def test_prime_rl_loss_and_advantages_have_our_gradient_times_groups_over_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    stand_in = types.ModuleType("prime_rl.trainer.rl.loss")
    stand_in.__dict__.update(LossInputs=LossInputs, LossOutputs=LossOutputs)
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    loss_of_sequence = run("def agro_loss")["agro_loss"]
    group_advantages = run("def group_advantages")["group_advantages"]

    batch = Recorded()
    weight = batch.weight.clone().requires_grad_()
    rewards = batch.rewards.masked_fill(~batch.mask.any(1), float("nan"))
    sums = [batch.logprobs(w).double().nansum(1) for w in (batch.weight, batch.ref_weight)]
    num_tokens = batch.mask.sum()
    for rows in torch.arange(B).split(G):
        numbers = group_advantages(*(t[rows].tolist() for t in (rewards, *sums)), BETA)
        for row, number in zip(rows, numbers, strict=True):
            inputs = LossInputs(
                batch.logprobs(weight)[row],
                batch.logprobs(batch.weight)[row],
                torch.full((T,), number),
                batch.mask[row],
            )
            (loss_of_sequence(inputs).loss / num_tokens).backward()
    assert weight.grad is not None
    factor = (B // G) / num_tokens
    truth, plain = batch.expected()
    assert_close_to_truth(weight.grad, truth * factor.double(), plain * factor)


# OpenRLHF


def any_class(name: str) -> type:
    """A module's attribute, when only its import matters."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


@pytest.fixture
def openrlhf(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """OpenRLHF's own modules; stand-ins for two that need flash-attn and vLLM to be imported.

    `install` is undone afterwards.
    """
    for name in ("openrlhf.models.ring_attn_utils", "openrlhf.trainer.ray.vllm_engine"):
        if name not in sys.modules:
            stand_in = types.ModuleType(name)
            stand_in.__dict__["__getattr__"] = any_class
            monkeypatch.setitem(sys.modules, name, stand_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = importlib.import_module("openrlhf.models")
        trainer = "openrlhf.trainer.ppo_utils"
        maker = importlib.import_module(f"{trainer}.experience_maker").RemoteExperienceMaker
        package = types.SimpleNamespace(
            utils=importlib.import_module("openrlhf.utils"),
            PolicyLoss=models.PolicyLoss,
            compute_approx_kl=importlib.import_module("openrlhf.models.utils").compute_approx_kl,
            Experience=importlib.import_module(f"{trainer}.experience").Experience,
            Maker=maker,
            FixedKLController=importlib.import_module(f"{trainer}.kl_controller").FixedKLController,
            micro_batches=importlib.import_module(
                "openrlhf.utils.loss_utils"
            ).iter_grad_accum_global_norm,
            ours=importlib.import_module("agro_train.integrations.openrlhf"),
            monkeypatch=monkeypatch,
        )
    theirs = maker.compute_advantages_and_returns
    monkeypatch.setattr(maker, "compute_advantages_and_returns", theirs)
    return package


class Captured(Exception):
    """Raised in place of training, with the arguments that it would have had."""


def arguments(package: types.SimpleNamespace, *more: str) -> Any:
    """OpenRLHF's own parser and checks, on the command line that the page prints."""
    import ray

    def capture(args: Any) -> Any:
        raise Captured(args)

    words = blocks("train_agro.py", "bash").replace("\\\n", " ").split()[2:]
    sizes = ["--rollout.batch_size", "3", "--rollout.n_samples_per_prompt", str(G)]
    needed = ["--actor.model_name_or_path", "none", "--reward.remote_url", "none"]
    words += [*needed, *sizes, "--train.batch_size", str(B), "--algo.kl.init_coef", str(BETA)]
    with package.monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", ["train_agro.py", *words, *more])
        patch.setattr(ray, "is_initialized", lambda: True)
        patch.setattr(package.utils, "get_strategy", capture)
        with pytest.raises(Captured) as caught:
            runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
    return caught.value.args[0]


def taper_arguments() -> list[str]:
    """What the page adds to the command line for a taper."""
    return blocks("is_correction_level", "bash").replace("\\\n", " ").split()


def experiences(package: types.SimpleNamespace, batch: Recorded) -> list[Any]:
    """The rollout in three parts of unequal size, the rows scattered."""
    found = []
    logprobs = batch.logprobs(batch.weight).nan_to_num()
    ref_logprobs = batch.logprobs(batch.ref_weight).nan_to_num()
    for rows in MICRO_BATCHES:
        found.append(
            package.Experience(
                sequences=torch.zeros(len(rows), T + 1, dtype=torch.long),
                action_mask=batch.mask[rows],
                action_log_probs=logprobs[rows],
                rollout_log_probs=batch.logprobs(batch.engine_weight)[rows].nan_to_num(),
                kl=package.compute_approx_kl(logprobs[rows], ref_logprobs[rows]),
                rewards=batch.rewards[rows],
                response_length=batch.mask[rows].sum(1),
                index=list(rows),
                info={},
            )
        )
    return found


def maker(package: types.SimpleNamespace, args: Any) -> Any:
    strategy = types.SimpleNamespace(args=args)
    nobody = [None] * 4
    return package.Maker(*nobody, package.FixedKLController(BETA), strategy, None)


@pytest.mark.openrlhf
@pytest.mark.parametrize(
    "options",
    [*CASES, {"taper": 1.0}, {"taper": 0.5, "lr_weight": 1.0}],
    ids=["pathwise", "on-policy", "tapered", "tapered on-policy"],
)
def test_openrlhf_advantages_and_policy_loss_have_our_gradient(
    openrlhf: types.SimpleNamespace, options: dict[str, Any]
) -> None:
    more = taper_arguments() if "taper" in options else []
    batch, args = Recorded(), arguments(openrlhf, *more)
    openrlhf.ours.install(**options)
    made = maker(openrlhf, args).compute_advantages_and_returns(experiences(openrlhf, batch))
    assert all(e.kl is None and e.advantages.dtype == torch.float32 for e in made)
    loss_of = openrlhf.PolicyLoss(
        *args.actor.eps_clip_low_high,
        token_level_loss=args.actor.loss_agg_mode == "token-mean",
        policy_loss_type=args.actor.policy_loss_type,
        is_correction_level=args.algo.advantage.is_correction_level,
        is_correction_mode=args.algo.advantage.is_correction_mode,
        is_correction_gating=args.algo.advantage.is_correction_gating,
        is_correction_threshold=args.algo.advantage.is_correction_threshold,
    )
    weight = batch.weight.clone().requires_grad_()
    steps = len(made)  # micro-batches of one optimiser step; DeepSpeed divides by their number
    windows = openrlhf.micro_batches(made, types.SimpleNamespace(), steps, lambda e: e.action_mask)
    for experience, norm in windows:
        loss, *_ = loss_of(
            batch.logprobs(weight)[experience.index].nan_to_num(),
            experience.action_log_probs,
            experience.advantages,
            action_mask=experience.action_mask,
            rollout_log_probs=experience.rollout_log_probs,
            **norm,
        )
        (loss / steps).backward()
    assert weight.grad is not None
    assert_close_to_truth(weight.grad, *batch.expected(**options))


REFUSED = [
    (["--train.max_epochs", "2"], "train.max_epochs: expected 1, got 2"),
    (["--train.batch_size", "6"], "train.batch_size: expected 12, got 6"),
    (["--actor.loss_agg_mode", "seq-mean-token-mean"], "expected token-mean, got seq-mean"),
    (["--actor.policy_loss_type", "gspo"], "actor.policy_loss_type: expected ppo, got gspo"),
    (["--algo.advantage.estimator", "group_norm"], "expected rloo, got group_norm"),
    (["--algo.kl.estimator", "k2"], "algo.kl.estimator: expected k1, got k2"),
    (["--algo.kl.target", "0.1"], "algo.kl.target: expected None, got 0.1"),
    (["--algo.kl.init_coef", "0.0"], "algo.kl.init_coef: expected > 0, got 0.0"),
    (["--algo.kl.use_loss"], "algo.kl.use_loss: expected False, got True"),
]


@pytest.mark.openrlhf
def test_openrlhf_refuses_what_would_be_another_gradient(openrlhf: types.SimpleNamespace) -> None:
    openrlhf.ours.install()
    for more, message in REFUSED:
        args = arguments(openrlhf, *more)
        with pytest.raises(ValueError, match=re.escape(message)):
            maker(openrlhf, args).compute_advantages_and_returns(experiences(openrlhf, Recorded()))
    taper_refused = [
        ([], "algo.advantage.is_correction_level: expected token, got off"),
        (["--algo.advantage.is_correction_mode", "mask"], "mode: expected clip, got mask"),
        (["--algo.advantage.is_correction_threshold", "2"], "expected [1.0, 1.0], got [0.0, 2.0]"),
    ]
    for more, message in taper_refused:
        args = arguments(openrlhf, *(taper_arguments() if more else []), *more)
        with pytest.raises(ValueError, match=re.escape(message)):
            openrlhf.ours.check_arguments(args, B, taper=1.0)
    with pytest.raises(ValueError, match="is_correction_level: expected off, got token"):
        openrlhf.ours.check_arguments(arguments(openrlhf, *taper_arguments()), B)
    args = arguments(openrlhf)
    args.train.async_enable = True
    with pytest.raises(ValueError, match="train.async_enable: expected False, got True"):
        openrlhf.ours.check_arguments(args, B, lr_weight=1.0)
    openrlhf.ours.check_arguments(args, B)


@pytest.mark.openrlhf
def test_openrlhf_warns_of_bounded_log_ratios(
    openrlhf: types.SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    openrlhf.ours.install()
    rollout = experiences(openrlhf, Recorded())
    rollout[1].kl[0, 0] = -10.0
    maker(openrlhf, arguments(openrlhf)).compute_advantages_and_returns(rollout)
    messages = [record.message for record in caplog.records if record.name.startswith("agro")]
    assert messages == ["agro: OpenRLHF has bounded the log-ratio of 1 tokens by 10"]


@pytest.mark.openrlhf
def test_openrlhf_install_refuses_unknown_options(openrlhf: types.SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="lr_weight: expected"):
        openrlhf.ours.install(lr_weight=-1.0)


def test_micro_batches_hold_every_row_once() -> None:
    assert sorted(itertools.chain(*MICRO_BATCHES)) == list(range(B))
