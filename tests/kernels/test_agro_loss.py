"""agro_coefficients, agro_loss and linear_agro_loss against the reference, and their edges."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agro_kernels import reference
from agro_kernels.agro_loss import AgroStats, agro_coefficients, agro_loss, linear_agro_loss
from agro_kernels.agro_options import AGRO_SCHEMA, AgroKeywords, AgroOptions, AgroTokens
from agro_kernels.modules import LinearAgroLoss

BETA = 0.3
LENGTHS = [3, 1, 0, 5, 2, 4, 1, 3, 2, 6, 1, 2, 2, 1, 3, 2, 1, 2]
# Ragged, unsorted, negative ids; one group of one, one of two, one of nine.
GROUPS = [5, -2, 5, 7, -2, 5, -2, -2, 5, 40, -2, -2, 7, -2, 5, -2, -2, 5]
OPTIONS = {
    "off-policy": {},
    "on-policy": {"lr_weight": 1.0},
    "on-policy-without-baseline": {"lr_weight": 0.6, "lr_baseline": 0.0},
    "on-policy-half-baseline": {"lr_weight": 1.0, "lr_baseline": 0.5, "scale": 2.5},
    "capped": {"lr_weight": 1.0, "lr_cap": True},
    "mixed": {"lr_weight": 1.0, "on_policy": True},
    "mixed-capped": {"lr_weight": 0.5, "on_policy": True, "lr_cap": True},
    "importance-weighted": {"importance_weights": True},
    "global-count": {"num_groups": 10, "lr_weight": 0.3},
    "tapered": {"sampling_logprobs": True, "taper": 1.0},
    "tapered-on-policy": {"sampling_logprobs": True, "taper": 0.5, "lr_weight": 1.0, "scale": 3.0},
    "tapered-by-row": {"sampling_logprobs": True, "taper": True, "lr_weight": 1.0, "lr_cap": True},
    "tapered-weighted": {"sampling_logprobs": True, "taper": 2.0, "importance_weights": True},
    "one-sided": {"sampling_logprobs": True, "taper": math.inf},
    "untapered": {"sampling_logprobs": True, "lr_weight": 0.5},
}
options = pytest.mark.parametrize("name", OPTIONS)


class Batch:
    """One packed batch and the sums over its sequences, float64."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_tokens, num_rows = sum(LENGTHS), len(LENGTHS)
        lengths = torch.tensor(LENGTHS)
        self.cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        self.groups = torch.tensor(GROUPS)
        self.logprobs, self.ref_logprobs = -torch.rand(
            2, num_tokens, generator=generator, dtype=torch.float64
        )
        self.rewards = torch.randn(num_rows, generator=generator, dtype=torch.float64)
        self.on_policy = torch.rand(num_rows, generator=generator) < 0.5
        self.weights = torch.rand(num_rows, generator=generator, dtype=torch.float64)
        # Some samplers gave a row more than the policy, some less; of three rows nobody knows.
        noise = torch.randn(num_rows, generator=generator, dtype=torch.float64)
        self.sampling_logprobs = self.sums[1] + noise
        self.sampling_logprobs[[2, 8, 13]] = torch.tensor([math.nan, math.inf, -math.inf]).double()
        self.row_taper = 2 * torch.rand(num_rows, generator=generator, dtype=torch.float64)
        self.row_taper[[1, 4]] = torch.tensor([0.0, math.inf]).double()

    def options(self, name: str) -> dict:
        """For the public functions."""
        filled = dict(OPTIONS[name], beta=BETA)
        if "on_policy" in filled:
            filled["on_policy"] = self.on_policy
        if "importance_weights" in filled:
            filled["importance_weights"] = self.weights
        if "sampling_logprobs" in filled:
            filled["sampling_logprobs"] = self.sampling_logprobs
        if filled.get("taper") is True:
            filled["taper"] = self.row_taper
        return filled

    def op_options(self, name: str) -> AgroOptions:
        """The same for the ops."""
        return AgroOptions.of(self.rewards, **self.options(name))

    @property
    def tokens(self) -> AgroTokens:
        rows = self.rewards, self.groups, self.cu_seqlens
        return AgroTokens(self.logprobs, self.ref_logprobs, *rows)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """rewards, logprobs, ref_logprobs, groups, each (B,)."""
        per_sequence = (
            torch.stack([part.sum() for part in tokens.split(LENGTHS)])
            for tokens in (self.logprobs, self.ref_logprobs)
        )
        return self.rewards, *per_sequence, self.groups


