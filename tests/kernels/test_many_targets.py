"""Many targets a token: by every backend against float64, under the tolerance law.

"native": csrc in each instruction set that it has; "blocked": the torch path in small tiles;
"triton": its kernels by Triton's interpreter, in small chunks, or on a GPU.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from agro_kernels import (
    LogprobHead,
    linear_logprobs,
    linear_logprobs_with_entropy,
    linear_logprobs_with_stats,
    reference,
    tail_probability,
)
from agro_kernels._cpu import linear_logprobs as cpu
from agro_kernels._cpu import native
from agro_kernels._torch import linear_logprobs as blocked
from agro_kernels.many_targets import _sums_of_equals
from tests.conftest import SetSizes
from tests.kernels.isas import ISAS, chosen
from tests.kernels.shapes import DTYPES
from tests.numerics import HeadInputs, assert_close_to_truth, head_inputs, plain_logits

N, D, V, K = 21, 40, 203, 6
NAMES = ("logprobs", "entropy", "lse", "dhidden", "dweight", "dbias")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = [
    # NumPy, with which Triton's interpreter computes, remarks on NaN and inf.
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture(params=["blocked", "triton", *ISAS])
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, set_sizes: SetSizes
) -> Iterator[str]:
    """Serves the CPU's tensors."""
    name: str = request.param
    if name == "blocked":
        set_sizes(blocked, TOKEN_CHUNK=16, VOCAB_BLOCK=64)
        monkeypatch.setattr(native, "load", lambda: None)
        yield name
    elif name == "triton":
        from agro_kernels._triton import head_gradients
        from agro_kernels._triton import linear_logprobs as kernels

        set_sizes(head_gradients, DLOGITS_CHUNK_BYTES=2100, TOKEN_CHUNK=16, KNOWN_BLOCK=32)
        monkeypatch.setattr(cpu, "_library", lambda head: None)
        for function in ("linear_logprobs_fwd", "linear_logprobs_bwd"):
            monkeypatch.setattr(cpu.blocked, function, getattr(kernels, function))
        yield name
    else:
        with chosen(name):
            yield name


def many_targets(n: int = N, v: int = V, k: int = K) -> Tensor:
    """(n, k): the likeliest among them, repeats, ignored ids, a row of one and a row of none."""
    targets = torch.randint(0, v, (n, k), generator=torch.Generator().manual_seed(3))
    targets[:, 0] = head_inputs(n, D, v).targets
    targets[1::3, 2] = targets[1::3, 0]
    targets[1::6, 4] = targets[1::6, 0]
    targets[2::4, 1] = -100
    targets[3, 1:] = -100
    targets[4] = -100
    targets[5] = 7
    return targets


