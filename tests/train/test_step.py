"""The update: which algorithm it is, what it measures, and that bad numbers do no harm."""

import math
from dataclasses import replace
from functools import partial
from statistics import fmean

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from agro_train.algorithm import coefficients
from agro_train.data.batch import build_batch
from agro_train.metrics import measure
from agro_train.models import place_on_devices
from agro_train.policy.policy import Policy, head_gradient, unwrap
from agro_train.step import score_batch, update
from agro_train.types import Scores
from tests.calls import Calls
from tests.train.gradients import (
    CONFIG,
    assert_equal,
    batch_of,
    gradient,
    gradient_of,
    padded_gradient,
    ragged_batch,
    run_update,
)
from tests.train.models import ragged_rollouts, tiny_policy


def test_likelihood_ratio_term_is_for_on_policy_rollouts_only() -> None:
    config = replace(CONFIG, lr_weight=1.0, off_policy_taper=0.0)
    plain, _ = gradient(ragged_rollouts())
    assert_equal(gradient(ragged_rollouts(), config, on_policy=False)[0], plain)
    on_policy, _ = gradient(ragged_rollouts(), config, on_policy=True)
    assert any((on_policy[n] - plain[n]).abs().max() > 1e-6 for n in plain)


def test_taper_is_for_off_policy_rollouts_only() -> None:
    """Whatever the sampler's log-probabilities are: what the policy sampled just now is its own."""
    known = [replace(r, sampling_logprob=-0.5) for r in ragged_rollouts()]
    plain, _ = gradient(ragged_rollouts(), replace(CONFIG, off_policy_taper=0.0))
    for taper in (0.5, 1.0, math.inf):
        config = replace(CONFIG, off_policy_taper=taper)
        fresh, metrics = gradient(known, config, on_policy=True)
        assert all(torch.equal(fresh[name], plain[name]) for name in plain)
        assert metrics["agro/taper_weight"] == 1.0
        stale, metrics = gradient(known, config, on_policy=False)
        assert any((stale[name] - plain[name]).abs().max() > 1e-6 for name in plain)
        assert metrics["agro/taper_weight"] < 1.0


@pytest.mark.parametrize("per", ["completion", "token"])
@pytest.mark.parametrize("against", ["sampler", "reference"])
def test_taper_is_the_ratio_to_the_sampler_or_whoever_stands_in(per: str, against: str) -> None:
    """Coefficients by hand, of two completions that say who sampled them and others that do not."""
    rollouts = ragged_rollouts()
    rollouts[1] = replace(rollouts[1], sampling_logprob=-1.0)
    rollouts[6] = replace(rollouts[6], sampling_logprob=-3.0)
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1).requires_grad_(False)
    config = replace(
        CONFIG,
        off_policy_taper=0.7,
        off_policy_taper_per=per,
        off_policy_taper_against=against,
    )
    numbers = [int(r.group[1:]) for r in rollouts]
    batch = build_batch(rollouts, numbers, [False] * 9, token_budget=30, share_prompts=True)
    scores, _ = score_batch(policy, reference, batch, batch.micro, config, torch.device("cpu"))
    ours, stats = coefficients(scores, config)
    plain, _ = coefficients(scores, replace(config, off_policy_taper=0.0))
    lowered = []
    for row, rollout in enumerate(rollouts):
        known = rollout.sampling_logprob if against == "sampler" else None
        sampler = scores.ref_logprobs[row] if known is None else known
        length = len(rollout.completion_ids) if per == "token" else 1
        weight = min(1.0, math.exp(0.7 / length * float(scores.logprobs[row] - sampler)))
        pushed_down = float(plain[row]) > 0
        expected = float(plain[row]) * (weight if pushed_down else 1.0)
        assert float(ours[row]) == pytest.approx(expected, rel=1e-12)
        lowered += [weight] if pushed_down else []
    assert 0 < min(lowered) < 1 and float(stats.taper_weight) == pytest.approx(fmean(lowered))