def assert_close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


@options
def test_coefficients_match_reference(name: str) -> None:
    batch = Batch()
    ours = agro_coefficients(*batch.sums, **batch.options(name)).coefficients
    assert_close(ours, reference.agro_coefficients(*batch.sums, **batch.options(name)))


@options
def test_loss_and_gradient_match_reference(name: str) -> None:
    batch = Batch()
    results = []
    for function in (agro_loss, reference.agro_loss):
        logprobs = batch.logprobs.clone().requires_grad_()
        loss = function(logprobs, *batch.tokens[1:], **batch.options(name))
        assert loss.shape == ()
        (gradient,) = torch.autograd.grad(1.7 * loss, logprobs)
        results.append((loss.detach(), gradient))
    (loss, gradient), (exact_loss, exact_gradient) = results
    assert_close(loss, exact_loss)
    assert_close(gradient, exact_gradient)


@options
def test_coefficients_are_the_gradient_of_the_loss(name: str) -> None:
    batch = Batch()
    logprobs = batch.logprobs.clone().requires_grad_()
    agro_loss(logprobs, *batch.tokens[1:], **batch.options(name)).backward()
    coefficients = agro_coefficients(*batch.sums, **batch.options(name)).coefficients
    assert_close(logprobs.grad, coefficients.repeat_interleave(torch.tensor(LENGTHS)))


@pytest.mark.parametrize("name", ["off-policy", "importance-weighted"])
def test_gradient_is_that_of_the_value(name: str) -> None:
    batch = Batch()
    assert torch.autograd.gradcheck(
        lambda logprobs: agro_loss(logprobs, *batch.tokens[1:], **batch.options(name)),
        batch.logprobs.requires_grad_(),
    )


def test_loss_is_half_the_mean_variance() -> None:
    batch = Batch()
    _, logprobs, ref_logprobs, groups = batch.sums
    regularized = batch.rewards - BETA * (logprobs - ref_logprobs)
    variances = torch.stack([regularized[groups == g].var() for g in (5, -2, 7)])
    assert_close(agro_loss(*batch.tokens, beta=BETA), variances.mean() / 2)
    assert_close(agro_loss(*batch.tokens, beta=BETA, scale=4.0, num_groups=6), variances.sum() / 3)


def test_stats_are_what_they_say() -> None:
    batch = Batch()
    batch.rewards[0] = math.nan
    batch.logprobs[batch.cu_seqlens[3]] = -math.inf  # leaves group 7 with one row
    rewards, logprobs, ref_logprobs, groups = batch.sums
    stats = agro_coefficients(rewards, logprobs, ref_logprobs, groups, beta=BETA).stats
    kept = torch.ones_like(rewards, dtype=torch.bool)
    kept[[0, 3]] = False
    log_ratio = logprobs - ref_logprobs
    regularized = rewards - BETA * log_ratio
    in_groups = [regularized[kept & (groups == g)] for g in (5, -2)]
    variance = torch.stack([values.var() for values in in_groups]).mean()
    largest = torch.cat([values - values.mean() for values in in_groups]).abs().max()
    exact = AgroStats(
        reward=rewards[kept].mean(),
        log_ratio=log_ratio[kept].mean(),
        variance=variance,
        kl_to_optimum=variance / (2 * BETA**2),
        lr_dominance=largest / (2 * BETA),
        num_groups=torch.tensor(2),
        num_short_groups=torch.tensor(2),
        num_dropped=torch.tensor(2),
        taper_weight=torch.tensor(1.0).double(),
        sampler_log_ratio=torch.tensor(0.0).double(),
    )
    for value, expected in zip(stats, exact, strict=True):
        assert_close(value, expected)


@options
def test_order_and_names_of_groups_do_not_matter(name: str) -> None:
    batch = Batch()
    rewards, logprobs, ref_logprobs, groups = batch.sums
    ours = agro_coefficients(*batch.sums, **batch.options(name))
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(1))
    permuted_options = {
        key: value[order] if isinstance(value, Tensor) else value
        for key, value in batch.options(name).items()
    }
    permuted = agro_coefficients(
        rewards[order],
        logprobs[order],
        ref_logprobs[order],
        (1000 - 3 * groups[order]).to(torch.int32),
        **permuted_options,
    )
    assert_close(permuted.coefficients, ours.coefficients[order])
    assert_close(torch.stack(permuted.stats[:5]), torch.stack(ours.stats[:5]))


