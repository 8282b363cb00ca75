"""linear_logprobs and its siblings: the reference against finite differences, the ops against it.

The public functions run here by whatever serves the device; the small tiles of `small_tiles` make
small shapes cross several vocabulary blocks and token chunks of the blocked torch path.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from agro_kernels import (
    linear_logprobs,
    linear_logprobs_with_entropy,
    linear_logprobs_with_stats,
    reference,
)
from agro_kernels._cpu import native
from agro_kernels._torch import linear_logprobs as blocked
from agro_kernels.head import Head
from tests.kernels.recorder import Recorder
from tests.kernels.shapes import DTYPES, SHAPES
from tests.numerics import HeadInputs, assert_close_to_truth, head_inputs, plain_linear_logprobs

NAMES = ("logprobs", "lse", "entropy", "dhidden", "dweight", "dbias")
pytestmark = pytest.mark.usefixtures("small_tiles")


def our_results(inputs: HeadInputs, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """logprobs, lse, entropy and the gradients of a scalar that depends on each of the three."""

    def ours(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        stats = linear_logprobs_with_stats(*tensors, **options)
        return stats.logprobs, stats.lse, stats.entropy

    return results_and_gradients(ours, inputs, dtype, **options)


def plain_results(inputs: HeadInputs, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """The same by plain torch; in float64, the truth."""
    return results_and_gradients(plain_linear_logprobs, inputs, dtype, **options)


def reference_results(inputs: HeadInputs, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """The same by reference.py, whose gradients come from lse as one number."""

    def of_reference(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        logprobs, entropy, lse = reference.linear_logprobs_with_stats(*tensors, **options)
        return logprobs, lse, entropy

    return results_and_gradients(of_reference, inputs, dtype, **options)


def results_and_gradients(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: HeadInputs,
    dtype: torch.dtype,
    **options: Any,
) -> list[Tensor]:
    """By a function that returns (logprobs, lse, entropy)."""
    copy = inputs.in_dtype(dtype)
    results = function(copy.hidden, copy.weight, copy.targets, bias=copy.bias, **options)
    logprobs, lse, entropy = results
    c = inputs.coefficients.to(logprobs.dtype)
    (logprobs @ c + entropy @ c.flip(0) + (lse * c.cos()).sum()).backward()
    return [result.detach() for result in (*results, *(leaf.grad for leaf in copy.leaves))]


def assert_matches_truth(inputs: HeadInputs, dtype: torch.dtype, **options: Any) -> None:
    for name, ours, truth, plain in zip(
        NAMES,
        our_results(inputs, dtype, **options),
        plain_results(inputs, torch.float64, **options),
        plain_results(inputs, dtype, **options),
        strict=False,
    ):
        assert ours.dtype == (torch.float32 if name in NAMES[:3] else dtype), name
        assert_close_to_truth(ours, truth, plain, name)


# --- The meaning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
def test_reference_gradients_match_finite_differences(softcap: float | None) -> None:
    inputs = head_inputs(4, 3, 7, dtype=torch.float64, bias=True)
    targets = inputs.targets.clone()
    targets[1] = -100
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)

    def stats(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return reference.linear_logprobs_with_stats(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap
        )

    assert torch.autograd.gradcheck(stats, leaves)


def test_op_gradients_match_finite_differences() -> None:
    inputs = head_inputs(18, 3, 70, dtype=torch.float64, bias=True)
    targets = inputs.targets.clone()
    targets[1] = -100
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]

    def stats(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return linear_logprobs_with_stats(
            hidden, weight, targets, bias=bias, temperature=0.7, softcap=5.0
        )

    assert torch.autograd.gradcheck(stats, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_reference_is_the_plain_program(dtype: torch.dtype) -> None:
    inputs = head_inputs(11, 8, 40, dtype=dtype, ignored=True)
    logprobs, entropy, lse = reference.linear_logprobs_with_stats(
        inputs.hidden, inputs.weight, inputs.targets
    )
    truths = plain_linear_logprobs(inputs.hidden.double(), inputs.weight.double(), inputs.targets)
    plains = plain_linear_logprobs(inputs.hidden, inputs.weight, inputs.targets)
    for ours, truth, plain in zip((logprobs, lse, entropy), truths, plains, strict=True):
        assert_close_to_truth(ours, truth, plain)
    assert torch.equal(
        logprobs, reference.linear_logprobs(inputs.hidden, inputs.weight, inputs.targets)
    )


# --- Closeness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-D{}-V{}".format(*s))
def test_matches_truth(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_matches_truth(head_inputs(*shape, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["nocap", "softcap"])
@pytest.mark.parametrize("temperature", ["scalar", "per-token"])
def test_options_match_truth(dtype: torch.dtype, softcap: float | None, temperature: str) -> None:
    inputs = head_inputs(37, 53, 301, dtype=dtype, bias=True, ignored=True)
    value = 0.6 if temperature == "scalar" else torch.linspace(0.5, 2.0, 37)
    assert_matches_truth(inputs, dtype, softcap=softcap, temperature=value)


def test_tile_sizes_of_the_package_match_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert blocked.VOCAB_BLOCK >= 1024  # the fixture's small blocks are gone
    inputs = head_inputs(9, 16, 2 * blocked.VOCAB_BLOCK + 3)
    assert_matches_truth(inputs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_half_precision_inputs_are_not_rounded(dtype: torch.dtype) -> None:
    inputs = head_inputs(37, 53, 301, dtype=dtype)
    ours = linear_logprobs_with_stats(inputs.hidden, inputs.weight, inputs.targets)
    truth = plain_linear_logprobs(inputs.hidden.double(), inputs.weight.double(), inputs.targets)
    fp32 = plain_linear_logprobs(inputs.hidden.float(), inputs.weight.float(), inputs.targets)
    assert_close_to_truth(ours.logprobs, truth[0], fp32[0], "logprobs")
    assert_close_to_truth(ours.lse, truth[1], fp32[1], "lse")
    assert_close_to_truth(ours.entropy, truth[2], fp32[2], "entropy")


def test_float64_stays_float64() -> None:
    inputs = head_inputs(7, 5, 130, dtype=torch.float64)
    ours = linear_logprobs(inputs.hidden, inputs.weight, inputs.targets)
    truth = reference.linear_logprobs(inputs.hidden, inputs.weight, inputs.targets)
    assert ours.dtype == torch.float64
    assert_close_to_truth(ours, truth, truth)


@pytest.mark.parametrize("offset", [1e4, -1e4, -150.0], ids=["far-up", "far-down", "all-below-100"])
def test_shifted_logits_match_truth(offset: float) -> None:
    inputs = head_inputs(20, 16, 150, bias=True)
    shifted = HeadInputs(
        inputs.hidden, inputs.weight, inputs.targets, inputs.bias + offset, inputs.coefficients
    )
    # The backward pass knows lse as one fp32 number, as in logits.gather(...) - logits.logsumexp().
    plains = [
        *plain_results(shifted, torch.float32)[:3],
        *reference_results(shifted, torch.float32)[3:],
    ]
    for name, ours, truth, plain in zip(
        NAMES,
        our_results(shifted, torch.float32),
        plain_results(shifted, torch.float64),
        plains,
        strict=True,
    ):
        assert_close_to_truth(ours, truth, plain, name)


def test_one_hot_distributions_match_truth() -> None:
    inputs = head_inputs(20, 16, 150)
    peaked = HeadInputs(
        inputs.hidden * 20, inputs.weight, inputs.targets, None, inputs.coefficients
    )
    assert_matches_truth(peaked, torch.float32)


@pytest.mark.parametrize("gap", [2.0, 6.0, 12.0])
def test_gradient_of_a_likely_token_keeps_its_digits(gap: float) -> None:
    inputs = head_inputs(20, 16, 150)
    targets = torch.zeros(20, dtype=torch.long)
    bias = torch.zeros(150)
    bias[0] = gap + (inputs.hidden @ inputs.weight.T).logsumexp(-1).max()
    likely = HeadInputs(inputs.hidden, inputs.weight, targets, bias, inputs.coefficients)
    assert_matches_truth(likely, torch.float32)


# --- Banned and ignored ---------------------------------------------------------------------------


def banned_inputs() -> tuple[HeadInputs, Tensor]:
    """A whole vocabulary block and some more tokens banned by a bias of -inf; no target is."""
    inputs = head_inputs(20, 16, 200, bias=True)
    bias = inputs.bias.clone()
    bias[:70] = -torch.inf
    bias[150::7] = -torch.inf
    allowed = (bias > -torch.inf).nonzero().squeeze(1)
    targets = allowed[inputs.targets % allowed.shape[0]]
    return HeadInputs(inputs.hidden, inputs.weight, targets, bias, inputs.coefficients), allowed


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_banned_tokens_equal_a_vocabulary_without_them(temperature: float) -> None:
    inputs, allowed = banned_inputs()
    kept = HeadInputs(
        inputs.hidden,
        inputs.weight[allowed],
        torch.searchsorted(allowed, inputs.targets),
        inputs.bias[allowed],
        inputs.coefficients,
    )
    banned = inputs.bias == -torch.inf
    for name, ours, truth, plain in zip(
        NAMES,
        our_results(inputs, torch.float32, temperature=temperature),
        plain_results(kept, torch.float64, temperature=temperature),
        plain_results(kept, torch.float32, temperature=temperature),
        strict=True,
    ):
        if name in ("dweight", "dbias"):
            assert torch.equal(ours[banned], torch.zeros_like(ours[banned])), name
            ours = ours[allowed]
        assert_close_to_truth(ours, truth, plain, name)


def test_banned_target_has_logprob_minus_infinity_and_no_nan_elsewhere() -> None:
    inputs, _ = banned_inputs()
    targets = inputs.targets.clone()
    targets[[0, 5]] = 3
    swapped = HeadInputs(inputs.hidden, inputs.weight, targets, inputs.bias, inputs.coefficients)
    ours = our_results(swapped, torch.float32)
    before = our_results(inputs, torch.float32)
    hit = torch.zeros(20, dtype=torch.bool)
    hit[[0, 5]] = True
    assert torch.equal(ours[0] == -torch.inf, hit)
    assert torch.equal(ours[0][~hit], before[0][~hit])
    for result in ours[1:]:
        assert result.isfinite().all()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_ignored_rows_give_exact_zeros_whatever_they_hold(garbage: float) -> None:
    inputs = head_inputs(20, 16, 150, bias=True, ignored=True)
    ignored = inputs.targets == -100
    hidden = inputs.hidden.masked_fill(ignored[:, None], garbage)
    filled = HeadInputs(hidden, inputs.weight, inputs.targets, inputs.bias, inputs.coefficients)
    with_ignored = our_results(filled, torch.float32)
    kept = HeadInputs(
        inputs.hidden[~ignored],
        inputs.weight,
        inputs.targets[~ignored],
        inputs.bias,
        inputs.coefficients[~ignored],
    )
    stats = linear_logprobs_with_stats(kept.hidden, kept.weight, kept.targets, bias=kept.bias)
    for result, alone in zip(
        with_ignored[:3], (stats.logprobs, stats.lse, stats.entropy), strict=True
    ):
        assert torch.equal(result[ignored], torch.zeros_like(result[ignored]))
        assert torch.equal(result[~ignored], alone)
    dhidden = with_ignored[3]
    assert torch.equal(dhidden[ignored], torch.zeros_like(dhidden[ignored]))
    assert all(result.isfinite().all() for result in with_ignored)


@pytest.mark.parametrize("empty", ["no-tokens", "all-ignored"])
def test_no_counted_tokens_give_connected_zero_gradients(empty: str) -> None:
    n = 0 if empty == "no-tokens" else 3
    hidden = torch.full((n, 8), float("nan"), requires_grad=True)
    weight = torch.randn(70, 8, requires_grad=True)
    targets = torch.full((n,), -100)
    stats = linear_logprobs_with_stats(hidden, weight, targets)
    sum(result.sum() for result in stats).backward()
    assert all(torch.equal(result, torch.zeros(n)) for result in stats)
    assert torch.equal(hidden.grad, torch.zeros(n, 8))
    assert torch.equal(weight.grad, torch.zeros(70, 8))


def test_custom_ignore_index() -> None:
    inputs = head_inputs(6, 8, 70)
    targets = inputs.targets.clone()
    targets[2] = 0
    ours = linear_logprobs(inputs.hidden, inputs.weight, targets, ignore_index=0)
    assert ours[2] == 0.0
    assert (ours[targets != 0] != 0.0).all()


# --- Shapes and layouts ---------------------------------------------------------------------------


def test_leading_axes_are_kept() -> None:
    inputs = head_inputs(24, 8, 70)
    flat = linear_logprobs_with_entropy(inputs.hidden, inputs.weight, inputs.targets)
    shaped = linear_logprobs_with_entropy(
        inputs.hidden.view(2, 3, 4, 8),
        inputs.weight,
        inputs.targets.view(2, 3, 4),
        temperature=torch.ones(2, 3, 4),
    )
    for a, b in zip(flat, shaped, strict=True):
        assert b.shape == (2, 3, 4)
        assert torch.equal(a.view(2, 3, 4), b)
    one = linear_logprobs(inputs.hidden[0], inputs.weight, inputs.targets[0])
    assert one.shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noncontiguous_inputs(dtype: torch.dtype) -> None:
    inputs = head_inputs(24, 8, 70, dtype=dtype)
    hidden = inputs.hidden.repeat_interleave(2, dim=0)[::2].T.contiguous().T.requires_grad_()
    weight = inputs.weight.T.contiguous().T.requires_grad_()
    targets = inputs.targets.repeat_interleave(2)[::2]
    assert not (hidden.is_contiguous() or weight.is_contiguous() or targets.is_contiguous())
    logprobs = linear_logprobs(hidden, weight, targets)
    logprobs.backward(torch.ones(1).expand(24))
    leaves = [inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()]
    truth_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    plain = plain_linear_logprobs(*leaves, inputs.targets)[0]
    truth = plain_linear_logprobs(*truth_leaves, inputs.targets)[0]
    plain.sum().backward()
    truth.sum().backward()
    assert_close_to_truth(logprobs, truth.detach(), plain, "logprobs")
    assert_close_to_truth(hidden.grad, truth_leaves[0].grad, leaves[0].grad, "dhidden")
    assert_close_to_truth(weight.grad, truth_leaves[1].grad, leaves[1].grad, "dweight")


def test_int32_targets() -> None:
    inputs = head_inputs(24, 8, 70, ignored=True)
    ours = linear_logprobs(inputs.hidden, inputs.weight, inputs.targets.int())
    assert torch.equal(ours, linear_logprobs(inputs.hidden, inputs.weight, inputs.targets))


@pytest.mark.parametrize("temperature_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_token_temperature_in_other_dtypes(temperature_dtype: torch.dtype) -> None:
    inputs = head_inputs(4, 8, 70)
    temperature = torch.tensor([0.5, 1.0, 2.0, 4.0])  # exact in every dtype
    ours = linear_logprobs(
        inputs.hidden, inputs.weight, inputs.targets, temperature=temperature.to(temperature_dtype)
    )
    expected = linear_logprobs(
        inputs.hidden, inputs.weight, inputs.targets, temperature=temperature
    )
    assert torch.equal(ours, expected)


# --- Autograd -------------------------------------------------------------------------------------


def test_backward_twice_gives_the_same() -> None:
    inputs = head_inputs(20, 16, 150, bias=True)
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]
    saved = [t.detach().clone() for t in leaves]
    stats = linear_logprobs_with_stats(*leaves[:2], inputs.targets, bias=leaves[2])
    loss = (stats.logprobs * inputs.coefficients).sum() + stats.entropy.sum() + stats.lse.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(saved, leaves, strict=True))


def test_repeat_is_bitwise_equal() -> None:
    inputs = head_inputs(37, 53, 301, bias=True, ignored=True)
    first = our_results(inputs, torch.float32, softcap=3.0)
    second = our_results(inputs, torch.float32, softcap=3.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_whole_chunks_do_not_depend_on_the_rest_of_the_batch() -> None:
    inputs = head_inputs(3 * 16, 53, 301)
    whole = linear_logprobs_with_stats(inputs.hidden, inputs.weight, inputs.targets)
    part = linear_logprobs_with_stats(inputs.hidden[16:32], inputs.weight, inputs.targets[16:32])
    assert all(torch.equal(a[16:32], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize(
    ("frozen", "products"),
    [("nothing", 3), ("hidden", 2), ("weight", 2), ("hidden and weight", 1)],
)
def test_frozen_inputs_cost_no_product(frozen: str, products: int) -> None:
    inputs = head_inputs(16, 8, 64, bias=True)  # one tile
    if "hidden" not in frozen:
        inputs.hidden.requires_grad_()
    if "weight" not in frozen:
        inputs.weight.requires_grad_()
    inputs.bias.requires_grad_()
    logprobs = linear_logprobs(inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias)
    with Recorder() as recorder:
        logprobs.sum().backward()
    assert recorder.products == products
    assert (inputs.hidden.grad is None) == ("hidden" in frozen)
    assert (inputs.weight.grad is None) == ("weight" in frozen)
    assert inputs.bias.grad is not None


def test_largest_tensor_is_far_below_the_logits() -> None:
    n, d, v = 64, 4, 1024
    inputs = head_inputs(n, d, v)
    inputs.hidden.requires_grad_()
    inputs.weight.requires_grad_()
    with Recorder() as recorder:
        stats = linear_logprobs_with_stats(inputs.hidden, inputs.weight, inputs.targets)
        (stats.logprobs.sum() + stats.entropy.sum()).backward()
    assert recorder.products > 0
    assert recorder.largest == v * d  # the weight's gradient; the logits would be n * v
    assert n * v == 16 * recorder.largest


def test_second_derivative_is_an_error() -> None:
    inputs = head_inputs(5, 8, 70)
    inputs.hidden.requires_grad_()
    logprobs = linear_logprobs(inputs.hidden, inputs.weight, inputs.targets)
    (dhidden,) = torch.autograd.grad(logprobs.square().sum(), inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dhidden.sum().backward()


# --- Autocast and compile -------------------------------------------------------------------------


def test_autocast_casts_like_linear() -> None:
    inputs = head_inputs(20, 16, 150, bias=True)
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]
    cast = [t.detach().bfloat16().requires_grad_() for t in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_logprobs(leaves[0], leaves[1], inputs.targets, bias=leaves[2])
        ours.sum().backward()
        mixed = linear_logprobs(cast[0], leaves[1], inputs.targets, bias=leaves[2])
    expected = linear_logprobs(cast[0], cast[1], inputs.targets, bias=cast[2])
    expected.sum().backward()
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected)
    assert torch.equal(mixed, expected)
    for leaf, half in zip(leaves, cast, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, half.grad.float())


def test_autocast_leaves_float64_alone() -> None:
    inputs = head_inputs(5, 8, 70, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_logprobs(inputs.hidden, inputs.weight, inputs.targets)
    assert torch.equal(ours, linear_logprobs(inputs.hidden, inputs.weight, inputs.targets))


def test_compiles_fullgraph_with_backward() -> None:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
        stats = linear_logprobs_with_stats(
            hidden * 2.0, weight, targets, temperature=temperature, softcap=9.0
        )
        only = linear_logprobs(hidden * 2.0, weight, targets, temperature=0.5)
        return (stats.logprobs + 0.1 * stats.entropy - stats.lse + only).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (20, 7):
        inputs = head_inputs(n, 16, 150, ignored=True)
        leaves = [inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()]
        temperature = torch.linspace(0.5, 2.0, n)
        expected = loss(*leaves, inputs.targets, temperature)
        expected_gradients = torch.autograd.grad(expected, leaves)
        ours = compiled(*leaves, inputs.targets, temperature)
        gradients = torch.autograd.grad(ours, leaves)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(gradients, expected_gradients)


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 150, 10**9])
def test_rejects_out_of_range_targets(value: int) -> None:
    inputs = head_inputs(5, 8, 150)
    targets = inputs.targets.clone()
    targets[3] = value
    message = rf"targets: expected token ids in \[0, 150\).*got {value} at position 3"
    with pytest.raises(ValueError, match=message):
        linear_logprobs(inputs.hidden, inputs.weight, targets)


def test_out_of_range_targets_are_nan_where_no_check_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Head, "check_values", lambda _: None)  # as on a GPU
    monkeypatch.setattr(native, "load", lambda: None)
    inputs = head_inputs(20, 8, 150)
    expected = linear_logprobs(inputs.hidden, inputs.weight, inputs.targets)
    targets = inputs.targets.clone()
    targets[3], targets[7] = 150, -1
    ours = linear_logprobs(inputs.hidden, inputs.weight, targets)
    wrong = targets != inputs.targets
    assert torch.equal(ours.isnan(), wrong)
    assert torch.equal(ours[~wrong], expected[~wrong])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_rejects_token_temperatures_that_are_no_temperature(value: float) -> None:
    inputs = head_inputs(5, 8, 150)
    temperature = torch.ones(5)
    temperature[2] = value
    with pytest.raises(ValueError, match=r"temperature: expected finite .* got .* at position 2"):
        linear_logprobs(inputs.hidden, inputs.weight, inputs.targets, temperature=temperature)


def test_temperature_of_an_ignored_row_does_not_matter() -> None:
    inputs = head_inputs(8, 8, 150, ignored=True)
    temperature = torch.ones(8)
    temperature[inputs.targets == -100] = float("nan")
    ours = linear_logprobs(inputs.hidden, inputs.weight, inputs.targets, temperature=temperature)
    assert ours.isfinite().all()
