"""The AGRO coefficients against exact expectations: every tuple of outcomes is a group."""

import math

import pytest
import torch
from torch import Tensor

from agro_kernels.agro_loss import agro_coefficients, agro_loss
from agro_kernels.packing import pack_sequences
from agro_kernels.policy_gradient import policy_gradient_coefficients, reward_to_go_coefficients
from tests.enumeration import (
    BETA,
    WORLDS,
    World,
    all_tuples,
    expectation,
    expected_gradient,
    weighted_variance,
)

worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
sizes = pytest.mark.parametrize("n", [2, 3, 4])
tapers = pytest.mark.parametrize("taper", [0.0, 0.5, 1.0, math.inf])


def assert_equal_to(ours: Tensor, exact: Tensor, tolerance: float = 1e-12) -> None:
    ours, exact = ours.detach(), exact.detach()
    error = float((ours - exact).abs().max())
    assert error <= tolerance * max(1.0, float(exact.abs().max())), error


def coefficients_of_tuples(world: World, n: int, **options) -> Tensor:
    """Undivided by the number of groups: each tuple is weighted by its own probability instead."""
    rows, groups = all_tuples(len(world.rewards), n)
    return agro_coefficients(
        world.rewards[rows],
        world.logprobs()[rows],
        world.ref_logprobs[rows],
        groups,
        beta=BETA,
        num_groups=1,
        **options,
    ).coefficients


def on_policy_gradient(world: World) -> Tensor:
    return world.gradient(
        lambda theta: 0.5 * weighted_variance(world.logprobs(theta).exp(), world.regularized(theta))
    )


def random_batch(seed: int = 0, num_groups: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rewards, logprobs, ref_logprobs (B,) float64 and unsorted groups of 2 to 9 rows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 10, (num_groups,), generator=generator)
    groups = torch.arange(num_groups).repeat_interleave(sizes)
    groups = groups[torch.randperm(len(groups), generator=generator)] * 7 - 11
    rewards, logprobs, ref_logprobs = torch.randn(
        3, len(groups), generator=generator, dtype=torch.float64
    )
    return rewards, logprobs, ref_logprobs, groups


def test_agro_is_the_leave_one_out_policy_gradient_times_beta() -> None:
    batch = random_batch()
    ours = agro_coefficients(*batch, beta=BETA, scale=1 / BETA).coefficients
    assert_equal_to(ours, policy_gradient_coefficients(*batch, beta=BETA, form="loo"))


def test_four_forms_of_the_pathwise_gradient_agree_on_a_network() -> None:
    generator = torch.Generator().manual_seed(5)
    n, vocabulary, length = 5, 7, 4
    embedding, head = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in [(vocabulary, 6), (6, vocabulary)]
    )
    inputs, targets = torch.randint(0, vocabulary, (2, n, length), generator=generator)
    ref_logprobs = torch.randn(n, length, generator=generator, dtype=torch.float64) - 2
    rewards = torch.randn(n, generator=generator, dtype=torch.float64)
    logits = embedding[inputs].tanh() @ head
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, (embedding, head), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    regularized = rewards - BETA * (logprobs - ref_logprobs).sum(1)
    score, frozen = logprobs.sum(1), regularized.detach()
    mean_of_others = (frozen.sum() - frozen) / (n - 1)
    differences = (frozen[:, None] - frozen) * (score[:, None] - score)
    forms = [
        -BETA * ((frozen - frozen.mean()) * score).sum() / (n - 1),
        -BETA * ((frozen - mean_of_others) * score).sum() / n,
        -BETA * differences.sum() / 2 / (n * (n - 1)),
        0.5 * regularized.var(),
    ]
    cu_seqlens = torch.arange(0, n * length + 1, length, dtype=torch.int32)
    ours = agro_loss(
        logprobs.flatten(),
        ref_logprobs.flatten(),
        rewards,
        torch.zeros(n, dtype=torch.int64),
        cu_seqlens,
        beta=BETA,
    )
    assert_equal_to(ours, forms[-1])
    for form in forms:
        assert_equal_to(gradient(ours), gradient(form))