def test_taper_shrinks_only_what_lowers_a_probability() -> None:
    """By min(1, pi / mu) ** taper, row by row; the rows that are raised keep every bit."""
    batch = Batch()
    _rewards, logprobs, _ref_logprobs, _groups = batch.sums
    plain = agro_coefficients(*batch.sums, beta=BETA).coefficients
    for taper in (0.5, 1.0, batch.row_taper):
        tapered = agro_coefficients(
            *batch.sums, beta=BETA, sampling_logprobs=batch.sampling_logprobs, taper=taper
        )
        ratio = (logprobs - batch.sampling_logprobs).exp()
        weights = ratio.clamp(max=1.0) ** taper
        if isinstance(taper, Tensor):
            weights = weights.where(taper != math.inf, 0.0)
        weights = weights.where(batch.sampling_logprobs.isfinite(), 1.0).where(plain > 0, 1.0)
        assert_close(tapered.coefficients, plain * weights)
        raised = plain <= 0
        assert torch.equal(tapered.coefficients[raised], plain[raised])
        assert 0 < (weights < 1).sum() < (plain > 0).sum()
        assert_close(tapered.stats.taper_weight, weights[plain > 0].mean())
        known = batch.sampling_logprobs.isfinite()
        assert_close(
            tapered.stats.sampler_log_ratio, (logprobs - batch.sampling_logprobs)[known].mean()
        )


def test_one_sided_is_weight_0_in_every_row_of_a_known_sampler() -> None:
    """Also where pi >= mu: at pi = mu the limit of a growing exponent would hang on rounding."""
    batch = Batch()
    plain = agro_coefficients(*batch.sums, beta=BETA).coefficients
    tapered = agro_coefficients(
        *batch.sums, beta=BETA, sampling_logprobs=batch.sampling_logprobs, taper=math.inf
    ).coefficients
    known = batch.sampling_logprobs.isfinite()
    assert torch.equal(tapered, plain.where((plain <= 0) | ~known, 0.0))
    assert (plain[~known] > 0).any() and (plain[known] > 0).any()


ANYTHING = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0] * 3).double()


@options
def test_without_an_exponent_or_a_sampler_agro_is_as_it_was(name: str) -> None:
    """Bit for bit, whatever sampling_logprobs hold."""
    batch = Batch()
    filled = batch.options(name)
    sampled, exponent = filled.pop("sampling_logprobs", None), filled.pop("taper", 0.0)
    plain = agro_coefficients(*batch.sums, **filled)
    for extra in (
        {"sampling_logprobs": ANYTHING},
        {"sampling_logprobs": ANYTHING, "taper": torch.zeros(18)},
        {"sampling_logprobs": sampled},
        {"taper": exponent},
        {"sampling_logprobs": torch.full((18,), math.nan), "taper": exponent},
    ):
        ours = agro_coefficients(*batch.sums, **filled, **extra)
        assert torch.equal(ours.coefficients, plain.coefficients)
        assert ours.stats.taper_weight == 1
        assert torch.equal(torch.stack(ours.stats[:8]), torch.stack(plain.stats[:8]))


@options
def test_own_samples_are_agro_at_every_finite_taper(name: str) -> None:
    batch = Batch()
    own = {"sampling_logprobs": batch.sums[1]}
    filled = {**batch.options(name), "taper": 0.0}
    plain = agro_coefficients(*batch.sums, **filled)
    for taper in (0.5, 1.0, 1e300, torch.linspace(0, 9, 18)):
        ours = agro_coefficients(*batch.sums, **{**filled, **own, "taper": taper})
        assert torch.equal(ours.coefficients, plain.coefficients)
        assert ours.stats.taper_weight == 1 and ours.stats.sampler_log_ratio == 0


