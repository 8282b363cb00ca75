"""The tabular problems: expected updates are gradients, sampled ones use their own rows."""

import torch
from torch import Tensor

from agro_train.experiments import tabular
from agro_train.experiments.tabular import Bandits, Groups, Sampler

BANDITS = tabular.gaussian_bandits([3, 5], num_arms=6, beta=0.4)
LOGITS = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LAW = tabular.gaussian_bandits([8, 9], num_arms=6, beta=1.0).ref_logprobs.exp()


def descent(loss_of_logprobs: object, logits: Tensor) -> Tensor:
    """Minus the autograd gradient in the logits, over beta, of a loss (S,) of log-policies."""
    logits = logits.clone().requires_grad_()
    total = loss_of_logprobs(logits.log_softmax(-1)).sum()  # type: ignore[operator]
    return -torch.autograd.grad(total, logits)[0] / BANDITS.beta


def half_variance(law: Tensor, values: Tensor) -> Tensor:
    mean = (law * values).sum(-1, keepdim=True)
    return 0.5 * (law * (values - mean) ** 2).sum(-1)


def assert_same(ours: Tensor, truth: Tensor) -> None:
    assert ours.shape == truth.shape
    assert float((ours - truth).abs().max()) < 1e-12


def test_off_policy_direction_is_the_descent_of_the_variance_of_R() -> None:
    def loss(logprobs: Tensor) -> Tensor:
        return half_variance(LAW, BANDITS.regularized(logprobs))

    logprobs = LOGITS.log_softmax(-1)
    assert_same(tabular.off_policy_agro(BANDITS, LAW)(logprobs), descent(loss, LOGITS))


def test_on_policy_direction_differentiates_the_law_too() -> None:
    def loss(logprobs: Tensor) -> Tensor:
        return half_variance(logprobs.exp(), BANDITS.regularized(logprobs))

    logprobs = LOGITS.log_softmax(-1)
    assert_same(tabular.on_policy_agro(BANDITS, lr_weight=1)(logprobs), descent(loss, LOGITS))


def test_without_the_likelihood_ratio_term_it_is_the_regularised_policy_gradient() -> None:
    def loss(logprobs: Tensor) -> Tensor:
        expected = logprobs.exp() * BANDITS.regularized(logprobs)
        return -BANDITS.beta * expected.sum(-1)

    logprobs = LOGITS.log_softmax(-1)
    assert_same(tabular.on_policy_agro(BANDITS, lr_weight=0)(logprobs), descent(loss, LOGITS))


def test_capped_direction_never_prefers_a_lower_R() -> None:
    logprobs = LOGITS.log_softmax(-1)
    order = BANDITS.regularized(logprobs).argsort(-1)

    def per_sample(lr_cap: bool) -> Tensor:
        direction = tabular.on_policy_agro(BANDITS, lr_weight=1, lr_cap=lr_cap)(logprobs)
        return (direction / logprobs.exp()).gather(1, order)

    assert (per_sample(lr_cap=True).diff(dim=-1) >= -1e-12).all()
    assert (per_sample(lr_cap=False).diff(dim=-1) < -1e-3).any()  # what the cap is for


def test_uniform_data_and_the_right_step_solve_it_at_once() -> None:
    uniform = torch.full_like(LOGITS, 1 / 6)
    *_, logprobs = tabular.policies(
        LOGITS, tabular.off_policy_agro(BANDITS, uniform), 6 / BANDITS.beta, 1
    )
    assert_same(logprobs, BANDITS.optimum())


def test_relative_kl_is_one_at_the_reference_and_zero_at_the_optimum() -> None:
    assert_same(BANDITS.relative_kl(BANDITS.ref_logprobs), torch.ones(2, dtype=torch.float64))
    assert_same(BANDITS.relative_kl(BANDITS.optimum()), torch.zeros(2, dtype=torch.float64))


def test_relative_kl_is_recorded_after_as_many_updates_as_asked() -> None:
    direction = tabular.on_policy_agro(BANDITS, lr_weight=0)
    run = list(tabular.policies(BANDITS.ref_logprobs, direction, 0.3, 7))
    recorded = tabular.relative_kl_at([0, 2, 7], BANDITS, direction, 0.3)
    assert_same(recorded, torch.stack([BANDITS.relative_kl(run[k]) for k in (0, 2, 7)]))


def test_a_seed_is_the_same_problem_in_any_company() -> None:
    alone = tabular.gaussian_bandits([5], num_arms=6, beta=0.4)
    assert torch.equal(alone.rewards[0], BANDITS.rewards[1])
    assert torch.equal(alone.ref_logprobs[0], BANDITS.ref_logprobs[1])


def test_sampler_gives_each_problem_the_gradient_of_its_own_rows() -> None:
    # Rewards that name their problem and arm.
    bandits = Bandits(torch.arange(12.0).double().view(2, 6), BANDITS.ref_logprobs, beta=1.0)
    sampler = Sampler(bandits, num_groups=3, group_size=4, seed=2)
    logprobs = LOGITS.log_softmax(-1)
    seen: list[Groups] = []

    def coefficients(samples: Groups) -> Tensor:
        seen.append(samples)
        return samples.rewards.sin()

    ours = sampler.direction(LAW, logprobs, coefficients)
    (samples,) = seen
    problem, arm = samples.rewards.long() // 6, samples.rewards.long() % 6
    assert torch.equal(samples.logprobs, logprobs[problem, arm])
    assert torch.equal(samples.ref_logprobs, bandits.ref_logprobs[problem, arm])
    assert torch.equal(samples.groups, torch.arange(6).repeat_interleave(4))
    assert torch.equal(problem, samples.groups // 3)

    logits = LOGITS.clone().requires_grad_()
    loss = (samples.rewards.sin() * logits.log_softmax(-1)[problem, arm]).sum()
    assert_same(ours, -torch.autograd.grad(loss, logits)[0])


def test_sampler_draws_from_the_law() -> None:
    sampler = Sampler(BANDITS, num_groups=500, group_size=8, seed=4)
    ones: list[Tensor] = []

    def coefficients(samples: Groups) -> Tensor:
        ones.append(samples.rewards)
        return torch.ones_like(samples.rewards)

    # Coefficients of 1 sum the scores: counts less 4000 * pi.
    logprobs = LOGITS.log_softmax(-1)
    shares = logprobs.exp() - sampler.direction(LAW, logprobs, coefficients) / 4000
    assert ones[0].shape == (8000,)
    assert float((shares - LAW).abs().max()) < 5 * 0.5 / 4000**0.5  # five standard errors
