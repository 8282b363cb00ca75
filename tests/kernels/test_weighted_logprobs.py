"""weighted_logprob_sum: the value and gradients of the differentiable way, in fewer products."""

from typing import Any

import pytest
import torch
from torch import Tensor

from agro_kernels import (
    linear_logprobs,
    linear_logprobs_with_stats,
    reference,
    weighted_logprob_sum,
)
from tests.kernels.recorder import Recorder
from tests.kernels.shapes import DTYPES, SHAPES
from tests.numerics import HeadInputs, assert_close_to_truth, head_inputs, plain_linear_logprobs

NAMES = ("total", "dhidden", "dweight", "dbias")
pytestmark = pytest.mark.usefixtures("small_tiles")


def our_results(
    inputs: HeadInputs, dtype: torch.dtype, with_lse: bool, **options: Any
) -> list[Tensor]:
    """total and the gradients of 3 * total."""
    copy = inputs.in_dtype(dtype)
    tensors = copy.hidden, copy.weight, copy.targets
    lse = None
    if with_lse:
        with torch.no_grad():
            lse = linear_logprobs_with_stats(*tensors, bias=copy.bias, **options).lse
    total = weighted_logprob_sum(*tensors, copy.coefficients, lse=lse, bias=copy.bias, **options)
    return with_gradients(total, copy)


