"""round_logits, kept_ids and weight_grad of the head ops, by whatever serves the device."""

import pytest
import torch
from torch import Tensor

from agro_kernels import (
    linear_logprobs,
    linear_logprobs_with_stats,
    reference,
    weighted_logprob_sum,
)
from tests.kernels.shapes import DTYPES
from tests.numerics import assert_close_to_truth

N, D, V = 21, 19, 203
pytestmark = pytest.mark.usefixtures("small_tiles")


def exact_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets whose logits are exact in fp32.

    A logit that differs in its last bit may round to the neighbour of what the truth rounds to:
    with exact logits the rounding is the same for everybody.
    """
    hidden = (torch.randn(N, D) * 4).round() / 4
    weight = (torch.randn(V, D) * 6).round() / 8
    bias = torch.randn(V).mul(8).round() / 8
    targets = torch.randint(0, V, (N,))
    targets[4::7] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def kept_sets(targets: Tensor, k: int = 12) -> Tensor:
    """(N, k) ids that hold the target; some padding, repeats, a row of padding, in odd order."""
    kept = torch.stack([torch.randperm(V)[:k] for _ in targets])
    kept[:, 3] = targets.clamp_min(0)
    kept[1::3, 7:] = -1
    kept[2::5, 0] = kept[2::5, 5]
    kept[6] = -1
    return kept


def results(function: object, inputs: tuple[Tensor, ...], **options: object) -> list[Tensor]:
    """logprobs, lse, entropy, and gradients of a scalar that depends on all three."""
    hidden, weight, bias = (t.detach().clone().requires_grad_() for t in inputs[:3])
    stats = function(hidden, weight, inputs[3], bias=bias, **options)  # type: ignore[operator]
    if hasattr(stats, "lse"):
        stats = (stats.logprobs, stats.entropy, stats.lse)
    logprobs, entropy, lse = stats
    c = torch.linspace(-1.0, 1.0, N, dtype=logprobs.dtype)
    (logprobs @ c + entropy @ c.cos() + lse @ c.sin()).backward()
    out = [logprobs, lse, entropy, hidden.grad, weight.grad, bias.grad]
    return [r.detach() for r in out if r is not None]


def assert_matches_reference(inputs: tuple[Tensor, ...], **options: object) -> None:
    doubles = (*(t.double() for t in inputs[:3]), inputs[3])
    for name, ours, truth, plain in zip(
        ("logprobs", "lse", "entropy", "dhidden", "dweight", "dbias"),
        results(linear_logprobs_with_stats, inputs, **options),
        results(reference.linear_logprobs_with_stats, doubles, **options),
        results(reference.linear_logprobs_with_stats, inputs, **options),
        strict=True,
    ):
        assert_close_to_truth(ours, truth, plain, name)


# --- round_logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["nocap", "softcap"])
@pytest.mark.parametrize("rounding", ["bf16", "fp16"])
def test_rounded_logits_match_truth(
    dtype: torch.dtype, softcap: float | None, rounding: str
) -> None:
    assert_matches_reference(
        exact_inputs(dtype), softcap=softcap, temperature=0.8, round_logits=rounding
    )


def test_rounded_logits_are_those_of_a_bf16_engine() -> None:
    hidden, weight, _, targets = exact_inputs(torch.bfloat16)
    targets = targets.clamp_min(0)
    engine = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    ours = linear_logprobs(hidden, weight, targets, round_logits="bf16")
    torch.testing.assert_close(ours, engine, rtol=0, atol=1e-5)
    assert (linear_logprobs(hidden, weight, targets) - engine).abs().max() > 1e-3


def test_rejects_unknown_rounding() -> None:
    hidden, weight, _, targets = exact_inputs(torch.float32)
    with pytest.raises(ValueError, match='round_logits: expected "bf16", "fp16" or None, got'):
        linear_logprobs(hidden, weight, targets, round_logits="tf32")


# --- kept_ids -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["nocap", "softcap"])
@pytest.mark.parametrize("rounding", [None, "bf16"], ids=["exact", "rounded"])
def test_kept_sets_match_truth(
    dtype: torch.dtype, softcap: float | None, rounding: str | None
) -> None:
    inputs = exact_inputs(dtype)
    assert_matches_reference(
        inputs,
        softcap=softcap,
        temperature=torch.linspace(0.5, 2.0, N),
        round_logits=rounding,
        kept_ids=kept_sets(inputs[3]),
    )


def test_kept_set_is_the_softmax_over_its_members() -> None:
    hidden, weight, bias, targets = exact_inputs(torch.float32)
    targets = targets.clamp_min(0)
    kept = kept_sets(targets)
    stats = linear_logprobs_with_stats(hidden, weight, targets, bias=bias, kept_ids=kept)
    for row in range(N):
        ids = kept[row][kept[row] >= 0].unique()
        ids = torch.arange(V) if len(ids) == 0 else ids
        logits = hidden[row] @ weight[ids].T + bias[ids]
        log_p = logits.log_softmax(-1)
        torch.testing.assert_close(stats.logprobs[row], log_p[ids == targets[row]].squeeze())
        torch.testing.assert_close(stats.entropy[row], -(log_p.exp() * log_p).sum())
    whole = linear_logprobs(hidden[6:7], weight, targets[6:7], bias=bias)
    assert torch.equal(stats.logprobs[6:7], whole)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_bits_are_the_ids(ids_dtype: torch.dtype) -> None:
    kept = torch.tensor([[31, 0, 64, 31, -1], [-1, -7, -1, -1, -1], [95, 32, 63, 94, 33]])
    bits = torch.ops.agro.pack_kept_ids(kept.to(ids_dtype), 97)
    assert bits.shape == (3, 4) and bits.dtype == torch.int32
    expanded = (bits.unsqueeze(2) >> torch.arange(32)) & 1
    members = [row.nonzero().squeeze(1).tolist() for row in expanded.flatten(1)]
    assert members == [[0, 31, 64], list(range(128)), [32, 33, 63, 94, 95]]


def test_target_outside_its_set_has_no_probability() -> None:
    hidden, weight, _, targets = exact_inputs(torch.float32)
    targets = targets.clamp_min(0)
    kept = (targets[:, None] + torch.arange(1, 4)) % V
    stats = linear_logprobs_with_stats(hidden, weight, targets, kept_ids=kept)
    assert torch.isneginf(stats.logprobs).all()
    assert stats.entropy.isfinite().all() and stats.lse.isfinite().all()


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        (torch.zeros(N, 3), TypeError, "kept_ids: expected int32 or int64"),
        (torch.zeros(N, dtype=torch.int64), ValueError, "kept_ids: expected shape"),
        (torch.zeros(N, 0, dtype=torch.int64), ValueError, "kept_ids: expected at least one id"),
        (torch.full((N, 2), V), ValueError, f"kept_ids: expected ids below {V}, got {V} in row 0"),
    ],
    ids=["dtype", "shape", "empty", "value"],
)
def test_rejects_wrong_kept_ids(kept: Tensor, error: type[Exception], message: str) -> None:
    hidden, weight, _, targets = exact_inputs(torch.float32)
    with pytest.raises(error, match=message):
        linear_logprobs(hidden, weight, targets, kept_ids=kept)


# --- weight_grad ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_weight_grad_is_the_sum_over_micro_batches(dtype: torch.dtype) -> None:
    """As exact as one computation of the whole batch; what was there stays."""
    hidden, weight, bias, targets = exact_inputs(dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    buffer = torch.ones(V, D, dtype=sums)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    for rows in (slice(0, 8), slice(8, 9), slice(9, N)):
        logprobs = linear_logprobs(
            leaves[0][rows], leaves[1], targets[rows], bias=leaves[2], weight_grad=buffer
        )
        (logprobs * 3).sum().backward()
    assert leaves[1].grad is None
    gradients: dict[torch.dtype, list[Tensor]] = {}
    for wide in (sums, torch.float64):
        same = [t.detach().to(wide, copy=True).requires_grad_() for t in (hidden, weight, bias)]
        (reference.linear_logprobs(same[0], same[1], targets, bias=same[2]) * 3).sum().backward()
        gradients[wide] = [t.grad for t in same if t.grad is not None]
    plain, truth = gradients[sums], gradients[torch.float64]
    assert leaves[0].grad is not None and leaves[2].grad is not None
    rounded = [g.to(dtype) for g in plain]
    assert_close_to_truth(leaves[0].grad, truth[0], rounded[0], "dhidden")
    # Half-precision operands meet gradients of logits rounded to their dtype, so the terms of the
    # sum are as good as that dtype; the sum over the micro-batches adds nothing to it.
    assert_close_to_truth((buffer - 1).to(dtype), truth[1], rounded[1], "weight_grad")


@pytest.mark.parametrize("with_lse", [False, True], ids=["4-products", "3-products"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "round_logits": "bf16"}], ids=str)
def test_weighted_sum_adds_to_weight_grad(with_lse: bool, options: dict[str, object]) -> None:
    """The upstream gradient counts, a zero coefficient leaves its row out, total is the same."""
    hidden, weight, bias, targets = exact_inputs(torch.float32)
    hidden[11] = torch.nan
    coefficients = torch.linspace(-1.0, 1.0, N)
    coefficients[11] = 0.0
    options = {**options, "bias": bias, "kept_ids": kept_sets(targets), "temperature": 0.7}
    lse = linear_logprobs_with_stats(hidden, weight, targets, **options).lse if with_lse else None  # type: ignore[arg-type]
    found = []
    for buffer in (None, torch.zeros(V, D)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total = weighted_logprob_sum(
            h,
            w,
            targets,
            coefficients,
            lse=lse,
            weight_grad=buffer,
            **options,  # type: ignore[arg-type]
        )
        (2.5 * total).backward()
        assert (w.grad is None) == (buffer is not None)
        found.append([total.detach(), h.grad, w.grad if buffer is None else buffer])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_weight_grad_of_a_frozen_weight_stays_as_it_is() -> None:
    hidden, weight, _, targets = exact_inputs(torch.float32)
    buffer = torch.ones(V, D)
    hidden.requires_grad_()
    linear_logprobs(hidden, weight, targets, weight_grad=buffer).sum().backward()
    assert torch.equal(buffer, torch.ones(V, D)) and hidden.grad is not None


@pytest.mark.parametrize(
    ("buffer", "error", "message"),
    [
        (torch.zeros(V, D + 1), ValueError, "weight_grad: expected the shape of weight"),
        (torch.zeros(V, D, dtype=torch.bfloat16), TypeError, "weight_grad: expected torch.float32"),
        (torch.zeros(D, V).T, ValueError, "weight_grad: expected a contiguous tensor"),
        (torch.zeros(V, D, requires_grad=True), ValueError, "weight_grad: expected a tensor with"),
    ],
    ids=["shape", "dtype", "strides", "requires-grad"],
)
def test_rejects_wrong_weight_grad(buffer: Tensor, error: type[Exception], message: str) -> None:
    hidden, weight, _, targets = exact_inputs(torch.float32)
    with pytest.raises(error, match=message):
        linear_logprobs(hidden, weight, targets, weight_grad=buffer)


def test_weight_grad_inside_compile_is_refused() -> None:
    hidden, weight, _, targets = exact_inputs(torch.float32)
    buffer = torch.zeros(V, D)

    def loss(hidden: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, targets, weight_grad=buffer).sum()

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="weight_grad: expected a call outside torch.compile"):
        compiled(hidden.requires_grad_())