@worlds
@sizes
def test_pathwise_coefficients_are_unbiased_for_any_behaviour(world: World, n: int) -> None:
    exact = world.gradient(
        lambda theta: 0.5 * weighted_variance(world.behaviour, world.regularized(theta))
    )
    ours = expected_gradient(world, [world.behaviour] * n, coefficients_of_tuples(world, n))
    assert_equal_to(ours, exact)


@worlds
@sizes
@pytest.mark.parametrize("lr_baseline", ["auto", 0.0, 0.3, 1.0])
def test_on_policy_coefficients_are_unbiased(
    world: World, n: int, lr_baseline: float | str
) -> None:
    ours = coefficients_of_tuples(world, n, lr_weight=1.0, lr_baseline=lr_baseline)
    assert_equal_to(expected_gradient(world, [world.policy] * n, ours), on_policy_gradient(world))


@worlds
@sizes
def test_plug_in_likelihood_ratio_terms_are_biased_by_known_factors(world: World, n: int) -> None:
    """Why the op has n / (n-1)^2 and not the customary 1 / n in front of the square."""
    rows, _ = all_tuples(len(world.rewards), n)
    regularized = world.regularized(world.theta)[rows].view(-1, n)
    squares = (regularized - regularized.mean(1, keepdim=True)) ** 2
    mean = squares.mean(1, keepdim=True)
    path = coefficients_of_tuples(world, n)
    exact = on_policy_gradient(world) - expected_gradient(world, [world.policy] * n, path)
    for term, factor in [
        ((squares + mean) / (2 * (n - 1)), 1.0),
        (squares / (2 * n), ((n - 1) / n) ** 2),
        ((squares - mean) / (2 * n), (n - 1) * (n - 2) / n**2),
    ]:
        ours = expected_gradient(world, [world.policy] * n, term.flatten())
        assert_equal_to(ours, factor * exact)


@tapers
def test_a_constant_reward_per_prompt_changes_nothing(taper: float) -> None:
    rewards, *rest = batch = random_batch()
    shifted = (rewards + 3.0 * batch[-1].double(), *rest)
    options = {"beta": BETA, "lr_weight": 0.7, "taper": taper, "sampling_logprobs": batch[2]}
    ours, shifted_ours = (agro_coefficients(*b, **options).coefficients for b in (batch, shifted))
    assert_equal_to(shifted_ours, ours, 1e-10)


@pytest.mark.parametrize("lr_weight", [0.0, 0.7])
@tapers
def test_scaling_reward_and_beta_scales_coefficients_by_the_square(
    taper: float, lr_weight: float
) -> None:
    rewards, *rest = batch = random_batch()
    options = {"lr_weight": lr_weight, "taper": taper, "sampling_logprobs": batch[2]}
    ours = agro_coefficients(*batch, beta=BETA, **options).coefficients
    scaled = agro_coefficients(3 * rewards, *rest, beta=3 * BETA, **options).coefficients
    assert_equal_to(scaled, 9 * ours, 1e-10)


@worlds
@pytest.mark.parametrize("lr_cap", [False, True], ids=["uncapped", "capped"])
@tapers
def test_every_coefficient_vanishes_at_the_optimum(
    world: World, lr_cap: bool, taper: float
) -> None:
    rows, groups = all_tuples(len(world.rewards), 3)
    ours = agro_coefficients(
        world.rewards[rows],
        world.optimum.log()[rows],
        world.ref_logprobs[rows],
        groups,
        beta=BETA,
        lr_weight=1.0,
        lr_cap=lr_cap,
        num_groups=1,
        sampling_logprobs=world.behaviour.log()[rows],
        taper=taper,
    )
    assert_equal_to(ours.coefficients, torch.zeros_like(ours.coefficients))
    assert_equal_to(ours.stats.kl_to_optimum, torch.zeros((), dtype=torch.float64))


def tapered_field(
    problem: tuple[Tensor, Tensor, Tensor],
    law: Tensor,
    sampling_logprobs: Tensor,
    taper: float,
    *,
    n: int = 2,
    beta: float = BETA,
) -> Tensor:
    """mu(y) * E[s | y], (Y,), in groups of n of mu = `law`: where the log-probability of every
    response is pushed. s is n times minus the coefficient, at the size of a policy gradient.
    problem: rewards, logprobs and ref_logprobs, (Y,) each."""
    rows, groups = all_tuples(len(law), n)
    coefficients = agro_coefficients(
        *(values[rows] for values in problem),
        groups,
        beta=beta,
        num_groups=1,
        scale=1 / beta,
        sampling_logprobs=sampling_logprobs[rows],
        taper=taper,
    ).coefficients
    return -expectation([law] * n, coefficients)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("source", ["any-data", "own-samples"])