def plain_results(inputs: HeadInputs, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """The same by plain torch; in float64, the truth."""
    copy = inputs.in_dtype(dtype)
    logprobs, _, _ = plain_linear_logprobs(
        copy.hidden, copy.weight, copy.targets, bias=copy.bias, **options
    )
    return with_gradients(logprobs @ copy.coefficients.to(logprobs.dtype), copy)


def with_gradients(total: Tensor, inputs: HeadInputs) -> list[Tensor]:
    (3.0 * total).backward()
    return [total.detach(), *(leaf.grad for leaf in inputs.leaves)]


def assert_matches_truth(
    draws: list[HeadInputs], dtype: torch.dtype, with_lse: bool, **options: Any
) -> None:
    """The law over the gradients of all draws together: of two numbers a maximum is luck."""
    results: list[list[Tensor]] = [[], [], []]
    for inputs in draws:
        ours = our_results(inputs, dtype, with_lse, **options)
        assert_total_is_the_sum_of_logprobs(inputs, ours[0], **options)
        truth = plain_results(inputs, torch.float64, **options)
        plain = plain_results(inputs, dtype, **options)
        for kind, found in zip(results, (ours, truth, plain), strict=True):
            kind.append(torch.cat([gradient.flatten() for gradient in found[1:]]))
        assert {gradient.dtype for gradient in ours[1:]} == {dtype}
    sizes = [t.numel() for t in (inputs.hidden, inputs.weight, inputs.bias) if t is not None]
    split = [torch.stack(kind).split(sizes, dim=1) for kind in results]
    for name, ours, truth, plain in zip(NAMES[1:], *split, strict=False):
        assert_close_to_truth(ours, truth, plain, name)


def assert_total_is_the_sum_of_logprobs(inputs: HeadInputs, total: Tensor, **options: Any) -> None:
    """The law for a sum: as close to the truth as its terms allow together."""
    doubles = [
        None if t is None else t.double() for t in (inputs.hidden, inputs.weight, inputs.bias)
    ]
    truth = plain_linear_logprobs(*doubles[:2], inputs.targets, bias=doubles[2], **options)
    fp32 = [None if t is None else t.float() for t in (inputs.hidden, inputs.weight, inputs.bias)]
    plain = plain_linear_logprobs(*fp32[:2], inputs.targets, bias=fp32[2], **options)
    c = inputs.coefficients
    # In the 3-product form logprob = z_y - lse, each of them rounded by itself.
    terms = (c.double() * truth[0]).abs().sum() + (c.double() * truth[1]).abs().sum()
    plain_error = (c.double() * (plain[0] - truth[0])).abs().sum()
    pair = torch.stack([(c.double() @ truth[0]), terms])
    assert_close_to_truth(
        torch.stack([total.double(), terms]).float(), pair, pair + plain_error, "total"
    )


@pytest.mark.parametrize("with_lse", [False, True], ids=["4-products", "3-products"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-D{}-V{}".format(*s))
def test_matches_truth(shape: tuple[int, int, int], dtype: torch.dtype, with_lse: bool) -> None:
    seeds = range(16 if shape == (2, 1, 3) else 1)
    draws = [head_inputs(*shape, dtype=dtype, seed=seed) for seed in seeds]
    assert_matches_truth(draws, dtype, with_lse)


@pytest.mark.parametrize("with_lse", [False, True], ids=["4-products", "3-products"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["nocap", "softcap"])
@pytest.mark.parametrize("temperature", ["scalar", "per-token"])
def test_options_match_truth(
    dtype: torch.dtype, softcap: float | None, temperature: str, with_lse: bool
) -> None:
    inputs = head_inputs(37, 53, 301, dtype=dtype, bias=True, ignored=True)
    value = 0.6 if temperature == "scalar" else torch.linspace(0.5, 2.0, 37)
    assert_matches_truth([inputs], dtype, with_lse, softcap=softcap, temperature=value)


def test_reference_gradients_match_finite_differences() -> None:
    inputs = head_inputs(5, 3, 7, dtype=torch.float64, bias=True)
    coefficients = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.weighted_logprob_sum(
            hidden, weight, inputs.targets, coefficients, bias=bias, softcap=3.0
        )

    assert torch.autograd.gradcheck(total, leaves)


@pytest.mark.parametrize("with_lse", [False, True], ids=["4-products", "3-products"])
def test_zero_coefficients_and_ignored_rows_give_exact_zeros(with_lse: bool) -> None:
    inputs = head_inputs(20, 16, 150, ignored=True)
    coefficients = inputs.coefficients.clone()
    coefficients[1::4] = 0.0
    left_out = (coefficients == 0.0) | (inputs.targets == -100)
    hidden = inputs.hidden.masked_fill(left_out[:, None], float("nan")).requires_grad_()
    weight = inputs.weight.clone().requires_grad_()
    lse = None
    if with_lse:
        lse = linear_logprobs_with_stats(hidden.detach(), weight.detach(), inputs.targets).lse
        assert lse.isnan().any()
    total = weighted_logprob_sum(hidden, weight, inputs.targets, coefficients, lse=lse)
    total.backward()
    assert total.isfinite()
    assert weight.grad.isfinite().all()
    zeros = torch.zeros_like(hidden.grad[left_out])
    assert torch.equal(hidden.grad[left_out], zeros)
    assert (hidden.grad[~left_out] != 0.0).any(1).all()


@pytest.mark.parametrize("with_lse", [False, True], ids=["4-products", "3-products"])
def test_banned_tokens_give_no_nan(with_lse: bool) -> None:
    inputs = head_inputs(20, 16, 200, bias=True)
    bias = inputs.bias.clone()
    bias[:70] = -torch.inf
    targets = inputs.targets % 130 + 70
    banned = HeadInputs(inputs.hidden, inputs.weight, targets, bias, inputs.coefficients)
    ours = our_results(banned, torch.float32, with_lse)
    kept = HeadInputs(
        inputs.hidden, inputs.weight[70:], targets - 70, bias[70:], inputs.coefficients
    )
    truth = plain_results(kept, torch.float64)
    plain = plain_results(kept, torch.float32)
    assert_close_to_truth(ours[1], truth[1], plain[1], "dhidden")
    assert_close_to_truth(ours[2][70:], truth[2], plain[2], "dweight")
    assert_close_to_truth(ours[3][70:], truth[3], plain[3], "dbias")
    assert torch.equal(ours[2][:70], torch.zeros(70, 16))
    assert torch.equal(ours[3][:70], torch.zeros(70))


@pytest.mark.parametrize("empty", ["no-tokens", "all-ignored", "all-zero"])
def test_no_counted_tokens_give_connected_zero_gradients(empty: str) -> None:
    n = 0 if empty == "no-tokens" else 3
    hidden = torch.full((n, 8), float("nan"), requires_grad=True)
    weight = torch.randn(70, 8, requires_grad=True)
    targets = torch.full((n,), -100 if empty == "all-ignored" else 1)
    coefficients = torch.full((n,), 0.0 if empty == "all-zero" else 1.0)
    total = weighted_logprob_sum(hidden, weight, targets, coefficients)
    total.backward()
    assert total == 0.0
    assert torch.equal(hidden.grad, torch.zeros(n, 8))
    assert torch.equal(weight.grad, torch.zeros(70, 8))


@pytest.mark.parametrize(
    ("frozen", "with_lse", "products"),
    [
        ("", False, 4),
        ("", True, 3),
        ("hidden", True, 2),
        ("weight", True, 2),
        ("weight", False, 3),
        ("hidden weight", True, 0),
        ("hidden weight", False, 1),
    ],
)
def test_number_of_products(frozen: str, with_lse: bool, products: int) -> None:
    inputs = head_inputs(16, 8, 64)  # one tile
    hidden = inputs.hidden.requires_grad_("hidden" not in frozen)
    weight = inputs.weight.requires_grad_("weight" not in frozen)
    with torch.no_grad():
        lse = linear_logprobs_with_stats(hidden, weight, inputs.targets).lse
    with Recorder() as recorder:
        total = weighted_logprob_sum(
            hidden, weight, inputs.targets, inputs.coefficients, lse=lse if with_lse else None
        )
        if total.requires_grad:
            total.backward()
    assert recorder.products == products
    assert (hidden.grad is None) == ("hidden" in frozen)
    assert (weight.grad is None) == ("weight" in frozen)


def test_without_grad_mode_no_gradient_is_computed() -> None:
    inputs = head_inputs(16, 8, 64)
    inputs.weight.requires_grad_()
    with torch.no_grad(), Recorder() as recorder:
        total = weighted_logprob_sum(
            inputs.hidden, inputs.weight, inputs.targets, inputs.coefficients
        )
    assert recorder.products == 1
    assert not total.requires_grad


def test_nothing_of_the_size_of_weight_waits_for_the_backward_pass() -> None:
    inputs = head_inputs(16, 8, 64)
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    lse = linear_logprobs_with_stats(hidden, weight, inputs.targets).lse.detach()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        weighted_logprob_sum(hidden, weight, inputs.targets, inputs.coefficients, lse=lse)
    large = [t for t in saved if t.numel() >= weight.numel()]
    assert large and all(t.data_ptr() == weight.data_ptr() for t in large)


@pytest.mark.parametrize("with_lse", [False, True], ids=["4-products", "3-products"])
def test_a_target_outside_the_kept_set_makes_the_sum_infinite(with_lse: bool) -> None:
    inputs = head_inputs(16, 8, 64)
    tensors = inputs.hidden, inputs.weight, inputs.targets
    kept = (inputs.targets[:, None] + torch.arange(1, 6)) % 64
    kept[1:] = -1  # all but the first row keep everything
    lse = linear_logprobs_with_stats(*tensors, kept_ids=kept).lse if with_lse else None
    total = weighted_logprob_sum(*tensors, inputs.coefficients.abs(), lse=lse, kept_ids=kept)
    assert total == -torch.inf
    inputs.coefficients[0] = 0.0
    assert weighted_logprob_sum(*tensors, inputs.coefficients, lse=lse, kept_ids=kept).isfinite()


def test_backward_twice_gives_the_same() -> None:
    inputs = head_inputs(20, 16, 150, bias=True)
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]
    total = weighted_logprob_sum(*leaves[:2], inputs.targets, inputs.coefficients, bias=leaves[2])
    first = torch.autograd.grad(total, leaves, torch.tensor(2.0), retain_graph=True)
    second = torch.autograd.grad(total, leaves, torch.tensor(2.0), retain_graph=True)
    single = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, 2 * b) for a, b in zip(first, single, strict=True))


def test_repeat_is_bitwise_equal() -> None:
    inputs = head_inputs(37, 53, 301, bias=True, ignored=True)
    first = our_results(inputs, torch.float32, with_lse=True)
    second = our_results(inputs, torch.float32, with_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_leading_axes_and_strides() -> None:
    inputs = head_inputs(24, 8, 70)
    lse = linear_logprobs_with_stats(inputs.hidden, inputs.weight, inputs.targets).lse
    flat = weighted_logprob_sum(
        inputs.hidden, inputs.weight, inputs.targets, inputs.coefficients, lse=lse
    )
    shaped = weighted_logprob_sum(
        inputs.hidden.view(4, 6, 8),
        inputs.weight.T.contiguous().T,
        inputs.targets.int().view(4, 6),
        inputs.coefficients.double().view(4, 6),
        lse=lse.view(4, 6),
    )
    assert shaped.shape == ()
    torch.testing.assert_close(shaped, flat)


def test_autocast_casts_like_linear() -> None:
    inputs = head_inputs(20, 16, 150)
    leaves = [inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()]
    halves = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = weighted_logprob_sum(*leaves, inputs.targets, inputs.coefficients)
    expected = weighted_logprob_sum(*halves, inputs.targets, inputs.coefficients)
    ours.backward()
    expected.backward()
    assert torch.equal(ours, expected)
    assert all(torch.equal(a.grad, b.grad.float()) for a, b in zip(leaves, halves, strict=True))


def test_compiles_fullgraph_with_backward() -> None:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
        return 2.0 * weighted_logprob_sum(hidden * 2.0, weight, targets, coefficients)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (20, 7):
        inputs = head_inputs(n, 16, 150)
        leaves = [inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()]
        expected = loss(*leaves, inputs.targets, inputs.coefficients)
        ours = compiled(*leaves, inputs.targets, inputs.coefficients)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves)
        )


