"""linear_cross_entropy: F.cross_entropy's values and gradients, by every backend, under the law."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agro_kernels import linear_cross_entropy, linear_logprobs
from tests.kernels.shapes import DTYPES
from tests.kernels.test_many_targets import backend  # noqa: F401  (a fixture)
from tests.numerics import HeadInputs, assert_close_to_truth, head_inputs, plain_logits

N, D, V = 21, 40, 203
pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def ours(inputs: HeadInputs, **options: Any) -> Tensor:
    arguments = inputs.hidden, inputs.weight, inputs.targets
    return linear_cross_entropy(*arguments, bias=inputs.bias, **options)


def plain(inputs: HeadInputs, *, reduction: str, label_smoothing: float, **options: Any) -> Tensor:
    options.pop("keep_logits_bytes", None)
    hidden = inputs.hidden.masked_fill((inputs.targets == -100)[:, None], 0.0)
    logits = plain_logits(hidden, inputs.weight, inputs.bias, **options)
    return F.cross_entropy(
        logits, inputs.targets, reduction=reduction, label_smoothing=label_smoothing
    )


def results(function: Any, dtype: torch.dtype, of: torch.dtype, **options: Any) -> list[Tensor]:
    inputs = head_inputs(N, D, V, dtype=of, bias=True, ignored=True).in_dtype(dtype)
    loss = function(inputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum() * 3.0, inputs.leaves)]


def assert_matches(dtype: torch.dtype, **options: Any) -> None:
    for name, found, truth, other in zip(
        ("loss", "dhidden", "dweight", "dbias"),
        results(ours, dtype, dtype, **options),
        results(plain, torch.float64, dtype, **options),
        results(plain, dtype, dtype, **options),
        strict=True,
    ):
        assert_close_to_truth(found, truth, other, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["mean", "capped"])
def test_smoothed_is_torchs(backend: str, dtype: torch.dtype, options: str) -> None:  # noqa: F811
    if options == "mean":
        assert_matches(dtype, label_smoothing=0.3, reduction="mean")
    else:
        temperature = torch.linspace(0.5, 2.0, N)
        options_of = {"softcap": 5.0, "temperature": temperature, "reduction": "sum"}
        assert_matches(dtype, label_smoothing=0.1, **options_of)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_reductions_are_torchs(reduction: str, label_smoothing: float) -> None:
    assert_matches(torch.float32, label_smoothing=label_smoothing, reduction=reduction)


def test_logits_kept_for_the_backward_pass() -> None:
    assert_matches(torch.bfloat16, label_smoothing=0.2, reduction="mean", keep_logits_bytes=10**6)


def test_gradients_match_finite_differences() -> None:
    inputs = head_inputs(9, 3, 70, dtype=torch.float64, bias=True)

    def of_leaves(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        made = HeadInputs(hidden, weight, inputs.targets, bias, inputs.coefficients)
        return ours(made, label_smoothing=0.2, softcap=5.0, temperature=0.7, reduction="none")

    leaves = [leaf.requires_grad_() for leaf in inputs.leaves]
    assert torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True)


def test_no_targets_and_none_smoothed() -> None:
    inputs = head_inputs(4, 8, 30)
    targets = torch.full((4,), -100)
    hidden = inputs.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, inputs.weight, targets, label_smoothing=0.1)
    assert loss == 0.0
    loss.backward()
    assert hidden.grad is not None and (hidden.grad == 0).all()
    unsmoothed = linear_cross_entropy(hidden, inputs.weight, inputs.targets, reduction="none")
    assert torch.equal(unsmoothed, -linear_logprobs(hidden, inputs.weight, inputs.targets))


def test_a_compiled_program_is_the_eager_one() -> None:
    torch._dynamo.reset()
    inputs = head_inputs(N, D, V, bias=True).in_dtype(torch.float32)

    def program() -> Tensor:
        return ours(inputs, label_smoothing=0.1, temperature=0.7)

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(), inputs.leaves),
        torch.autograd.grad(program(), inputs.leaves),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing: expected a number from 0 to below 1, got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected a number from 0 .* got -0.1"),
        ({"label_smoothing": "a"}, "label_smoothing: expected a number from 0 .* got 'a'"),
        ({"reduction": "max"}, 'reduction: expected "mean", "sum" or "none", got .max.'),
        (
            {"label_smoothing": 0.1, "weight_grad": torch.zeros(30, 8)},
            "weight_grad: expected None with label_smoothing",
        ),
        (
            {"label_smoothing": 0.1, "kept_ids": torch.zeros(4, 2).long()},
            "kept_ids: expected None with label_smoothing",
        ),
    ],
)
def test_rejects(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(
            torch.randn(4, 8), torch.randn(30, 8), torch.zeros(4).long(), **options
        )