@tapers
def test_tapered_agro_stands_still_nowhere_but_at_the_optimum(
    taper: float, source: str, n: int
) -> None:
    """The steps of the proof, on random problems and for whatever weights in [0, 1] rows have.

    The update of the logit of y is mu(y) s(y) - pi(y) C, with s(y) the expectation of s at y and C
    that of s. Raising weighs in full and lowering at most in full, so C >= 0. The worst response is
    only lowered, s <= 0; the best one only raised, s = R - mean R. An update of 0 would make C = 0
    at the worst and then R = mean R at the best one: a constant R, which is the optimum.
    """
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        rewards, logits, ref_logits, data_logits, sampler = torch.randn(
            5, 5, generator=generator, dtype=torch.float64
        )
        logprobs, ref_logprobs = logits.log_softmax(0), ref_logits.log_softmax(0)
        policy = logprobs.exp()
        law = data_logits.softmax(0) if source == "any-data" else policy
        problem = rewards, logprobs, ref_logprobs
        field = tapered_field(problem, law, sampler - 1.6, taper, n=n)
        regularized = rewards - BETA * (logprobs - ref_logprobs)
        worst, best = int(regularized.argmin()), int(regularized.argmax())
        rise = law[best] * (regularized[best] - (law * regularized).sum())
        drift = field.sum()
        assert drift >= -1e-14
        assert field[worst] <= 1e-14
        assert_equal_to(field[best], rise)
        update = field - policy * drift
        # Either C is large, and the worst response falls, or it is small, and the best one rises.
        at_least = rise / 2 * min(1.0, float(policy[worst] / policy[best]))
        assert float(update.abs().max()) >= at_least > 1e-4


LAWS = {"reference": 2.0, "uniform": 1.0, "own": 2.0}  # and a step that suits each


@pytest.mark.parametrize("source", LAWS)
@pytest.mark.parametrize("taper", [0.0, 1.0, math.inf])
def test_tapered_agro_reaches_the_optimum_from_any_data(taper: float, source: str) -> None:
    """Exact updates, beta 1, from the reference: to 1e-9 of its KL from the optimum."""
    generator = torch.Generator().manual_seed(0)
    rewards, ref_logits = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    ref_logprobs = ref_logits.log_softmax(0)
    optimum = (ref_logprobs + rewards).log_softmax(0)
    laws = {"reference": ref_logprobs.exp(), "uniform": torch.full_like(rewards, 0.2)}

    def kl(logprobs: Tensor) -> float:
        return float((logprobs.exp() * (logprobs - optimum)).sum())

    logits = ref_logprobs
    for _ in range(600):
        logprobs = logits.log_softmax(0)
        if kl(logprobs) < 1e-9 * kl(ref_logprobs):
            return
        law = laws.get(source, logprobs.exp())
        problem = rewards, logprobs, ref_logprobs
        field = tapered_field(problem, law, law.log(), taper, beta=1.0)
        update = field - logprobs.exp() * field.sum()
        step = LAWS[source] / (1.0 if source == "own" else float(law.max()))
        logits = logits + step * update
    pytest.fail(f"KL is still {kl(logits.log_softmax(0)) / kl(ref_logprobs):.1e} of the first")


def test_what_moves_no_parameter_of_a_tabular_policy_is_a_multiple_of_it() -> None:
    """So the proof holds beyond a softmax: field = C pi where the update vanishes, as there."""
    world = WORLDS["tabular-sequences"]
    scores = world.scores().sum(1)
    assert int(torch.linalg.matrix_rank(scores)) == len(scores) - 1
    assert_equal_to(world.policy @ scores, torch.zeros_like(world.theta))