@pytest.mark.parametrize("name", ["coefficients", "lse"])
def test_constants_are_checked(name: str) -> None:
    inputs = head_inputs(5, 8, 70)

    def call(value: object) -> Tensor:
        arguments = {"coefficients": inputs.coefficients, "lse": torch.zeros(5)} | {name: value}
        return weighted_logprob_sum(inputs.hidden, inputs.weight, inputs.targets, **arguments)

    with pytest.raises(ValueError, match=rf"{name}: expected the shape of targets \(5,\), got"):
        call(torch.zeros(4))
    with pytest.raises(TypeError, match=rf"{name}: expected a floating-point tensor, got torch"):
        call(torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=rf"{name}: expected a constant, .* {name}.detach\(\)"):
        call(torch.zeros(5, requires_grad=True))
    with pytest.raises(TypeError, match=rf"{name}: expected a torch.Tensor, got float"):
        call(1.0)


def test_agrees_with_linear_logprobs_bit_for_bit() -> None:
    inputs = head_inputs(20, 16, 150)
    leaves = [inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()]
    total = weighted_logprob_sum(*leaves, inputs.targets, inputs.coefficients)
    logprobs = linear_logprobs(*leaves, inputs.targets)
    sums = (logprobs * inputs.coefficients).sum()
    assert torch.equal(total, sums)
    gradients = torch.autograd.grad(total, leaves)
    expected = torch.autograd.grad(sums, leaves)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