def test_taper_leaves_the_value_and_the_likelihood_ratio_term_alone() -> None:
    batch = Batch()
    taper = {"sampling_logprobs": batch.sampling_logprobs, "taper": 1.0}
    options = {"beta": BETA, "lr_weight": 0.7, "on_policy": batch.on_policy}
    plain, tapered = (agro_loss(*batch.tokens, **options, **more) for more in ({}, taper))
    assert torch.equal(plain, tapered)
    parts = []
    for more in ({}, taper):
        both = agro_coefficients(*batch.sums, **options, **more).coefficients
        pathwise = agro_coefficients(*batch.sums, beta=BETA, **more).coefficients
        parts.append(both - pathwise)
    assert_close(*parts)


def test_log_ratios_to_the_reference_may_stand_for_log_probabilities() -> None:
    """In logprobs, with zeros as ref_logprobs; then sampling_logprobs is log(mu / pi_ref)."""
    batch = Batch()
    rewards, logprobs, ref_logprobs, groups = batch.sums
    sampled = batch.sampling_logprobs
    ours, shifted = (
        agro_coefficients(rewards, *sums, groups, beta=BETA, sampling_logprobs=mu, taper=1.0)
        for *sums, mu in (
            (logprobs, ref_logprobs, sampled),
            (logprobs - ref_logprobs, torch.zeros_like(logprobs), sampled - ref_logprobs),
        )
    )
    assert_close(shifted.coefficients, ours.coefficients)


def test_rows_whose_exponent_is_negative_or_nan_are_dropped() -> None:
    batch = Batch()
    exponents = batch.row_taper.clone()
    exponents[5], exponents[7] = -1.0, math.nan
    tapered = {"beta": BETA, "sampling_logprobs": batch.sampling_logprobs}
    ours = agro_coefficients(*batch.sums, **tapered, taper=exponents)
    batch.rewards[[5, 7]] = math.nan
    without = agro_coefficients(*batch.sums, **tapered, taper=batch.row_taper)
    assert torch.equal(ours.coefficients, without.coefficients)
    assert int(ours.stats.num_dropped) == 2


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 32])
@pytest.mark.parametrize("lr_baseline", ["auto", 0.0, 0.3, 1.0])
def test_lr_cap_keeps_coefficients_falling_in_the_regularised_reward(
    size: int, lr_baseline: float | str
) -> None:
    generator = torch.Generator().manual_seed(size)
    rewards = torch.randn(200 * size, generator=generator, dtype=torch.float64)
    zeros = torch.zeros_like(rewards)
    groups = torch.arange(200).repeat_interleave(size)
    options: dict = {"beta": 0.1, "lr_weight": 1.0, "lr_baseline": lr_baseline}

    def rises(**extra: float) -> Tensor:
        """Per group, by how much a better row's coefficient exceeds a worse one's, at most."""
        ours = agro_coefficients(rewards, zeros, zeros, groups, **options | extra).coefficients
        order = rewards.view(200, size).argsort(1)
        return ours.view(200, size).gather(1, order).diff(dim=1).amax(1) / ours.abs().max()

    assert rises(lr_cap=True).max() < 1e-12
    if (
        size > 2
    ):  # two rows have the same square: the term moves both alike, there is nothing to cap
        assert rises(lr_cap=False).max() > 0.01


def test_lr_cap_leaves_small_terms_and_flat_groups_alone() -> None:
    batch = Batch()
    options: dict = {"beta": 1e3, "lr_weight": 0.8}  # so strong a beta that nothing needs a cap
    plain, capped = (
        agro_coefficients(*batch.sums, **options, lr_cap=cap).coefficients for cap in (False, True)
    )
    assert torch.equal(plain, capped)
    # Nothing to cap where nothing deviates: no division by zero.
    zeros = torch.zeros(4)
    flat = agro_coefficients(
        zeros, zeros, zeros, zeros.long(), beta=BETA, lr_weight=1.0, lr_cap=True
    )
    assert flat.coefficients.tolist() == [0.0] * 4