def test_one_step_reaches_the_optimum_from_uniform_data() -> None:
    world, num_arms = WORLDS["bandit"], 6
    logits = torch.linspace(-1.0, 2.0, num_arms, dtype=torch.float64)
    rows, groups = all_tuples(num_arms, 2)
    coefficients = agro_coefficients(
        world.rewards[rows],
        logits.log_softmax(0)[rows],
        world.ref_logprobs[rows],
        groups,
        beta=BETA,
        num_groups=1,
    ).coefficients
    uniform = torch.full((num_arms,), 1 / num_arms, dtype=torch.float64)
    per_arm = expectation([uniform] * 2, coefficients)
    gradient = per_arm - logits.softmax(0) * per_arm.sum()
    stepped = logits - num_arms / BETA**2 * gradient
    assert_equal_to(stepped.softmax(0), world.optimum)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
def test_gradient_does_not_depend_on_the_split_into_microbatches(
    dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(2)
    groups = torch.tensor([4, 1, 4, 1, 1, 9, 4, 9])
    lengths = torch.tensor([3, 0, 5, 2, 1, 4, 2, 6])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    features = torch.randn(int(lengths.sum()), 4, generator=generator).to(dtype)
    ref_logprobs = -torch.rand(len(features), generator=generator).to(dtype)
    rewards = torch.randn(len(groups), generator=generator).to(dtype)
    theta = torch.randn(4, generator=generator).to(dtype)
    options = {"beta": BETA, "lr_weight": 0.5}

    def logprobs(theta: Tensor) -> Tensor:
        return -torch.nn.functional.softplus(features @ theta)

    whole = theta.clone().requires_grad_()
    agro_loss(logprobs(whole), ref_logprobs, rewards, groups, cu_seqlens, **options).backward()

    # Coefficients once, from whole groups; then one sequence at a time, which splits every group.
    sums, ref_sums = (
        torch.stack([part.sum() for part in tokens.double().split(lengths.tolist())])
        for tokens in (logprobs(theta), ref_logprobs)
    )
    coefficients = agro_coefficients(rewards, sums, ref_sums, groups, **options).coefficients
    split = theta.clone().requires_grad_()
    for b, coefficient in enumerate(coefficients.to(dtype)):
        (coefficient * logprobs(split)[cu_seqlens[b] : cu_seqlens[b + 1]].sum()).backward()
    assert_equal_to(split.grad, whole.grad, tolerance)

    # Two devices with whole groups each and the global number of groups.
    ranks = theta.clone().requires_grad_()
    for rows in ((groups == 1).nonzero().squeeze(1), (groups != 1).nonzero().squeeze(1)):
        tokens = torch.cat([torch.arange(cu_seqlens[b], cu_seqlens[b + 1]) for b in rows])
        local = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[rows].cumsum(0)])
        agro_loss(
            logprobs(ranks)[tokens],
            ref_logprobs[tokens],
            rewards[rows],
            groups[rows],
            local,
            num_groups=torch.tensor(3),
            **options,
        ).backward()
    assert_equal_to(ranks.grad, whole.grad, tolerance)


@worlds
@pytest.mark.parametrize(("n", "num_on_policy"), [(2, 1), (3, 1), (3, 2), (4, 2)])
@pytest.mark.parametrize("lr_baseline", [0.0, 1.0])
def test_mixed_groups_are_exact_with_the_likelihood_ratio_term_masked(
    world: World, n: int, num_on_policy: int, lr_baseline: float
) -> None:
    share = num_on_policy / n
    num_pairs = num_on_policy * (n - num_on_policy) / (n * (n - 1))

    def stratified_loss(theta: Tensor) -> Tensor:
        law, regularized = world.logprobs(theta).exp(), world.regularized(theta)
        gap = (world.behaviour * regularized).sum() - (law * regularized).sum()
        return 0.5 * (
            (1 - share) * weighted_variance(world.behaviour, regularized)
            + share * weighted_variance(law, regularized)
            + num_pairs * gap**2
        )

    exact = world.gradient(stratified_loss)
    laws = [world.policy] * num_on_policy + [world.behaviour] * (n - num_on_policy)
    slots = torch.arange(n) < num_on_policy
    on_policy = slots.repeat(len(world.rewards) ** n)
    options = {"lr_weight": 1.0, "lr_baseline": lr_baseline}
    masked = coefficients_of_tuples(world, n, on_policy=on_policy, **options)
    assert_equal_to(expected_gradient(world, laws, masked), exact)
    unmasked = expected_gradient(world, laws, coefficients_of_tuples(world, n, **options))
    assert float((unmasked - exact).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["tabular-sequences", "tied-sequences"])
