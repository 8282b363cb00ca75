"""The update: its gradient is AGRO's, however the batch was cut, and bad numbers do no harm."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from agro_train.batch import build_batch
from agro_train.config import TrainConfig
from agro_train.model import Policy
from agro_train.step import score_batch, update
from agro_train.types import Rollout, TrainBatch
from tests.train.models import ragged_rollouts, tiny_policy

CONFIG = TrainConfig(beta=0.3, max_grad_norm=1e9)


def numbers(rollouts: list[Rollout]) -> list[int]:
    """Groups by prompt, numbered."""
    names = sorted({r.group for r in rollouts})
    return [names.index(r.group) for r in rollouts]


def ragged_batch(token_budget: int) -> TrainBatch:
    rollouts = ragged_rollouts()
    return build_batch(
        rollouts, numbers(rollouts), [True] * 9, token_budget=token_budget, share_prompts=True
    )


def gradient(
    rollouts: list[Rollout],
    config: TrainConfig = CONFIG,
    *,
    token_budget: int = 30,
    share_prompts: bool = True,
    on_policy: bool = True,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient an update applies, read off an SGD step with learning rate 1, and its
    metrics.
    """
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    batch = build_batch(
        rollouts,
        numbers(rollouts),
        [on_policy] * len(rollouts),
        token_budget=token_budget,
        share_prompts=share_prompts,
    )
    stats = run_update(policy, reference, batch, config)
    return {n: before[n] - p.detach() for n, p in policy.named_parameters()}, dict(stats.metrics)


def run_update(policy: Any, reference: Any, batch: Any, config: TrainConfig) -> Any:
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return update(policy, reference, batch, config, Accelerator(cpu=True), optimizer, scheduler)


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    scale = max(float(g.abs().max()) for g in theirs.values())
    assert scale > 1e-3, "a test of zeros tests nothing"
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-12 * scale)


def autograd_gradient(rollouts: list[Rollout], beta: float) -> dict[str, torch.Tensor]:
    """Var(R) / 2 / beta over each group, averaged, differentiated through plain full-softmax
    logits.
    """
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1)
    groups: dict[str, list[torch.Tensor]] = {}
    for r in rollouts:
        ids = torch.tensor([*r.prompt_ids, *r.completion_ids])
        sums = []
        for model in (policy.model, reference.model):
            logprobs = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
            sums.append(logprobs.gather(-1, ids[1:, None])[len(r.prompt_ids) - 1 :].sum())
        assert r.reward is not None
        groups.setdefault(r.group, []).append(r.reward - beta * (sums[0] - sums[1].detach()))
    loss = torch.stack([0.5 * torch.stack(R).var() for R in groups.values()]).mean() / beta
    loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def test_gradient_is_that_of_half_the_variance_over_beta() -> None:
    ours, metrics = gradient(ragged_rollouts())
    assert_equal(ours, autograd_gradient(ragged_rollouts(), beta=0.3))
    assert metrics["groups"] == 3


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("token_budget", [1, 9, 1000])
@pytest.mark.parametrize("lr_weight", [0.0, 0.7])
def test_gradient_does_not_depend_on_packing(
    token_budget: int, share_prompts: bool, lr_weight: float
) -> None:
    config = replace(CONFIG, lr_weight=lr_weight)
    whole, _ = gradient(ragged_rollouts(), config)
    cut, _ = gradient(
        ragged_rollouts(), config, token_budget=token_budget, share_prompts=share_prompts
    )
    assert_equal(cut, whole)


def test_gradient_does_not_depend_on_the_order_of_rollouts() -> None:
    whole, _ = gradient(ragged_rollouts())
    shuffled = [ragged_rollouts()[i] for i in (4, 0, 8, 2, 6, 1, 3, 7, 5)]
    assert_equal(gradient(shuffled)[0], whole)


def test_likelihood_ratio_term_is_for_on_policy_rollouts_only() -> None:
    config = replace(CONFIG, lr_weight=1.0)
    plain, _ = gradient(ragged_rollouts())
    assert_equal(gradient(ragged_rollouts(), config, on_policy=False)[0], plain)
    on_policy, _ = gradient(ragged_rollouts(), config, on_policy=True)
    assert any((on_policy[n] - plain[n]).abs().max() > 1e-6 for n in plain)


def test_policy_gradient_on_the_full_regularised_reward_is_agro_at_the_same_scale() -> None:
    agro, _ = gradient(ragged_rollouts())
    assert_equal(gradient(ragged_rollouts(), replace(CONFIG, algorithm="pg_loo"))[0], agro)


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, _ = gradient(ragged_rollouts())
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1).requires_grad_(False)
    policy.model.activation_checkpointing_enable({"use_reentrant": False})
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    batch = ragged_batch(token_budget=30)
    run_update(policy, reference, batch, replace(CONFIG, gradient_checkpointing=True))
    assert_equal({n: before[n] - p.detach() for n, p in policy.named_parameters()}, plain)