def test_rows_with_bad_importance_weights_are_dropped() -> None:
    batch = Batch()
    weights = batch.weights.clone()
    weights[1], weights[4], weights[5] = -0.5, math.nan, math.inf
    ours = agro_coefficients(*batch.sums, beta=BETA, importance_weights=weights)
    assert int(ours.stats.num_dropped) == 3
    assert ours.coefficients[[1, 4, 5]].tolist() == [0.0] * 3
    assert ours.coefficients.isfinite().all()
    none = agro_coefficients(*batch.sums, beta=BETA, importance_weights=torch.zeros(len(weights)))
    assert not none.coefficients.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_rounded_once(dtype: torch.dtype) -> None:
    batch = Batch()
    logprobs, ref_logprobs, rewards = (
        t.to(dtype) for t in (batch.logprobs, batch.ref_logprobs, batch.rewards)
    )
    exact = [t.double() for t in (logprobs, ref_logprobs, rewards)]
    gradients = []
    for inputs in ((logprobs, ref_logprobs, rewards), exact):
        leaf = inputs[0].clone().requires_grad_()
        loss = agro_loss(leaf, *inputs[1:], batch.groups, batch.cu_seqlens, beta=BETA)
        loss.backward()
        gradients.append((loss.detach(), leaf.grad))
    (loss, gradient), (exact_loss, exact_gradient) = gradients
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(loss, exact_loss.float())
    assert torch.equal(gradient, exact_gradient.to(dtype))
    _, *sums, groups = batch.sums
    sums = [t.to(dtype) for t in sums]
    ours = agro_coefficients(rewards, *sums, groups, beta=BETA).coefficients
    in_double = agro_coefficients(
        rewards.double(), *(t.double() for t in sums), groups, beta=BETA
    ).coefficients
    assert (ours.dtype, in_double.dtype) == (torch.float32, torch.float64)
    assert torch.equal(ours, in_double.float())