@pytest.mark.parametrize("n", [2, 3])
def test_reward_to_go_is_unbiased_on_policy_and_only_there(name: str, n: int) -> None:
    world = WORLDS[name]
    rows, groups = all_tuples(len(world.rewards), n)
    mask = world.mask[rows]
    token_logprobs = world.token_logprobs(world.theta)
    packed, cu_seqlens = pack_sequences(mask, token_logprobs[rows], world.ref[rows])
    batch = (*packed, world.rewards[rows], groups, cu_seqlens)
    everything = torch.ones(len(rows), dtype=torch.bool)
    tokens = reward_to_go_coefficients(*batch, beta=BETA, on_policy=everything, num_groups=1)
    coefficients = torch.zeros(mask.shape, dtype=torch.float64)
    coefficients[mask] = tokens

    def objective(theta: Tensor) -> Tensor:
        return (world.logprobs(theta).exp() * world.regularized(theta)).sum()

    on_policy = expected_gradient(world, [world.policy] * n, coefficients)
    assert_equal_to(on_policy, -BETA * world.gradient(objective))
    off_policy = expected_gradient(world, [world.behaviour] * n, coefficients)
    unbiased = expected_gradient(world, [world.behaviour] * n, coefficients_of_tuples(world, n))
    assert float((off_policy - unbiased).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="on_policy: expected all True, got 1 of"):
        everything[0] = False
        reward_to_go_coefficients(*batch, beta=BETA, on_policy=everything)


def test_padding_and_invalid_samples_do_not_touch_the_gradient() -> None:
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(6, 5, generator=generator) < 0.6
    logprobs, ref_logprobs = -torch.rand(2, 6, 5, generator=generator, dtype=torch.float64)
    rewards = torch.randn(6, generator=generator, dtype=torch.float64)
    groups = torch.tensor([0, 1, 0, 1, 0, 1])

    def gradient(logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor) -> Tensor:
        logprobs = logprobs.clone().requires_grad_()
        packed, cu_seqlens = pack_sequences(mask, logprobs, ref_logprobs)
        agro_loss(*packed, rewards, groups, cu_seqlens, beta=BETA, lr_weight=1.0).backward()
        assert logprobs.grad is not None
        return logprobs.grad

    clean = gradient(logprobs, ref_logprobs, rewards)
    assert torch.equal(clean == 0, ~mask)
    for junk in (math.nan, math.inf, 1e30):
        padded = [tokens.where(mask, junk) for tokens in (logprobs, ref_logprobs)]
        assert torch.equal(gradient(*padded, rewards), clean)

    # An invalid third sample leaves its group of three as a group of two.
    without = agro_coefficients(
        rewards[[0, 1, 3, 4, 5]],
        *((t * mask).sum(1)[[0, 1, 3, 4, 5]] for t in (logprobs, ref_logprobs)),
        groups[[0, 1, 3, 4, 5]],
        beta=BETA,
        lr_weight=1.0,
    ).coefficients
    for junk in (math.nan, math.inf, -math.inf):
        ours = gradient(logprobs, ref_logprobs, rewards.index_fill(0, torch.tensor(2), junk))
        expected = torch.zeros(6, dtype=torch.float64)
        expected[[0, 1, 3, 4, 5]] = without
        assert torch.equal(ours, expected[:, None] * mask)
        spoiled_ref = ref_logprobs.clone()
        spoiled_ref[2][mask[2].nonzero()[0]] = junk
        assert torch.equal(gradient(logprobs, spoiled_ref, rewards), ours)


