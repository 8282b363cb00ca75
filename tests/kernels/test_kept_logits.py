"""keep_logits_bytes: how many columns it pays for, and gradients made of what was kept.

By whatever serves the device, and by the blocked torch path in small tiles.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from agro_kernels import (
    LogprobHead,
    kept_logits,
    linear_agro_loss,
    linear_logprobs,
    linear_logprobs_with_stats,
    weighted_logprob_sum,
)
from agro_kernels._cpu import native
from agro_kernels._torch import linear_logprobs as blocked
from agro_kernels.arguments import AUTO
from agro_kernels.head import Head
from agro_kernels.kept_logits import empty_kept_logits, kept_columns
from tests.conftest import SetSizes
from tests.kernels.recorder import Recorder
from tests.kernels.shapes import DTYPES
from tests.numerics import HeadInputs, assert_close_to_truth, head_inputs, plain_linear_logprobs

N, D, V = 37, 24, 401
NAMES = ("logprobs", "lse", "entropy", "dhidden", "dweight", "dbias")
# Nothing, one step of 192 columns of V = 401, two, everything with its ragged tile.
SHARES = [0, 1, 2, 3]

shares = pytest.mark.parametrize("share", SHARES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["own", "blocked"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "blocked":
        request.getfixturevalue("small_tiles")
        monkeypatch.setattr(native, "load", lambda: None)


def budget(share: int, dtype: torch.dtype, tokens: int = N) -> int:
    """Bytes for one of SHARES."""
    size = dtype.itemsize
    whole = tokens * (V * size + 7 * 4)
    return whole if share == 3 else share * tokens * (192 * size + 3 * 4)


def run(inputs: HeadInputs, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """By NAMES: the results, and the gradients of a scalar that depends on each of the three."""
    copy = inputs.in_dtype(dtype)
    logprobs, entropy, lse = linear_logprobs_with_stats(
        copy.hidden, copy.weight, copy.targets, bias=copy.bias, **options
    )
    return with_gradients(copy, (logprobs, lse, entropy))


def plain(inputs: HeadInputs, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    copy = inputs.in_dtype(dtype)
    results = plain_linear_logprobs(
        copy.hidden, copy.weight, copy.targets, bias=copy.bias, **options
    )
    return with_gradients(copy, results)


def with_gradients(copy: HeadInputs, results: tuple[Tensor, ...]) -> list[Tensor]:
    logprobs, lse, entropy = results
    c = copy.coefficients.to(logprobs.dtype)
    (logprobs @ c + entropy @ c.flip(0) + (lse * c.cos()).sum()).backward()
    return [result.detach() for result in (*results, *(leaf.grad for leaf in copy.leaves))]


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


# --- How many -------------------------------------------------------------------------------------


def columns(
    n: int, v: int, keep: int, dtype: torch.dtype, device: str, d: int = 8, **options: Any
) -> int:
    with FakeTensorMode():
        hidden = torch.empty(n, d, dtype=dtype, device=device)
        weight = torch.empty(v, d, dtype=dtype, device=device)
        targets = torch.empty(n, dtype=torch.int64, device=device)
        return kept_columns(Head.of(hidden, weight, targets, **options), keep)


@pytest.mark.parametrize("v", [1, 64, 191, 401, 1000])
@pytest.mark.parametrize("n", [1, 7])
@dtypes
def test_kept_bytes_never_exceed_the_budget(n: int, v: int, dtype: torch.dtype) -> None:
    head = head_inputs(n, 8, v, dtype=dtype).head()
    whole = n * (v * dtype.itemsize + -(-v // 64) * 4)
    for keep in (0, 1, whole // 3, whole - 1, whole, whole + 1, 10**12):
        kept = empty_kept_logits(head, keep)
        assert kept.logits.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
        assert sum(tensor.nbytes for tensor in kept) <= keep
        k = kept.columns
        assert k == v or k % 192 == 0
        assert kept.maxima.shape == (n, -(-k // kept.tile))
        step = n * (192 * dtype.itemsize + 12)
        assert k == v or keep == 0 or sum(tensor.nbytes for tensor in kept) + step > keep
        assert (k == v) == (keep > 0 and keep >= whole)


@pytest.mark.parametrize(
    ("dtype", "device", "keep", "expected"),
    [
        (torch.bfloat16, "cuda", 10 * (256 * 2 + 2 * 4), 256),
        (torch.bfloat16, "cuda", 10 * (256 * 2 + 2 * 4) - 1, 0),
        (torch.float16, "cuda", 10**9, 768),
        (torch.float32, "cuda", 10**9, 0),
        (torch.float32, "cpu", 10**9, 1000),
        (torch.float64, "cpu", 10**9, 0),
        (torch.bfloat16, "meta", 10**9, 1000),
        (torch.bfloat16, "cuda", AUTO, 768),
        (torch.bfloat16, "cpu", AUTO, 1000),
    ],
)
def test_columns_by_device_and_dtype(
    dtype: torch.dtype, device: str, keep: int, expected: int
) -> None:
    assert columns(10, 1000, keep, dtype, device) == expected


@pytest.mark.parametrize(
    ("architecture", "v", "hidden_size", "softcap", "expected"),
    [
        ("sm80", 1000, 64, None, 768),
        ("sm80", 1000, 64, 30.0, 0),
        ("sm90", 1024, 1024, None, 0),
        ("sm90", 1024, 2048, None, 1024),
        ("sm90", 1000, 2048, None, 0),
        ("sm100", 1024, 4096, None, 0),
        ("gfx942", 1000, 64, None, 768),
    ],
)
def test_gpu_keeps_where_registers_suffice(
    architecture: str,
    v: int,
    hidden_size: int,
    softcap: float | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_logits, "architecture", lambda device: architecture)
    options = {"softcap": softcap}
    assert columns(10, v, 10**9, torch.bfloat16, "cuda", hidden_size, **options) == expected


def test_auto_is_bounded() -> None:
    assert columns(60, 1000, AUTO, torch.bfloat16, "cuda") == 256  # 4 D V = 32,000 bytes
    assert columns(2**20, 1000, AUTO, torch.bfloat16, "cpu") == 384  # 1 GiB


def test_nothing_is_kept_with_options_that_cannot_take_it() -> None:
    inputs = head_inputs(5, 8, 64)
    ids = inputs.targets[:, None]
    assert kept_columns(inputs.head(), 10**9) == 64
    assert kept_columns(inputs.head(round_logits="bf16"), 10**9) == 0
    assert kept_columns(inputs.head(kept_ids=ids), 10**9) == 0


@pytest.mark.parametrize("bad", [-1, True, 1.5, "all", None, 2**63])
def test_rejects_what_is_no_number_of_bytes(bad: Any) -> None:
    inputs = head_inputs(5, 8, 64)
    with pytest.raises((TypeError, ValueError)) as raised:
        linear_logprobs(inputs.hidden, inputs.weight, inputs.targets, keep_logits_bytes=bad)
    assert str(raised.value) == (
        f'keep_logits_bytes: expected an int >= 0 or "auto", got {bad!r}; 0 keeps none'
    )


def products(**options: Any) -> tuple[int, int]:
    """Of the blocked path, of 32 tokens: matrix products, and the largest tensor's numbers."""
    inputs = head_inputs(32, D, V).in_dtype(torch.float32)
    with Recorder() as recorder:
        linear_logprobs(inputs.hidden, inputs.weight, inputs.targets, **options).sum().backward()
    return recorder.products, recorder.largest