def test_log_ratio_of_long_sequences_keeps_its_digits() -> None:
    """Two sums of thousands of nats whose difference is a thousandth of one."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = 4096
    logprobs = -torch.rand(2 * num_tokens, generator=generator)
    ref_logprobs = logprobs + 1e-6 * torch.randn(2 * num_tokens, generator=generator)
    cu_seqlens = torch.tensor([0, num_tokens, 2 * num_tokens])
    zeros, groups = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    leaf = logprobs.clone().requires_grad_()
    agro_loss(leaf, ref_logprobs, zeros, groups, cu_seqlens, beta=1.0).backward()
    first, second = (logprobs.double() - ref_logprobs.double()).view(2, -1).sum(1)
    # n = 2: c_1 = -beta (R_1 - R_2) / 2 = (l_1 - l_2) / 2.
    assert leaf.grad[0] == ((first - second) / 2).float()


def test_ignored_tokens_add_nothing() -> None:
    batch = Batch()
    plain = agro_loss(*batch.tokens, beta=BETA)
    at = int(batch.cu_seqlens[4])  # one ignored token in front of sequence 4
    padded = [torch.cat([t[:at], t.new_zeros(1), t[at:]]) for t in batch.tokens[:2]]
    later = torch.arange(len(batch.cu_seqlens)) > 4
    assert torch.equal(
        agro_loss(*padded, batch.rewards, batch.groups, batch.cu_seqlens + later, beta=BETA), plain
    )


def test_empty_batches_give_zero() -> None:
    empty = torch.zeros(0)
    ids = torch.zeros(0, dtype=torch.int64)
    result = agro_coefficients(empty, empty, empty, ids, beta=BETA, lr_weight=1.0, lr_cap=True)
    assert result.coefficients.shape == (0,)
    assert not any(result.stats._replace(taper_weight=torch.zeros(())))
    assert result.stats.taper_weight == 1
    leaf = torch.zeros(0, requires_grad=True)
    loss = agro_loss(leaf, empty, empty, ids, torch.zeros(1, dtype=torch.int32), beta=BETA)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert leaf.grad.shape == (0,)


def test_all_rows_invalid_gives_zero_and_stays_connected() -> None:
    leaf = torch.full((4,), math.nan, requires_grad=True)
    groups = torch.zeros(2, dtype=torch.int64)
    loss = agro_loss(leaf, torch.zeros(4), torch.zeros(2), groups, torch.tensor([0, 2, 4]), beta=1)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert leaf.grad.tolist() == [0.0] * 4


def linear_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(sum(LENGTHS), 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 11, (sum(LENGTHS),), generator=generator)
    targets[::5] = -1
    ref_logprobs = -torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)
    return hidden, weight, targets, ref_logprobs.where(targets != -1, 0.0)


def test_linear_agro_loss_matches_reference() -> None:
    batch = Batch()
    hidden, weight, targets, ref_logprobs = linear_inputs()
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64)
    kept = torch.randint(-1, 11, (sum(LENGTHS), 5), generator=torch.Generator().manual_seed(4))
    kept[:, 0] = targets
    head = {"temperature": 0.7, "softcap": 3.0, "ignore_index": -1}
    head |= {"round_logits": "fp16", "kept_ids": kept}
    rows = (batch.rewards, batch.groups, batch.cu_seqlens)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    ours = linear_agro_loss(
        *leaves[:2], targets, ref_logprobs, *rows, bias=leaves[2], **head, **batch.options("mixed")
    )
    logprobs = reference.linear_logprobs(*leaves[:2], targets, bias=leaves[2], **head)
    exact = reference.agro_loss(logprobs, ref_logprobs, *rows, **batch.options("mixed"))
    assert_close(ours, exact)
    for gradient, expected in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
        assert not gradient.isnan().any()


def test_linear_agro_loss_and_its_module_taper_as_agro_loss_does() -> None:
    batch = Batch()
    hidden, weight, targets, ref_logprobs = linear_inputs()
    rows = (ref_logprobs, batch.rewards, batch.groups, batch.cu_seqlens)
    leaf = hidden.requires_grad_()
    logprobs = reference.linear_logprobs(leaf, weight, targets, ignore_index=-1)
    own = torch.stack([part.sum() for part in logprobs.detach().split(LENGTHS)])
    sampled = own + torch.linspace(-2, 2, len(LENGTHS), dtype=torch.float64)
    options: dict = {"beta": BETA, "ignore_index": -1}
    tapered = {"taper": 0.5, "sampling_logprobs": sampled}
    module = LinearAgroLoss(**options, taper=0.5)
    losses = [
        agro_loss(logprobs, *rows, beta=BETA, **tapered),
        linear_agro_loss(leaf, weight, targets, *rows, **options, **tapered),
        module(leaf, weight, targets, *rows, sampling_logprobs=sampled),
        module(leaf, weight, targets, *rows),
    ]
    exact, linear, of_module, untapered = (torch.autograd.grad(loss, leaf)[0] for loss in losses)
    torch.testing.assert_close(linear, exact, rtol=1e-10, atol=1e-12)
    assert torch.equal(of_module, linear)
    assert float((untapered - exact).abs().max()) > 1e-2


@options
def test_ops_pass_opcheck(name: str) -> None:
    batch = Batch()
    op_options = batch.op_options(name)
    torch.library.opcheck(torch.ops.agro.agro_coefficients, (*batch.sums, *op_options))
    tokens = (batch.logprobs.float().requires_grad_(), *batch.tokens[1:])
    torch.library.opcheck(torch.ops.agro.agro_loss_fwd, (*tokens, *op_options))
    coefficients = torch.randn(len(LENGTHS), dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.agro.agro_loss_bwd,
        (torch.tensor(2.0), coefficients, batch.cu_seqlens, sum(LENGTHS), torch.bfloat16),
    )


def test_fullgraph_compile_gives_the_same() -> None:
    batch = Batch()
    logprobs = batch.logprobs.clone().requires_grad_()

    def step(logprobs: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        loss = agro_loss(logprobs, *batch.tokens[1:], beta=beta, lr_weight=1.0, num_groups=2)
        stats = agro_coefficients(*batch.sums, beta=beta, lr_weight=1.0)
        return 2 * loss, stats.coefficients, stats.stats.kl_to_optimum

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for beta in (0.3, 0.7):
        results = []
        for function in (step, compiled):
            loss, *rest = function(logprobs, beta)
            results.append((loss.detach(), *rest, *torch.autograd.grad(loss, logprobs)))
        for ours, exact in zip(*results, strict=True):
            assert torch.equal(ours, exact)


def test_backward_twice_gives_the_same() -> None:
    batch = Batch()
    logprobs = batch.logprobs.clone().requires_grad_()
    loss = agro_loss(logprobs, *batch.tokens[1:], beta=BETA)
    first, second = (torch.autograd.grad(loss, logprobs, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_gradients_flow_to_logprobs_only() -> None:
    batch = Batch()
    rewards, ref_logprobs = batch.rewards.requires_grad_(), batch.ref_logprobs.requires_grad_()
    loss = agro_loss(
        batch.logprobs, ref_logprobs, rewards, batch.groups, batch.cu_seqlens, beta=BETA
    )
    assert not loss.requires_grad
    result = agro_coefficients(*batch.sums, beta=BETA)
    assert not result.coefficients.requires_grad


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "beta: expected a finite number > 0, got 0.0"),
        ({"beta": math.nan}, ValueError, "beta: expected a finite number > 0, got nan"),
        ({"beta": None}, TypeError, "beta: expected a finite number > 0, got NoneType; without"),
        ({"beta": "0.1"}, TypeError, "beta: expected a finite number > 0, got str"),
        (
            {"beta": 1e-300},
            ValueError,
            "beta: .* from 1e-30 to 1e.30, .* got 1e-300",
        ),
        ({"beta": 10**400}, ValueError, "beta: expected a finite number > 0, got 1000"),
        ({"scale": None}, TypeError, "scale: expected a finite number > 0, got NoneType"),
        (
            {"scale": 1e300},
            ValueError,
            "scale: .* from 1e-30 to 1e.30, .* got 1e.300",
        ),
        ({"lr_weight": None}, TypeError, "lr_weight: expected a finite number >= 0, got NoneType"),
        ({"lr_baseline": None}, TypeError, 'lr_baseline: expected "auto" or .* got NoneType'),
        ({"lr_cap": "yes"}, TypeError, "lr_cap: expected a bool, got str; pass True or False"),
        ({"taper": "1"}, TypeError, "taper: expected a number >= 0, got str; 0 tapers nothing"),
        ({"num_groups": math.nan}, ValueError, "num_groups: expected a finite number, got nan"),
        (
            {"num_groups": torch.tensor(math.inf)},
            ValueError,
            "num_groups: .* finite .* got inf",
        ),
        (
            {"num_groups": "2"},
            TypeError,
            "num_groups: expected an int, a 0-d .* got str",
        ),
        ({"scale": -1.0}, ValueError, "scale: expected a finite number > 0, got -1.0"),
        ({"lr_weight": -1.0}, ValueError, "lr_weight: expected a finite number >= 0, got -1.0"),
        ({"lr_baseline": 2.0}, ValueError, r"lr_baseline: .*\[0, 1\], got 2.0"),
        ({"lr_baseline": "L2"}, ValueError, "lr_baseline: .*got 'L2'"),
        ({"on_policy": torch.ones(18)}, TypeError, "on_policy: expected bool, got torch.float32"),
        (
            {"on_policy": torch.ones(3, dtype=torch.bool)},
            ValueError,
            r"on_policy: expected shape \(B,\) = \(18,\), got \(3,\)",
        ),
        (
            {"importance_weights": torch.ones(18), "lr_weight": 0.5},
            ValueError,
            "importance_weights: expected None with lr_weight > 0",
        ),
        (
            {"importance_weights": torch.ones(18, dtype=torch.int64)},
            TypeError,
            "importance_weights: expected a float dtype, got torch.int64",
        ),
        ({"taper": -0.5}, ValueError, "taper: expected a number >= 0, got -0.5; 0 tapers nothing"),
        ({"taper": math.nan}, ValueError, "taper: expected a number >= 0, got nan"),
        ({"taper": torch.ones(3)}, ValueError, r"taper: .*\(B,\) = \(18,\), got \(3,\)"),
        ({"taper": torch.ones(18).long()}, TypeError, "taper: expected a float dtype, got .*int64"),
        (
            {"taper": torch.ones(18, device="meta")},
            ValueError,
            "taper: expected device cpu as rewards, got meta",
        ),
        (
            {"sampling_logprobs": torch.ones(41)},
            ValueError,
            r"sampling_logprobs: expected shape \(B,\) = \(18,\), got \(41,\); rewards has B = 18",
        ),
        (
            {"sampling_logprobs": torch.ones(18).int()},
            TypeError,
            "sampling_logprobs: expected a float dtype, got torch.int32",
        ),
        (
            {"sampling_logprobs": torch.ones(18, device="meta")},
            ValueError,
            "sampling_logprobs: expected device cpu as rewards, got meta",
        ),
        (
            {"sampling_logprobs": [0.0] * 18},
            TypeError,
            "sampling_logprobs: expected a torch.Tensor, got list",
        ),
        ({"num_groups": torch.ones(2)}, ValueError, r"num_groups: .*got shape \(2,\)"),
        ({"groups": torch.zeros(18)}, TypeError, "groups: expected an integer dtype"),
        ({"groups": torch.zeros(17).long()}, ValueError, r"groups: .*\(18,\), got \(17,\)"),
        ({"rewards": torch.zeros(6, 3)}, ValueError, r"rewards: .*\(B,\), got \(6, 3\)"),
        ({"rewards": torch.zeros(18).long()}, TypeError, "rewards: expected a float dtype"),
        ({"rewards": [0.0] * 18}, TypeError, "rewards: expected a torch.Tensor, got list"),
        ({"logprobs": torch.zeros(18, 2)}, ValueError, r"logprobs: .*\(N,\)"),
        ({"ref_logprobs": torch.zeros(5)}, ValueError, r"ref_logprobs: expected shape .*\(5,\)"),
        ({"cu_seqlens": torch.arange(18)}, ValueError, r"cu_seqlens: .*\(19,\), got \(18,\)"),
        ({"cu_seqlens": torch.arange(19.0)}, TypeError, "cu_seqlens: expected int32 or int64"),
        ({"cu_seqlens": torch.arange(19)}, ValueError, "cu_seqlens: .*N = 41, got 0 to 18"),
        (
            {"cu_seqlens": torch.tensor([0, 41] + [3] * 16 + [41])},
            ValueError,
            "got 0 to 41, falling in between",
        ),
    ],
)
def test_wrong_arguments_are_named(changed: dict, error: type[Exception], message: str) -> None:
    batch = Batch()
    names = ("logprobs", "ref_logprobs", "rewards", "groups", "cu_seqlens")
    arguments = {**dict(zip(names, batch.tokens, strict=True)), "beta": BETA, **changed}
    with pytest.raises(error, match=message):
        agro_loss(**arguments)


@pytest.mark.parametrize(
    "of", [np.float32, np.float64, torch.tensor], ids=["float32", "float64", "tensor"]
)
def test_numbers_of_numpy_and_torch_are_numbers(of: Callable[[float], Any]) -> None:
    arguments = Batch().sums
    numbers = {"beta": 0.25, "lr_weight": 0.5, "lr_baseline": 0.75, "scale": 2.0, "num_groups": 4.0}
    expected = agro_coefficients(*arguments, **numbers, lr_cap=True).coefficients  # type: ignore[arg-type]
    options: Any = {name: of(number) for name, number in numbers.items()}
    assert torch.equal(
        agro_coefficients(*arguments, **options, lr_cap=np.True_).coefficients,  # type: ignore[arg-type]
        expected,
    )


def test_keywords_are_those_of_agro_coefficients() -> None:
    """Its signature is the written one: names and defaults are the record's."""
    rewards = torch.zeros(3)
    written = {
        name: parameter.default
        for name, parameter in inspect.signature(agro_coefficients).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert list(written) == list(AgroKeywords.__annotations__)
    assert AgroOptions.of(rewards, **{**written, "beta": 1.0}) == AgroOptions.of(rewards, beta=1.0)
    assert AgroKeywords.__required_keys__ == {"beta"}
    fields = [argument.split()[1].removesuffix("=None") for argument in AGRO_SCHEMA.split(", ")]
    assert fields == list(AgroOptions._fields)


@pytest.mark.parametrize("options", [{"beta": BETA, "tapper": 1.0}, {"taper": 1.0}])
def test_unknown_and_missing_keywords_are_refused_by_every_function(options: dict) -> None:
    batch = Batch()
    hidden, weight, targets, ref_logprobs = linear_inputs()
    rows = (batch.rewards, batch.groups, batch.cu_seqlens)
    wrong = "an unexpected keyword argument 'tapper'" if "tapper" in options else "'beta'"
    for name, call in {
        "agro_coefficients": lambda: agro_coefficients(*batch.sums, **options),
        "agro_loss": lambda: agro_loss(*batch.tokens, **options),
        "linear_agro_loss": lambda: linear_agro_loss(
            hidden, weight, targets, ref_logprobs, *rows, **options
        ),
        "LinearAgroLoss": lambda: LinearAgroLoss(**options),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}\(\) .*{wrong}$"):
            call()
