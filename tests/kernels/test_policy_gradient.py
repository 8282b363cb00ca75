"""The policy-gradient baselines: equal on policy, told apart off policy by their fixed points."""

import pytest
import torch
from torch import Tensor

from agro_kernels.agro_loss import agro_coefficients
from agro_kernels.policy_gradient import (
    POLICY_GRADIENT_FORMS,
    policy_gradient_coefficients,
    reward_to_go_coefficients,
)
from tests.enumeration import BETA, WORLDS, World, all_tuples, expectation, expected_gradient

forms = pytest.mark.parametrize("form", POLICY_GRADIENT_FORMS)
worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())


def coefficients_of_tuples(
    world: World, form: str, n: int, logprobs: Tensor, sampling_logprobs: Tensor
) -> Tensor:
    rows, groups = all_tuples(len(world.rewards), n)
    return policy_gradient_coefficients(
        world.rewards[rows],
        logprobs[rows],
        world.ref_logprobs[rows],
        groups,
        beta=BETA,
        form=form,
        sampling_logprobs=sampling_logprobs[rows],
        num_groups=1,
    )


@forms
@worlds
@pytest.mark.parametrize("n", [2, 3])
def test_every_form_is_the_regularised_policy_gradient_on_policy(
    world: World, form: str, n: int
) -> None:
    coefficients = coefficients_of_tuples(world, form, n, world.logprobs(), world.logprobs())
    ours = expected_gradient(world, [world.policy] * n, coefficients)

    def objective(theta: Tensor) -> Tensor:
        law, ref = world.logprobs(theta).exp(), world.ref_logprobs
        if form == "reward_baseline_k3":  # the gradient of the reverse divergence
            penalty = (ref.exp() * (ref - world.logprobs(theta))).sum()
        else:
            penalty = (law * (world.logprobs(theta) - ref)).sum()
        return (law * world.rewards).sum() - BETA * penalty

    exact = -world.gradient(objective)
    assert float((ours - exact).abs().max()) < 1e-12


@forms
def test_fixed_points_off_policy_are_as_stated(form: str) -> None:
    """At the optimum of a tabular bandit, with data from another law."""
    world = WORLDS["bandit"]
    optimum = world.optimum
    coefficients = coefficients_of_tuples(world, form, 3, optimum.log(), world.behaviour.log())
    per_arm = expectation([world.behaviour] * 3, coefficients)
    field = per_arm - optimum * per_arm.sum()  # through the softmax of tabular logits
    if POLICY_GRADIENT_FORMS[form].optimum_is_fixed_point_off_policy:
        assert float(field.abs().max()) < 1e-12
        assert float(coefficients.abs().max()) < 1e-12  # nor is there any noise
    else:
        assert float(field.abs().max()) > 1e-2


def test_stale_form_has_no_regularisation_on_data_of_the_reference() -> None:
    world = WORLDS["bandit"]
    ours = coefficients_of_tuples(world, "stale", 3, world.logprobs(), world.ref_logprobs)
    rows, groups = all_tuples(len(world.rewards), 3)
    zeros = torch.zeros(len(rows), dtype=torch.float64)
    only_rewards = agro_coefficients(
        world.rewards[rows], zeros, zeros, groups, beta=BETA, scale=1 / BETA, num_groups=1
    ).coefficients
    assert float((ours - only_rewards).abs().max()) < 1e-12


@forms
def test_invalid_rows_and_short_groups_get_zero(form: str) -> None:
    rewards = torch.tensor([1.0, float("nan"), 0.0, 2.0, 5.0])
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -1.5, -1.0])
    groups = torch.tensor([3, 3, 3, 3, 8])

    def coefficients(rows: list[int]) -> Tensor:
        return policy_gradient_coefficients(
            rewards[rows],
            logprobs[rows],
            torch.zeros(len(rows)),
            groups[rows],
            beta=BETA,
            form=form,
            sampling_logprobs=logprobs[rows] - 0.1,
            scale=2.0,
        )

    ours = coefficients([0, 1, 2, 3, 4])
    assert ours.dtype == torch.float32
    assert ours[[1, 4]].tolist() == [0.0, 0.0]
    assert torch.equal(ours[[0, 2, 3]], coefficients([0, 2, 3]))
    assert torch.equal(coefficients([4, 2, 0, 3]), ours[[4, 2, 0, 3]])
    assert coefficients([]).shape == (0,)


@pytest.mark.parametrize("form", ["reward_baseline_k3", "importance_weighted"])
def test_extreme_log_ratios_stay_finite(form: str) -> None:
    ours = policy_gradient_coefficients(
        torch.tensor([1.0, 0.0]),
        torch.tensor([-2000.0, 2000.0]),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int64),
        beta=1e-3,
        form=form,
        sampling_logprobs=torch.zeros(2),
    )
    assert ours.isfinite().all()


def test_reward_to_go_of_one_token_sequences_is_the_sequence_form() -> None:
    logprobs, ref_logprobs, rewards = torch.randn(
        3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    groups = torch.tensor([0, 1, 0, 1, 1, 5])
    ours = reward_to_go_coefficients(
        logprobs,
        ref_logprobs,
        rewards,
        groups,
        torch.arange(7),
        beta=BETA,
        on_policy=torch.ones(6, dtype=torch.bool),
        scale=1.5,
    )
    whole = agro_coefficients(rewards, logprobs, ref_logprobs, groups, beta=BETA, scale=1.5)
    assert float((ours - whole.coefficients).abs().max()) < 1e-12


def test_reward_to_go_drops_sequences_that_hold_nan() -> None:
    logprobs = torch.tensor([-1.0, -2.0, float("nan"), -1.0, -3.0, -0.5])
    ours = reward_to_go_coefficients(
        logprobs,
        torch.zeros(6),
        torch.tensor([1.0, 0.0, 2.0]),
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([0, 2, 3, 6], dtype=torch.int32),
        beta=BETA,
        on_policy=torch.ones(3, dtype=torch.bool),
    )
    assert ours[2] == 0
    assert ours.isfinite().all() and (ours[[0, 1, 3, 4, 5]] != 0).all()


def test_wrong_arguments_are_named() -> None:
    batch = (torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="form: expected one of loo, no_baseline, .*got 'ppo'"):
        policy_gradient_coefficients(*batch, beta=BETA, form="ppo")
    with pytest.raises(ValueError, match=r"sampling_logprobs: expected \(B,\).*got None"):
        policy_gradient_coefficients(*batch, beta=BETA, form="stale")
    with pytest.raises(ValueError, match=r"sampling_logprobs: expected shape .*got \(3,\)"):
        policy_gradient_coefficients(
            *batch, beta=BETA, form="stale", sampling_logprobs=torch.zeros(3)
        )
    with pytest.raises(ValueError, match="beta: expected a finite number > 0, got 0"):
        policy_gradient_coefficients(*batch, beta=0.0, form="loo")