def test_kept_logits_save_their_product() -> None:
    none, share, whole = (
        products(keep_logits_bytes=keep)
        for keep in (0, budget(1, torch.float32, 32), budget(3, torch.float32, 32))
    )
    assert none == (4, 32 * V)  # one block of 32 rows and all columns
    assert share == (6, 32 * V)  # two blocks in the backward pass: 2 products, 3 products
    assert whole == (3, 32 * V)


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    inputs = head_inputs(32, D, V)
    leaf = inputs.weight.clone().requires_grad_()
    for weight, enabled in ((inputs.weight, True), (leaf, False)):
        with torch.set_grad_enabled(enabled), Recorder() as recorder:
            linear_logprobs(inputs.hidden[:1], weight, inputs.targets[:1], keep_logits_bytes="auto")
        assert recorder.largest < 2 * V * D


# --- Gradients ------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 5.0, "temperature": 0.7},
    "token_temperature": {"temperature": torch.linspace(0.5, 1.5, N)},
}


@pytest.mark.usefixtures("served")
@shares
@dtypes
@pytest.mark.parametrize("options", list(OPTIONS))
def test_results_and_gradients_match_truth(options: str, dtype: torch.dtype, share: int) -> None:
    inputs = head_inputs(N, D, V, dtype=dtype, bias=True, ignored=True)
    keywords = OPTIONS[options]
    for name, ours, truth, of_plain in zip(
        NAMES,
        run(inputs, dtype, keep_logits_bytes=budget(share, dtype), **keywords),
        plain(inputs, torch.float64, **keywords),
        plain(inputs, dtype, **keywords),
        strict=True,
    ):
        assert_close_to_truth(ours, truth, of_plain, name)