def test_log_ratio_of_equal_weights_is_exactly_zero() -> None:
    policy, reference = tiny_policy(dtype=torch.float32), tiny_policy(dtype=torch.float32)
    batch = ragged_batch(token_budget=20)
    scores, _ = score_batch(policy, reference, batch, batch.micro, CONFIG, torch.device("cpu"))
    assert torch.equal(scores.logprobs, scores.ref_logprobs)


def test_rollout_without_reward_is_dropped_from_its_group_and_counted() -> None:
    rollouts = ragged_rollouts()
    rollouts[0] = replace(rollouts[0], reward=None)
    ours, metrics = gradient(rollouts)
    assert metrics["dropped"] == 1
    assert_equal(ours, autograd_gradient(rollouts[1:], beta=0.3))


def test_group_left_with_one_rollout_contributes_nothing_and_is_counted() -> None:
    rollouts = ragged_rollouts()
    rollouts[3] = replace(rollouts[3], reward=None)  # its group has two
    ours, metrics = gradient(rollouts)
    assert metrics["short_groups"] == 1
    assert_equal(ours, autograd_gradient(rollouts[:3] + rollouts[5:], beta=0.3))


def test_known_reference_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups whose reference log-probabilities are known: same gradient, no pass for them."""
    rollouts = ragged_rollouts()
    asked, metrics = gradient(rollouts)
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1).requires_grad_(False)
    batch = ragged_batch(token_budget=1000)
    scores, _ = score_batch(policy, reference, batch, batch.micro, CONFIG, torch.device("cpu"))
    values = scores.ref_logprobs.tolist()
    known = [
        replace(r, ref_logprob=v if r.group != "g1" else None)
        for r, v in zip(rollouts, values, strict=True)
    ]
    lengths = []
    forward = Policy.forward
    monkeypatch.setattr(
        Policy,
        "forward",
        lambda self, micro, *a: (
            lengths.append((id(self), len(micro.targets))) or forward(self, micro, *a)
        ),
    )
    ours, again = gradient(known, token_budget=1)
    assert_equal(ours, asked)
    for key in metrics:
        assert again[key] == pytest.approx(metrics[key], rel=1e-9, abs=1e-12), key
    passes = Counter(model for model, _ in lengths)
    assert sorted(passes.values()) == [2, 18]  # of nine completions two, and the policy twice all


def test_metrics_of_the_coefficients_parts() -> None:
    rollouts = ragged_rollouts()
    _, plain = gradient(rollouts)
    assert plain["agro/coef_lr_abs"] == plain["agro/frac_groups_lr_dominates"] == 0.0
    assert plain["agro/coef_pathwise_abs"] > 0
    for weight, dominated in ((0.01, 0.0), (1000.0, 1.0)):
        _, mixed = gradient(rollouts, replace(CONFIG, lr_weight=weight, lr_baseline="0"))
        assert mixed["agro/coef_pathwise_abs"] == pytest.approx(plain["agro/coef_pathwise_abs"])
        assert mixed["agro/frac_groups_lr_dominates"] == dominated
        assert mixed["agro/coef_lr_abs"] > 0
    _, one = gradient(rollouts, replace(CONFIG, lr_weight=1.0, lr_baseline="0"))
    _, two = gradient(rollouts, replace(CONFIG, lr_weight=2.0, lr_baseline="0"))
    assert two["agro/coef_lr_abs"] == pytest.approx(2 * one["agro/coef_lr_abs"])


def test_share_of_groups_with_equal_rewards() -> None:
    rollouts = [replace(r, reward=1.0 if r.group == "g1" else r.reward) for r in ragged_rollouts()]
    rollouts[0] = replace(rollouts[0], reward=None)
    assert gradient(rollouts)[1]["frac_reward_zero_std"] == pytest.approx(1 / 3)


def test_batch_without_a_valid_group_leaves_the_weights_untouched() -> None:
    rollouts = [replace(r, reward=None) for r in ragged_rollouts()]
    change, metrics = gradient(rollouts)
    assert metrics["skipped"] == 1.0 and metrics["dropped"] == 9
    assert all(not delta.any() for delta in change.values())


def test_same_prompt_twice_makes_two_groups() -> None:
    once = ragged_rollouts()[:3]
    twice = [*once, *(replace(r, reward=1.0 - (r.reward or 0.0)) for r in once)]
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1).requires_grad_(False)
    batch = build_batch(twice, [0, 0, 0, 1, 1, 1], [True] * 6, token_budget=50, share_prompts=True)
    assert run_update(policy, reference, batch, CONFIG).metrics["groups"] == 2


def test_gradient_that_is_not_finite_leaves_the_weights_untouched() -> None:
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    handle = policy.model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    batch = ragged_batch(token_budget=30)
    stats = run_update(policy, reference, batch, CONFIG)
    handle.remove()
    assert stats.skipped and stats.metrics["skipped"] == 1.0
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