def test_small_groups_and_equal_rewards() -> None:
    zeros = torch.zeros(4, dtype=torch.float64)
    log_ratios = torch.tensor([5.0, 1.0, 3.0, 2.0], dtype=torch.float64)
    groups = torch.tensor([0, 1, 1, 2])
    ours = agro_coefficients(zeros, log_ratios, zeros, groups, beta=BETA, lr_weight=1.0)
    assert ours.coefficients[[0, 3]].tolist() == [0.0, 0.0]
    assert [int(count) for count in ours.stats[5:8]] == [1, 2, 0]
    # Rewards are equal, yet the group of two is pulled towards the reference.
    pulled = agro_coefficients(zeros, log_ratios, zeros, groups, beta=BETA).coefficients
    assert pulled[1] < 0 < pulled[2]
    # In a group of two the likelihood-ratio term has no baseline, whatever was asked for.
    options = {"beta": BETA, "lr_weight": 1.0}
    for lr_baseline in (0.0, 0.5, 1.0):
        again = agro_coefficients(
            zeros, log_ratios, zeros, groups, lr_baseline=lr_baseline, **options
        )
        assert torch.equal(again.coefficients, ours.coefficients)


def test_unit_importance_weights_change_nothing() -> None:
    batch = random_batch()
    ours = agro_coefficients(*batch, beta=BETA)
    ones = torch.ones_like(batch[0])
    weighted = agro_coefficients(*batch, beta=BETA, importance_weights=ones)
    assert_equal_to(weighted.coefficients, ours.coefficients)
    assert_equal_to(weighted.stats.variance, ours.stats.variance)


@worlds
@sizes
def test_truncated_importance_weights_are_agro_under_the_reweighted_law(
    world: World, n: int
) -> None:
    weights = (world.policy / world.behaviour).clamp(max=1.2)
    law = world.behaviour * weights
    exact = law.sum() ** 2 * world.gradient(
        lambda theta: 0.5 * weighted_variance(law, world.regularized(theta))
    )
    rows, _ = all_tuples(len(world.rewards), n)
    ours = coefficients_of_tuples(world, n, importance_weights=weights[rows])
    assert_equal_to(expected_gradient(world, [world.behaviour] * n, ours), exact)


def two_arm_descent(gap: float, lr_cap: bool = False) -> float:
    """Gap of two logits after exact on-policy descent; reward 0, beta 1, reference (1/2, 1/2)."""
    rows, groups = all_tuples(2, 2)
    zeros = torch.zeros(len(rows), dtype=torch.float64)
    logits = torch.tensor([gap, 0.0], dtype=torch.float64)
    ref = torch.full((len(rows),), -math.log(2), dtype=torch.float64)
    for _ in range(600):
        law = logits.softmax(0)
        coefficients = agro_coefficients(
            zeros,
            law.log()[rows],
            ref,
            groups,
            beta=1.0,
            lr_weight=1.0,
            lr_cap=lr_cap,
            num_groups=1,
        ).coefficients
        per_arm = expectation([law] * 2, coefficients)
        logits = logits - 2.0 * (per_arm - law * per_arm.sum())
    return float(logits[0] - logits[1])


def test_exact_on_policy_gradient_has_the_two_arm_basin() -> None:
    """Stationary at z tanh(z / 2) = 2, |z| = 2.3994: to the optimum inside, away outside."""
    assert abs(two_arm_descent(2.39)) < 0.1
    assert two_arm_descent(2.41) > 4.0


def test_capped_likelihood_ratio_term_leaves_the_optimum_reachable() -> None:
    assert abs(two_arm_descent(4.0, lr_cap=True)) < 0.1


@pytest.mark.parametrize("success_rate", [0.1, 0.3, 0.7])
@sizes
def test_on_policy_success_rate_rule(success_rate: float, n: int) -> None:
    """At pi = pi_ref with 0/1 rewards, success less failure is -beta + (1 - 2p) / 2.

    Below p = 1/2 - beta that is positive: the exact on-policy gradient lowers the success rate.
    """
    law = torch.tensor([1 - success_rate, success_rate], dtype=torch.float64)
    rows, groups = all_tuples(2, n)
    logprobs = law.log()[rows]
    coefficients = agro_coefficients(
        rows.double(), logprobs, logprobs, groups, beta=BETA, lr_weight=1.0, num_groups=1
    ).coefficients
    failure, success = expectation([law] * n, coefficients) / law
    exact = torch.tensor(-BETA + (1 - 2 * success_rate) / 2, dtype=torch.float64)
    assert_equal_to(success - failure, exact)