def from_rounded_dlogits(inputs: HeadInputs, softcap: float | None) -> list[Tensor]:
    """dhidden, dweight, dbias by float64 but for the logits' gradient, which is rounded to bf16.

    That is what matrix units take, whatever the logits were made of.
    """
    copy = inputs.in_dtype(torch.float64)
    assert copy.bias is not None
    raw = (copy.hidden @ copy.weight.T + copy.bias).detach().requires_grad_()
    rows = torch.eye(V, dtype=torch.float64)
    results = plain_linear_logprobs(raw, rows, copy.targets, softcap=softcap)
    with_gradients(replace(copy, hidden=raw, bias=None, weight=raw), results)
    assert raw.grad is not None
    dlogits = raw.grad.bfloat16().double()
    exact = dlogits @ copy.weight, dlogits.T @ copy.hidden, dlogits.sum(0)
    return [gradient.detach().bfloat16() for gradient in exact]


@pytest.mark.usefixtures("served")
@shares
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["nocap", "softcap"])
def test_gradients_are_as_exact_as_those_of_logits_made_again(
    softcap: float | None, share: int, set_sizes: SetSizes
) -> None:
    """Rounding what is kept to fp16 costs no more than rounding the logits' gradient to bf16.

    As many numbers as it takes for the luck of single roundings to average out. A cap of 5 on
    logits of standard deviation 5 multiplies the gradient by 1 - tanh^2 near 0, which repeats the
    kept logits' rounding: that costs another percent.
    """
    # In small tiles so many tokens take the blocked path minutes, and the test before has them. Of
    # these there are four by three, the last one ragged.
    set_sizes(blocked, TOKEN_CHUNK=512, VOCAB_BLOCK=192)
    tokens, hidden_size = 2048, 128
    inputs = head_inputs(tokens, hidden_size, V, dtype=torch.bfloat16, bias=True)
    truth = plain(inputs, torch.float64, softcap=softcap)
    again = run(inputs, torch.bfloat16, softcap=softcap)
    room = budget(share, torch.bfloat16, tokens)
    kept = run(inputs, torch.bfloat16, softcap=softcap, keep_logits_bytes=room)
    for ours, theirs in zip(kept[:3], again[:3], strict=True):
        assert torch.equal(ours, theirs)  # the results do not know what is kept
    rounded = from_rounded_dlogits(inputs, softcap)
    most = 1.005 if softcap is None else 1.02
    for name, ours, other, true in zip(NAMES[3:], kept[3:], rounded, truth[3:], strict=True):
        assert error(ours, true) <= most * error(other, true), name


@pytest.mark.usefixtures("served")
@shares
@dtypes
def test_banned_tokens_stay_banned(dtype: torch.dtype, share: int) -> None:
    """-inf times a probability of 0, in the gradient of an entropy, would be NaN."""
    inputs = head_inputs(N, D, V, dtype=dtype, bias=True)
    assert inputs.bias is not None
    bias = inputs.bias.clone()
    bias[:200] = -torch.inf  # the first columns altogether, so that a maximum is one of nothing
    bias[230::3] = -torch.inf
    targets = 200 + inputs.targets % 30
    banned = replace(inputs, bias=bias, targets=targets)
    again = run(banned, dtype)
    kept = run(banned, dtype, keep_logits_bytes=budget(share, dtype))
    truth = plain(banned, torch.float64)
    of_plain = plain(banned, dtype)
    for name, ours, theirs, true, other in zip(NAMES, kept, again, truth, of_plain, strict=True):
        assert ours.isfinite().all() and theirs.isfinite().all(), name
        assert_close_to_truth(ours, true, other, name)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("share", [1, 3])
@dtypes
def test_weight_grad(dtype: torch.dtype, share: int) -> None:
    inputs = head_inputs(N, D, V, dtype=dtype)
    found = []
    for keep in (0, budget(share, dtype)):
        copy = inputs.in_dtype(dtype)
        buffer = torch.ones(V, D)
        linear_logprobs(
            copy.hidden, copy.weight, copy.targets, weight_grad=buffer, keep_logits_bytes=keep
        ).backward(copy.coefficients)
        assert copy.weight.grad is None and copy.hidden.grad is not None
        found.append((buffer - 1, copy.hidden.grad))
    truth, of_plain = (plain_gradients(inputs, kind) for kind in (torch.float64, dtype))
    for ours, true, other in zip(found[1], truth, of_plain, strict=True):
        rounded = ours if ours.dtype == dtype else ours.to(dtype)
        assert_close_to_truth(rounded, true, other)


