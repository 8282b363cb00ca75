"""One derivative, in reverse mode: every other is an error that names the op, never a number."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from agro_kernels import agro_loss, linear_logprobs, selective_logprobs, weighted_logprob_sum

N, D, V = 6, 8, 30
WEIGHT = torch.linspace(-1.0, 1.0, V * D).sin().view(V, D)
TARGETS = torch.arange(N) * 4
COEFFICIENTS = torch.linspace(-1.0, 1.0, N)
ROWS = (torch.tensor([1.0, 0.0]), torch.tensor([5, 5]), torch.tensor([0, 2, N]))


def head(hidden: Tensor) -> Tensor:
    return linear_logprobs(hidden, WEIGHT, TARGETS)


def into_a_buffer(hidden: Tensor) -> Tensor:
    return linear_logprobs(hidden, WEIGHT, TARGETS, weight_grad=torch.zeros(V, D))


def weighted(hidden: Tensor) -> Tensor:
    return weighted_logprob_sum(hidden, WEIGHT, TARGETS, COEFFICIENTS)


def with_lse(hidden: Tensor) -> Tensor:
    return weighted_logprob_sum(hidden, WEIGHT, TARGETS, COEFFICIENTS, lse=COEFFICIENTS + 9)


def of_logits(logits: Tensor) -> Tensor:
    return selective_logprobs(logits, TARGETS)


def loss(logprobs: Tensor) -> Tensor:
    return agro_loss(logprobs, torch.zeros(N), *ROWS, beta=0.1)


OPS = pytest.mark.parametrize(
    ("op", "name", "shape"),
    [
        (head, "linear_logprobs", (N, D)),
        (into_a_buffer, "linear_logprobs", (N, D)),
        (weighted, "linear_logprobs", (N, D)),
        (with_lse, "linear_logprobs", (N, D)),
        (of_logits, "selective_logprobs", (N, V)),
        (loss, "agro_loss", (N,)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
Op = Callable[[Tensor], Tensor]


# torch scripts its own forward-mode formulas the first time that somebody asks for the mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@OPS
def test_forward_mode_is_refused(op: Op, name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with pytest.raises(RuntimeError, match=f"^{name}: expected .* without a tangent"):
        torch.func.jvp(op, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=f"^{name}: expected .* without a tangent"):
            op(forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.equal(op(x), op(x))  # a level alone is no harm


@OPS
@pytest.mark.parametrize("upstream", ["constant", "depends on the input"])
def test_a_second_derivative_is_refused(
    op: Op, name: str, shape: tuple[int, ...], upstream: str
) -> None:
    """Even where the terms that the op would add are not on the way to what is asked for."""
    x = torch.randn(shape, requires_grad=True)
    value = op(x).sum() if upstream == "constant" else op(x).square().sum()
    expected = torch.autograd.grad(value, x, retain_graph=True)[0]
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    assert torch.equal(first, expected) and first.requires_grad
    with pytest.raises(RuntimeError, match=f"^{name}: expected one derivative, got a second"):
        torch.autograd.grad(first.square().sum() + x.sum(), x)


def test_a_second_derivative_in_the_weight_alone_is_refused() -> None:
    hidden, weight = torch.randn(N, D), WEIGHT.clone().requires_grad_()
    logprobs = linear_logprobs(hidden, weight, TARGETS)
    (first,) = torch.autograd.grad(logprobs.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="^linear_logprobs: expected one derivative"):
        torch.autograd.grad(first.sum() + weight.sum(), weight)


def test_tokens_may_change_in_place_after_the_loss() -> None:
    """The gradient does not read them, so autograd has nothing to say."""
    leaf = torch.linspace(-2.0, -1.0, N).requires_grad_()
    logprobs = leaf * 1.0
    value = loss(logprobs)
    with torch.no_grad():
        logprobs.zero_()
    (gradient,) = torch.autograd.grad(value, leaf)
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(gradient, expected)