def test_policy_gradient_on_the_full_regularised_reward_is_agro_at_the_same_scale() -> None:
    agro, _ = gradient(ragged_rollouts())
    assert_equal(gradient(ragged_rollouts(), replace(CONFIG, algorithm="pg_loo"))[0], agro)


def test_rollout_without_reward_is_dropped_from_its_group_and_counted() -> None:
    rollouts = ragged_rollouts()
    rollouts[0] = replace(rollouts[0], reward=None)
    ours, metrics = gradient(rollouts)
    assert metrics["dropped"] == 1
    assert_equal(ours, padded_gradient(rollouts[1:], beta=0.3))


def test_group_left_with_one_rollout_contributes_nothing_and_is_counted() -> None:
    rollouts = ragged_rollouts()
    rollouts[3] = replace(rollouts[3], reward=None)  # its group has two
    ours, metrics = gradient(rollouts)
    assert metrics["short_groups"] == 1
    assert_equal(ours, padded_gradient(rollouts[:3] + rollouts[5:], beta=0.3))


def test_known_reference_is_not_asked() -> None:
    """Groups whose reference log-probabilities are known: same gradient, no pass for them."""
    rollouts = ragged_rollouts()
    expected, expected_metrics = gradient(rollouts)
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1).requires_grad_(False)
    batch = ragged_batch(token_budget=1000)
    scores, _ = score_batch(policy, reference, batch, batch.micro, CONFIG, torch.device("cpu"))
    known = [
        replace(rollout, ref_logprob=None if rollout.group == "g1" else value)
        for rollout, value in zip(rollouts, scores.ref_logprobs.tolist(), strict=True)
    ]

    passes = {"policy": 0, "reference": 0}

    def count(name: str, *_: object) -> None:
        passes[name] += 1

    policy.register_forward_hook(partial(count, "policy"))
    reference.register_forward_hook(partial(count, "reference"))
    one_each = batch_of(known, token_budget=1)  # a micro-batch for each completion
    ours, metrics = gradient_of(policy, reference, one_each)

    # The policy reads all nine, to score and to learn; the reference the two of group g1.
    assert passes == {"policy": 2 * 9, "reference": 2}
    assert_equal(ours, expected)
    for key, value in expected_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


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


def test_metrics_are_those_computed_by_hand() -> None:
    """beta = 1/2; R = 3/4, 1/4 in one group and 1, 1, -3/2 in the other, which has mean 1/6."""
    scores = Scores(
        rewards=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64),
        logprobs=torch.tensor([-3.5, -2.0, -5.5, -4.0, -1.0], dtype=torch.float64),
        ref_logprobs=torch.tensor([-4.0, -2.0, -5.0, -4.0, -4.0], dtype=torch.float64),
        sampling_logprobs=torch.full((5,), math.nan, dtype=torch.float64),
        lengths=torch.full((5,), 2),
        groups=torch.tensor([7, 3, 7, 3, 3]),
        on_policy=torch.ones(5, dtype=torch.bool),
        entropy=torch.tensor(15.0, dtype=torch.float64),
        num_tokens=torch.tensor(10),
    )
    config = replace(CONFIG, beta=0.5, lr_weight=1.0, lr_baseline="0")
    _, stats = coefficients(scores, config)
    variance = (1 / 8 + 75 / 36) / 2
    expected = {
        "loss": variance / 2 / 0.5,
        "grad_norm": 2.0,
        "kl": 3 / 5,
        "kl_per_token": 3 / 10,
        "entropy": 15 / 10,
        "agro/regularised_reward": (3 / 4 + 1 / 4 + 1 + 1 - 3 / 2) / 5,
        "agro/variance": variance,
        "agro/kl_to_optimum": variance / 2 / 0.5**2,
        "agro/lr_dominance": (5 / 3) / (2 * 0.5),
        "agro/logratio_abs_max": 3.0,
        "agro/taper_weight": 1.0,
        "agro/sampler_log_ratio": 0.0,
        # |d| / (n - 1), and n d^2 / (2 (n - 1)^2) / beta, summed over a group
        "agro/coef_pathwise_abs": (1 / 2 + 20 / 6 / 2) / 2,
        "agro/coef_lr_abs": (2 * 2 / 2 / 16 / 0.5 + 3 / 8 * 150 / 36 / 0.5) / 2,
        "agro/frac_groups_lr_dominates": 1 / 2,
        "frac_reward_zero_std": 0.0,
        "groups": 2.0,
        "short_groups": 0.0,
        "dropped": 0.0,
        "skipped": 0.0,
    }
    assert measure(scores, stats, config, 2.0, False) == pytest.approx(expected, rel=1e-12)


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