def case(dtype: torch.dtype, *, bias: bool = True) -> tuple[HeadInputs, Tensor]:
    inputs = head_inputs(N, D, V, dtype=dtype, bias=bias)
    inputs.hidden[4] = torch.nan  # whose targets are ignored
    return inputs, many_targets()


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, lse) as model code makes them: the logits in the tested dtype."""
    options.pop("keep_logits_bytes", None)
    counted = targets != -100
    rows = counted.any(1)
    logits = plain_logits(hidden.masked_fill(~rows[:, None], 0.0), weight, **options)
    logprobs_all, lse = logits.log_softmax(-1), logits.logsumexp(-1)
    entropy = -(logprobs_all.exp() * logprobs_all).sum(-1)
    picked = logprobs_all.gather(-1, targets.where(counted, 0))
    return picked.where(counted, 0.0), entropy.where(rows, 0.0), lse.where(rows, 0.0)


def results(
    function: Any, inputs: HeadInputs, targets: Tensor, dtype: torch.dtype, **options: Any
) -> list[Tensor]:
    """By NAMES: the results, and the gradients of a scalar that depends on each of the three."""
    copy = inputs.in_dtype(dtype)
    made = function(copy.hidden, copy.weight, targets, bias=copy.bias, **options)
    logprobs, entropy, lse = made
    generator = torch.Generator().manual_seed(5)
    c = torch.randn(targets.shape, generator=generator).to(logprobs.dtype)
    of_tokens = inputs.coefficients.to(logprobs.dtype)
    loss = (logprobs * c).sum() + entropy @ of_tokens.cos() + lse @ of_tokens
    gradients = torch.autograd.grad(loss, copy.leaves)
    return [result.detach() for result in (*made, *gradients)]


def assert_matches(
    inputs: HeadInputs, targets: Tensor, dtype: torch.dtype, compared: Any, **options: Any
) -> None:
    for name, ours, truth, other in zip(
        NAMES,
        results(linear_logprobs_with_stats, inputs, targets, dtype, **options),
        results(compared, inputs, targets, torch.float64, **options),
        results(compared, inputs, targets, dtype, **options),
        strict=False,
    ):
        assert ours.dtype == (torch.float32 if name in NAMES[:3] else dtype), name
        assert_close_to_truth(ours, truth, other, name)


# --- Closeness ------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("option", ["plain", "temperature", "softcap"])
def test_matches_truth(backend: str, dtype: torch.dtype, option: str) -> None:
    options: dict[str, Any] = {
        "plain": {},
        "temperature": {"temperature": torch.linspace(0.5, 1.5, N)},
        "softcap": {"softcap": 5.0, "temperature": 0.7},
    }[option]
    inputs, targets = case(dtype, bias=option != "plain")
    assert_matches(inputs, targets, dtype, plain, **options)


@dtypes
def test_rounded_and_kept_match_truth(backend: str, dtype: torch.dtype) -> None:
    """Of logits that are exact, so that everybody rounds them alike; some ids are not kept."""
    inputs, targets = case(dtype)
    assert inputs.bias is not None
    inputs.hidden.mul_(4.0).round_().div_(4.0)
    inputs.weight.mul_(16.0).round_().div_(16.0)
    inputs.bias.mul_(8.0).round_().div_(8.0)
    kept_ids = torch.cat([targets.clamp_min(-1), torch.arange(N)[:, None]], 1)
    kept_ids[::5] = -1
    options = {"round_logits": "bf16", "kept_ids": kept_ids, "softcap": 5.0}
    assert_matches(inputs, targets, dtype, reference.linear_logprobs_with_stats, **options)

    kept_ids[1, :] = targets[1, 3]
    copy = inputs.in_dtype(dtype)
    logprobs = linear_logprobs(
        copy.hidden, copy.weight, targets, bias=copy.bias, kept_ids=kept_ids, softcap=5.0
    )
    assert torch.equal(logprobs[1] == -torch.inf, targets[1] != targets[1, 3])
    logprobs[:, 3].sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in copy.leaves)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_kept_for_the_backward_pass(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton":
        pytest.skip("keeps logits on a GPU only")
    inputs, targets = case(dtype)
    made = results(linear_logprobs_with_stats, inputs, targets, dtype, keep_logits_bytes=10**6)
    plainly = results(linear_logprobs_with_stats, inputs, targets, dtype)
    for ours, without in zip(made[:3], plainly[:3], strict=True):
        assert torch.equal(ours, without)
    assert_matches(inputs, targets, dtype, plain, keep_logits_bytes=10**6)
    assert_matches(inputs, targets, dtype, plain, keep_logits_bytes=N * (192 * dtype.itemsize + 12))


@dtypes
def test_one_of_one_is_the_op_of_one(backend: str, dtype: torch.dtype) -> None:
    inputs = head_inputs(N, D, V, dtype=dtype, bias=True, ignored=True)
    ours = linear_logprobs_with_stats(inputs.hidden, inputs.weight, inputs.targets[:, None])
    single = linear_logprobs_with_stats(inputs.hidden, inputs.weight, inputs.targets)
    assert torch.equal(ours.logprobs.squeeze(1), single.logprobs)
    assert torch.equal(ours.entropy, single.entropy) and torch.equal(ours.lse, single.lse)


def test_a_likely_token_keeps_its_digits(backend: str) -> None:
    """1 - p of a p near 1, and repeats of it. With lse as one number, as in the reference."""
    inputs, targets = case(torch.float32)
    assert inputs.bias is not None
    inputs.bias[7] = 12 + (inputs.hidden.nan_to_num() @ inputs.weight.T).logsumexp(-1).max()
    targets[:, 3] = 7
    targets[4] = -100
    assert_matches(inputs, targets, torch.float32, reference.linear_logprobs_with_stats)


def test_gradients_match_finite_differences() -> None:
    targets = many_targets(9, 30)
    inputs = head_inputs(9, 3, 30, dtype=torch.float64, bias=True)
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]

    def stats(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        made = linear_logprobs_with_stats(
            hidden, weight, targets, bias=bias, temperature=0.7, softcap=5.0
        )
        return *made, tail_probability(made.logprobs, targets)

    assert torch.autograd.gradcheck(stats, leaves, fast_mode=True)


# --- The same in other words ----------------------------------------------------------------------


def test_weight_grad_gets_the_gradient(backend: str) -> None:
    inputs, targets = case(torch.bfloat16)
    expected = results(linear_logprobs_with_stats, inputs, targets, torch.bfloat16)
    total = torch.ones(V, D)
    copy = inputs.in_dtype(torch.bfloat16)
    made = linear_logprobs_with_stats(
        copy.hidden, copy.weight, targets, bias=copy.bias, weight_grad=total
    )
    generator = torch.Generator().manual_seed(5)
    c = torch.randn(targets.shape, generator=generator)
    of_tokens = inputs.coefficients
    loss = (made.logprobs * c).sum() + made.entropy @ of_tokens.cos() + made.lse @ of_tokens
    loss.backward()
    assert copy.weight.grad is None
    assert torch.equal(copy.hidden.grad, expected[3])
    torch.testing.assert_close(total - 1, expected[4].float(), rtol=2**-7, atol=1e-5)


def test_ids_that_do_not_count_are_exact_zeros(backend: str) -> None:
    inputs, targets = case(torch.float32)
    copy = inputs.in_dtype(torch.float32)
    made = linear_logprobs_with_stats(copy.hidden, copy.weight, targets, bias=copy.bias)
    ignored = targets == -100
    assert (made.logprobs[ignored] == 0).all() and (made.logprobs[~ignored] != 0).all()
    assert made.entropy[4] == 0 and made.lse[4] == 0
    made.logprobs[ignored].sum().backward()
    for leaf in copy.leaves:
        assert leaf.grad is not None and (leaf.grad == 0).all()


def test_leading_axes_dtypes_and_another_ignore_index() -> None:
    inputs = head_inputs(6, 8, 30)
    targets = torch.randint(1, 30, (6, 4))
    expected = linear_logprobs(inputs.hidden, inputs.weight, targets)
    targets[2, 1] = 0
    ours = linear_logprobs_with_entropy(
        inputs.hidden.view(2, 3, 8),
        inputs.weight,
        targets.view(2, 3, 4).int(),
        ignore_index=0,
        temperature=torch.ones(2, 3),
    )
    assert ours.logprobs.shape == (2, 3, 4) and ours.entropy.shape == (2, 3)
    flat = ours.logprobs.view(6, 4)
    assert flat[2, 1] == 0.0
    counted = targets != 0
    assert torch.equal(flat[counted], expected[counted])
    none = linear_logprobs(inputs.hidden[:0], inputs.weight, targets[:0])
    assert none.shape == (0, 4)


def test_module_and_autocast() -> None:
    inputs, targets = case(torch.float32)
    head = LogprobHead(D, V)
    made = head(inputs.hidden.nan_to_num(), targets)
    assert made.logprobs.shape == (N, K) and made.lse.shape == (N,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_logprobs(inputs.hidden, inputs.weight, targets)
    rounded = inputs.hidden.bfloat16(), inputs.weight.bfloat16()
    assert torch.equal(ours, linear_logprobs(*rounded, targets))


def test_what_the_caller_holds_may_be_strided_or_expanded() -> None:
    inputs, targets = case(torch.float32)
    copy = inputs.in_dtype(torch.float32)
    logprobs = linear_logprobs(copy.hidden, copy.weight, targets.T.contiguous().T, bias=copy.bias)
    logprobs.sum().backward()  # an expanded upstream gradient
    again = inputs.in_dtype(torch.float32)
    same = linear_logprobs(again.hidden, again.weight, targets, bias=again.bias)
    same.backward(torch.ones(N, K))
    assert torch.equal(logprobs, same)
    for ours, theirs in zip(copy.leaves, again.leaves, strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_sums_of_equals() -> None:
    ids = torch.tensor([[-1, 2, 2, 2, 2, 2, 7], [1, 1, 4, 5, 5, 5, 9]])
    sums = _sums_of_equals(ids, torch.arange(14.0).view(2, 7))
    assert torch.equal(sums[0, [0, 1, 6]], torch.tensor([0.0, 15.0, 6.0]))
    assert torch.equal(sums[1, [0, 2, 3, 6]], torch.tensor([15.0, 9.0, 33.0, 13.0]))


# --- What is left ---------------------------------------------------------------------------------


@dtypes
def test_tail_matches_truth(dtype: torch.dtype) -> None:
    inputs, targets = case(dtype)
    exact, rounded = inputs.in_dtype(torch.float64), inputs.in_dtype(dtype)
    found = []
    for copy, function in (
        (rounded, linear_logprobs_with_stats),
        (exact, plain),
        (inputs.in_dtype(dtype), plain),
    ):
        logprobs = function(copy.hidden, copy.weight, targets, bias=copy.bias)[0]
        of = tail_probability if copy is rounded else reference.tail_probability
        tail = of(logprobs, targets)
        found.append((tail.detach(), torch.autograd.grad(tail @ tail.new_ones(N), copy.hidden)[0]))
    for ours, truth, other in zip(*found, strict=True):
        assert_close_to_truth(ours, truth, other)
    assert found[0][0][4] == 1.0


def test_tail_has_a_logarithm() -> None:
    logprobs = torch.tensor([[-1e-9, -30.0]], requires_grad=True)
    tail = tail_probability(logprobs, torch.tensor([[3, 1]]))
    assert tail == 2.0**-24
    tail.log().sum().backward()
    assert logprobs.grad is not None and (logprobs.grad == 0).all()


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.zeros(3, 0).long(), ValueError, r"targets: expected at least one id .*\(3, 0\)"),
        (torch.zeros(4, 2).long(), ValueError, r"targets: expected shape \(3,\), or .* \(4, 2\)"),
        (torch.zeros(3, 2), TypeError, "targets: expected int32 or int64 .* got torch.float32"),
        (
            torch.tensor([[1, 2]] * 2 + [[1, 30]]),
            ValueError,
            r"targets: .*\[0, 30\).* got 30 at .* 5",
        ),
        (torch.tensor([[1, -3]] * 3), ValueError, r"targets: .*\[0, 30\).* got -3 at position 1"),
    ],
)
def test_rejects(targets: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_logprobs(torch.randn(3, 8), torch.randn(30, 8), targets)


def test_tail_rejects_other_shapes() -> None:
    with pytest.raises(
        ValueError, match=r"logprobs: expected shape \(..., K\) as targets \(3, 2\)"
    ):
        tail_probability(torch.zeros(3), torch.zeros(3, 2).long())


def test_second_derivatives_are_refused() -> None:
    inputs, targets = case(torch.float32)
    copy = inputs.in_dtype(torch.float32)
    value = linear_logprobs(copy.hidden, copy.weight, targets).sum()
    (gradient,) = torch.autograd.grad(value, copy.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprobs: expected one derivative"):
        gradient.sum().backward()