def plain_gradients(inputs: HeadInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of weight and hidden."""
    copy = inputs.in_dtype(dtype)
    logprobs, _, _ = plain_linear_logprobs(copy.hidden, copy.weight, copy.targets)
    logprobs.backward(copy.coefficients.to(logprobs.dtype))
    assert copy.weight.grad is not None and copy.hidden.grad is not None
    return copy.weight.grad, copy.hidden.grad


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("share", [1, 3])
def test_a_second_backward_pass_finds_the_same_numbers(share: int) -> None:
    copy = head_inputs(N, D, V, dtype=torch.bfloat16).in_dtype(torch.bfloat16)
    keep = budget(share, torch.bfloat16)
    logprobs = linear_logprobs(copy.hidden, copy.weight, copy.targets, keep_logits_bytes=keep)
    leaves = copy.hidden, copy.weight
    first = torch.autograd.grad(logprobs, leaves, copy.coefficients, retain_graph=True)
    second = torch.autograd.grad(logprobs, leaves, copy.coefficients)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("share", [1, 3])
@dtypes
def test_rows_ignored_since_the_forward_pass(dtype: torch.dtype, share: int) -> None:
    """Rows are kept by their place, so a backward pass may leave out others."""
    inputs = head_inputs(N, D, V, dtype=dtype, ignored=True)
    head = inputs.head()
    results = torch.ops.agro.linear_logprobs_fwd(*head, False, budget(share, dtype))
    logprobs, lse, entropy, *kept = results
    fewer = head._replace(targets=head.targets.clone())
    fewer.targets[5:20] = -100
    masks = [True, True, False]
    upstream = logprobs.cos(), None, None

    def gradients(*of_forward: Tensor | None) -> list[Tensor]:
        found = torch.ops.agro.linear_logprobs_bwd(
            *upstream, *fewer, lse, entropy, masks, *of_forward
        )
        return list(found[:2])

    inputs = replace(inputs, targets=fewer.targets, coefficients=upstream[0])
    true, other = (plain_gradients(inputs, kind)[::-1] for kind in (torch.float64, dtype))
    for name, *tensors in zip(("dhidden", "dweight"), gradients(*kept), true, other, strict=True):
        ours, truth, of_plain = tensors
        assert ours.isfinite().all()
        rows = fewer.targets != -100
        if name == "dhidden":
            assert (ours[~rows] == 0).all()
            ours, truth, of_plain = ours[rows], truth[rows], of_plain[rows]
        assert_close_to_truth(ours, truth, of_plain, name)


# --- Every op that takes it -----------------------------------------------------------------------


def test_every_head_op_takes_it() -> None:
    """And gives in fp32, where what is kept is fp32, what it gives without."""
    inputs = head_inputs(N, D, V)
    cu_seqlens = torch.tensor([0, 9, 20, 30, N])
    rows = (torch.tensor([1.0, 0.0, 1.0, 0.5]), torch.tensor([0, 0, 1, 1]), cu_seqlens)
    module = LogprobHead(D, V)

    def loss(copy: HeadInputs, keep: int | str) -> Tensor:
        arguments = copy.hidden, copy.weight, copy.targets
        module.weight = torch.nn.Parameter(copy.weight.detach())
        stats = module(copy.hidden, copy.targets, keep_logits_bytes=keep)
        summed = weighted_logprob_sum(*arguments, copy.coefficients, keep_logits_bytes=keep)
        known = weighted_logprob_sum(
            *arguments, copy.coefficients, lse=stats.lse.detach(), keep_logits_bytes=keep
        )
        agro = linear_agro_loss(*arguments, torch.zeros(N), *rows, beta=0.3, keep_logits_bytes=keep)
        return stats.logprobs.sum() + summed + known + agro

    found = []
    for keep in (0, "auto"):
        copy = inputs.in_dtype(torch.float32)
        value = loss(copy, keep)
        found.append((value.detach(), *torch.autograd.grad(value, (copy.hidden, copy.weight))))
    assert torch.equal(found[0][0], found[1][0])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_is_refused_without_targets() -> None:
    module = LogprobHead(D, V)
    with pytest.raises(ValueError, match="keep_logits_bytes: expected together with targets"):
        module(torch.zeros(3, D), keep_logits_bytes=100)