class LooksWrapped(Policy):
    """FSDP2 changes a policy's class like this; the gradient then has to come from autograd."""


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied-head"])
def test_head_adds_its_gradient_to_the_weights_own(tied: bool) -> None:
    """The same as autograd's, to which no second (V, D) gradient is handed."""
    batch = ragged_batch(token_budget=12)
    adding, other = tiny_policy(seed=0), tiny_policy(seed=0)
    for policy in (adding, other):
        if tied:
            policy.model.lm_head.weight = policy.model.model.embed_tokens.weight
    by_autograd = LooksWrapped(other.model)
    reference = tiny_policy(seed=1).requires_grad_(False)
    with Calls("linear_logprobs_bwd_accumulate") as calls:
        ours, _ = gradient_of(adding, reference, batch)
        buffers = [arguments[-1] for arguments in calls.arguments]
        assert len(buffers) == len(batch.micro) > 2 and len({id(buffer) for buffer in buffers}) == 1
        assert_equal(ours, gradient_of(by_autograd, reference, batch)[0])
    assert len(calls.arguments) == len(batch.micro)


def test_head_leaves_its_gradient_to_autograd_where_it_must() -> None:
    frozen, sharded, wrapped = tiny_policy(), tiny_policy(), nn.DataParallel(tiny_policy())
    frozen.model.lm_head.requires_grad_(False)
    sharded.__class__ = LooksWrapped
    for policy in (frozen, sharded, wrapped, tiny_policy(dtype=torch.bfloat16)):
        assert head_gradient(policy) is None
        assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_computes_in_bfloat16_around_float32_masters(checkpointing: bool) -> None:
    """Weights, their gradients and the scores stay float32; the products do not."""
    trained, base = (tiny_policy(dtype=torch.float32).model for _ in range(2))
    if checkpointing:
        trained.activation_checkpointing_enable({"use_reentrant": False})
    config = replace(CONFIG, mixed_precision="bf16", gradient_checkpointing=checkpointing)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    policy, reference = place_on_devices(trained, base, config, accelerator)
    seen = {}
    layer = unwrap(policy).model.model.layers[0]
    layer.mlp.register_forward_hook(lambda _, __, out: seen.update(product=out.dtype))
    for parameter in policy.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.update(grad=p.grad.dtype))
    batch = ragged_batch(token_budget=30)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    before = [p.detach().clone() for p in policy.parameters()]
    stats = update(policy, reference, batch, config, accelerator, optimizer, scheduler)
    assert seen == {"product": torch.bfloat16, "grad": torch.float32}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    # Equal weights through the same kernels: no log-ratio, whatever the precision.
    assert stats.metrics["agro/logratio_abs_max"] == 0.0 and not stats.skipped
    # A step of 1e-5 of weights around 1 would be lost in bfloat16.
    moved = [not torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True)]
    assert all(moved)
    exact, _ = gradient_of(tiny_policy(), tiny_policy().requires_grad_(False), batch)
    assert stats.metrics["grad_norm"] == pytest.approx(
        float(sum(g.square().sum() for g in exact.values())) ** 0.5, rel=0.03
    )
