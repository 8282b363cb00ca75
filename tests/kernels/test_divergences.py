"""linear_kl and linear_jsd: against the formulas over full logits, under the tolerance law."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from agro_kernels import linear_jsd, linear_kl, reference
from tests.kernels.shapes import DTYPES
from tests.numerics import HeadInputs, assert_close_to_truth, head_inputs, plain_logits

N, V = 21, 203
KINDS = ("forward", "reverse", "jsd")
pytestmark = pytest.mark.usefixtures("small_tiles")

kinds = pytest.mark.parametrize("kind", KINDS)


def heads(dtype: torch.dtype) -> tuple[HeadInputs, HeadInputs]:
    """A student and a teacher of another hidden size."""
    student = head_inputs(N, 19, V, dtype=dtype, bias=True)
    return student, head_inputs(N, 12, V, dtype=dtype, bias=True, seed=1)


def ours(student: HeadInputs, teacher: HeadInputs, kind: str, **options: Any) -> Tensor:
    function: Callable[..., Tensor] = linear_jsd if kind == "jsd" else linear_kl
    if kind == "reverse":
        options["reverse"] = True
    if kind == "jsd":
        options["beta"] = 0.3
    sides = student.hidden, student.weight, teacher.hidden, teacher.weight
    return function(*sides, bias=student.bias, teacher_bias=teacher.bias, **options)


def plain(student: HeadInputs, teacher: HeadInputs, kind: str, **options: Any) -> Tensor:
    mask = options.pop("mask", None)
    softcap, teacher_softcap = options.pop("softcap", None), options.pop("teacher_softcap", None)
    rows = torch.ones(N, dtype=torch.bool) if mask is None else mask
    hidden = student.hidden.masked_fill(~rows[:, None], 0.0)
    log_p = plain_logits(hidden, student.weight, student.bias, softcap=softcap, **options)
    log_q = plain_logits(
        teacher.hidden, teacher.weight, teacher.bias, softcap=teacher_softcap, **options
    )
    found = reference.divergence(log_p.log_softmax(-1), log_q.log_softmax(-1), kind, 0.3)
    return found.where(rows, 0.0)


def results(
    function: Any, dtype: torch.dtype, of: torch.dtype, kind: str, **options: Any
) -> list[Tensor]:
    """The divergences of inputs of `of`, computed in `dtype`, and the student's gradients."""
    student, teacher = heads(of)
    if "mask" in options:
        student.hidden[~options["mask"]] = torch.nan
    student, teacher = student.in_dtype(dtype), teacher.in_dtype(dtype)
    for leaf in teacher.leaves:
        leaf.requires_grad_(False)
    found = function(student, teacher, kind, **options)
    gradients = torch.autograd.grad(found @ student.coefficients.to(found.dtype), student.leaves)
    return [found.detach(), *gradients]


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["plain", "everything"])
def test_matches_truth(option: str, dtype: torch.dtype, kind: str) -> None:
    options: dict[str, Any] = {}
    if option == "everything":
        options = {
            "softcap": 9.0,
            "teacher_softcap": 5.0,
            "temperature": torch.linspace(0.5, 2.0, N),
            "mask": torch.arange(N) % 4 != 2,
        }
    for name, found, truth, other in zip(
        ("divergence", "dhidden", "dweight", "dbias"),
        results(ours, dtype, dtype, kind, **options),
        results(plain, torch.float64, dtype, kind, **options),
        results(plain, dtype, dtype, kind, **options),
        strict=True,
    ):
        assert found.dtype == (torch.float32 if name == "divergence" else dtype)
        assert_close_to_truth(found, truth, other, name)
    if "mask" in options:
        assert (results(ours, dtype, dtype, kind, **options)[0][~options["mask"]] == 0).all()


@kinds
def test_gradients_match_finite_differences(kind: str) -> None:
    student, teacher = heads(torch.float64)

    def of_leaves(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        made = HeadInputs(hidden, weight, student.targets, bias, student.coefficients)
        return ours(made, teacher, kind, softcap=9.0, temperature=0.7)

    leaves = [leaf.requires_grad_() for leaf in student.leaves]
    assert torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True)


@kinds
def test_of_equals_it_is_zero_and_axes_are_kept(kind: str) -> None:
    student, _ = heads(torch.float64)
    found = ours(student, student, kind)
    assert found.abs().max() < 1e-12
    shaped = linear_kl(
        student.hidden.view(3, 7, 19), student.weight, student.hidden.view(3, 7, 19), student.weight
    )
    assert shaped.shape == (3, 7)


@kinds
def test_banned_on_both_sides_has_no_share(kind: str) -> None:
    student, teacher = heads(torch.float32)
    assert student.bias is not None and teacher.bias is not None
    student.bias[50:] = -torch.inf
    teacher.bias[50:] = -torch.inf
    leaves = [leaf.requires_grad_() for leaf in student.leaves]
    found = ours(student, teacher, kind)
    found.sum().backward()
    cut = [HeadInputs(s.hidden, s.weight[:50], s.targets, s.bias[:50], s.coefficients)  # type: ignore[index]
           for s in (student, teacher)]  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(found, ours(*cut, kind))
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_a_compiled_program_is_the_eager_one() -> None:
    torch._dynamo.reset()
    student, teacher = heads(torch.float32)
    leaves = [leaf.requires_grad_() for leaf in student.leaves]

    def program() -> Tensor:
        return ours(student, teacher, "jsd", temperature=0.7).sum()

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(), leaves), torch.autograd.grad(program(), leaves), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"teacher_weight": torch.randn(19, 6)},
            ValueError,
            "teacher_weight: expected 20 rows .* 19",
        ),
        ({"teacher_hidden": torch.randn(3, 5)}, ValueError, r"teacher_hidden: .* got \(3, 5\)"),
        (
            {"teacher_hidden": torch.randn(2, 6)},
            ValueError,
            r"^teacher_hidden: expected shape \(\.\.\., D_t\) with \(\.\.\.\) = \(3,\) to match "
            r"hidden \(3, 8\), got \(2, 6\); pass both models' hidden states of the same tokens$",
        ),
        ({"teacher_hidden": torch.randn(1, 3, 6)}, ValueError, r"^teacher_hidden: .*\(1, 3, 6\);"),
        (
            {"teacher_hidden": torch.randn(3, 6, device="meta")},
            ValueError,
            "^teacher_hidden: expected device cpu as hidden, got meta",
        ),
        ({"teacher_hidden": [[0.0]]}, TypeError, "^teacher_hidden: expected a torch.Tensor"),
        (
            {"mask": torch.ones(3)},
            ValueError,
            r"mask: expected bool of shape \(3,\)",
        ),
        ({"beta": 1.0}, ValueError, "beta: expected a number between 0 and 1, got 1.0; linear_kl"),
        (
            {"teacher_weight": torch.randn(20, 6, requires_grad=True)},
            ValueError,
            "teacher_weight, teacher_bias: expected constants",
        ),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.randn(3, 8),
        "weight": torch.randn(20, 8),
        "teacher_hidden": torch.randn(3, 6),
        "teacher_weight": torch.randn(20, 6),
    }
    with pytest.raises(error, match=message):
        linear_jsd(**(arguments | change))
