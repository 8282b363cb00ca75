"""The native CPU ops against float64, on every instruction set that this CPU can run.

The functions are called as the dispatcher calls them. What a call must not depend on (threads,
neighbours, N, layout) is compared bit by bit.
"""

import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agro_kernels import weighted_logprob_sum
from agro_kernels._cpu import linear_logprobs as cpu
from agro_kernels._cpu import native
from agro_kernels.backward import Backward
from agro_kernels.head import Head, Upstream
from tests.kernels import fuzz_linear_logprobs as fuzz
from tests.kernels.isas import ISAS, LIBRARY, chosen
from tests.kernels.shapes import DTYPES
from tests.numerics import HeadInputs, assert_close_to_truth, head_inputs, plain_linear_logprobs

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
ROOT = Path(__file__).parents[2]
# Tile aligned, every dimension odd, tiny, several vocabulary blocks, one token, one word, no token.
SHAPES = [
    (64, 64, 384),
    (37, 53, 301),
    (2, 1, 3),
    (5, 16, 1000),
    (1, 33, 65),
    (3, 4, 1),
    (0, 8, 16),
]
NAMES = ("logprobs", "lse", "entropy", "dhidden", "dweight", "dbias")
ALL = [True, True, True]


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def head_of(inputs: HeadInputs, *, temperature: float | Tensor = 1.0, **options: Any) -> Head:
    """With the temperatures in the dtype and layout that they are given in."""
    head = inputs.head(temperature=temperature, **options)
    return head._replace(token_temperature=temperature) if isinstance(temperature, Tensor) else head


def upstream(n: int) -> list[Tensor]:
    """Gradients of logprobs, lse and entropy, each (N,)."""
    generator = torch.Generator().manual_seed(7)
    return list(torch.randn(3, n, generator=generator))


def by_native(inputs: HeadInputs, **options: Any) -> list[Tensor]:
    """logprobs, lse, entropy and the gradients by `upstream`."""
    return results_of(head_of(inputs, **options))


def results_of(head: Head) -> list[Tensor]:
    logprobs, lse, entropy = cpu.linear_logprobs_fwd(head, True)
    asked = [True, True, head.bias is not None]
    gradients = cpu.linear_logprobs_bwd(
        Backward(Upstream(*upstream(len(lse)), lse, entropy), head, asked)
    )
    return [logprobs, lse, entropy, *gradients[: 2 + (head.bias is not None)]]


def by_plain_torch(
    inputs: HeadInputs, dtype: torch.dtype, **options: float | Tensor | None
) -> list[Tensor]:
    """The same in plain torch."""
    copy = inputs.in_dtype(dtype)
    results = plain_linear_logprobs(
        copy.hidden, copy.weight, copy.targets, bias=copy.bias, **options
    )
    loss = sum((r * u).sum() for r, u in zip(results, upstream(len(results[0])), strict=True))
    gradients = torch.autograd.grad(loss, copy.leaves)
    return [result.detach() for result in (*results, *gradients)]


def known_form(
    inputs: HeadInputs, lse: Tensor | None, **options: float | Tensor | None
) -> list[Tensor]:
    """total and its gradients from the known-coefficients form."""
    leaves = [
        None if t is None else t.detach().requires_grad_()
        for t in (inputs.hidden, inputs.weight, inputs.bias)
    ]
    hidden, weight, bias = leaves
    total = weighted_logprob_sum(
        hidden, weight, inputs.targets, inputs.coefficients, lse=lse, bias=bias, **options
    )
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [total.detach(), *torch.autograd.grad(total, wanted)]


@dataclass(frozen=True)
class Expected:
    """What inputs and options should give: made once for all instruction sets."""

    inputs: HeadInputs
    options: dict[str, float | Tensor | None]
    truth: list[Tensor]  # by NAMES
    plain: list[Tensor]  # statistics of half precision inputs unrounded
    known: tuple[
        list[Tensor], list[Tensor]
    ]  # gradients of the known-coefficients form: truth, plain


def expectation(inputs: HeadInputs, **options: float | Tensor | None) -> Expected:
    dtype = inputs.hidden.dtype
    leaves = [inputs.hidden, inputs.weight] + ([] if inputs.bias is None else [inputs.bias])
    known: list[list[Tensor]] = []
    for at in (torch.float64, dtype):
        parts = [t.to(at).clone().requires_grad_() for t in leaves]
        bias = parts[2] if inputs.bias is not None else None
        logprobs = plain_linear_logprobs(*parts[:2], inputs.targets, bias=bias, **options)[0]
        loss = (logprobs * inputs.coefficients).sum()
        known.append(list(torch.autograd.grad(loss, parts)))
    unrounded = by_plain_torch(inputs, torch.float32, **options)[:3]
    plain = unrounded + by_plain_torch(inputs, dtype, **options)[3:]
    truth = by_plain_torch(inputs, torch.float64, **options)
    return Expected(inputs, options, truth, plain, (known[0], known[1]))


@functools.cache
def expected_of_shape(shape: tuple[int, int, int], dtype: torch.dtype) -> Expected:
    return expectation(head_inputs(*shape, dtype=dtype))


@functools.cache
def expected_of_options(dtype: torch.dtype, softcap: float | None, temperature: str) -> Expected:
    inputs = head_inputs(37, 53, 301, dtype=dtype, bias=True, ignored=True)
    value = 0.6 if temperature == "scalar" else torch.linspace(0.5, 2.0, 37)
    return expectation(inputs, softcap=softcap, temperature=value)


def assert_as_expected(expected: Expected) -> None:
    """Every result of both forms under the law."""
    inputs, options, dtype = expected.inputs, expected.options, expected.inputs.hidden.dtype
    ours = by_native(inputs, **options)
    for name, a, b, c in zip(NAMES, ours, expected.truth, expected.plain, strict=False):
        assert a.dtype == (torch.float32 if name in NAMES[:3] else dtype), name
        assert_close_to_truth(a, b, c, name)
    for lse in (None, ours[1]):
        _, *gradients = known_form(inputs, lse, **options)
        for name, a, b, c in zip(NAMES[3:], gradients, *expected.known, strict=False):
            assert_close_to_truth(a, b, c, f"{name} of the known-coefficients form")


# --- Closeness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-D{}-V{}".format(*s))
def test_matches_truth(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_as_expected(expected_of_shape(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["nocap", "softcap"])
@pytest.mark.parametrize("temperature", ["scalar", "per-token"])
def test_options_match_truth(
    isa: str, dtype: torch.dtype, softcap: float | None, temperature: str
) -> None:
    assert_as_expected(expected_of_options(dtype, softcap, temperature))


def test_total_is_the_sum_of_the_terms(isa: str) -> None:
    inputs = head_inputs(37, 53, 301, bias=True, ignored=True)
    _logprobs, lse, _ = by_native(inputs)[:3]
    truth = by_plain_torch(inputs, torch.float64)
    plain = by_plain_torch(inputs, torch.float32)
    c = inputs.coefficients.double()
    terms = (c * truth[0]).abs().sum() + (c * truth[1]).abs().sum()
    error = (c * (plain[0] - truth[0])).abs().sum()
    pair = torch.stack([c @ truth[0], terms])
    for cached in (None, lse):
        total = known_form(inputs, cached)[0]
        assert total.shape == () and total.dtype == torch.float32
        assert_close_to_truth(
            torch.stack([total.double(), terms]).float(), pair, pair + error, "total"
        )


@functools.cache
def peaky(dtype: torch.dtype) -> tuple[HeadInputs, list[Tensor], list[Tensor]]:
    """(inputs with logits of standard deviation 5, truth, plain torch in fp32)."""
    inputs = head_inputs(128, 576, 3072, dtype=dtype)
    inputs = replace(inputs, weight=(inputs.weight.double() * (5.0 / 3.0)).to(dtype))
    spread = (inputs.hidden.double() @ inputs.weight.double().T).std()
    assert 4.5 < spread < 5.5
    return inputs, by_plain_torch(inputs, torch.float64), by_plain_torch(inputs, torch.float32)


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errors_stay_below_the_promise(isa: str, dtype: torch.dtype) -> None:
    inputs, truth, _ = peaky(dtype)
    ours = by_native(inputs)
    assert float((ours[0] - truth[0]).abs().max()) <= 2e-5
    assert relative(ours[3], truth[3]) <= 2.5e-3
    assert relative(ours[4], truth[4]) <= 2.5e-3


def test_fp32_errors_are_those_of_plain_torch(isa: str) -> None:
    inputs, truth, plain = peaky(torch.float32)
    for name, a, b, c in zip(NAMES, by_native(inputs), truth, plain, strict=False):
        assert relative(a, b) <= 1.5 * relative(c, b), name


@pytest.mark.parametrize("offset", [1e4, -1e4, -150.0])
def test_shifted_logits_match_truth(isa: str, offset: float) -> None:
    inputs = head_inputs(20, 16, 150, bias=True)
    shifted = replace(inputs, bias=inputs.bias + offset)
    ours = by_native(shifted)
    truth = by_plain_torch(shifted, torch.float64)
    plain = by_plain_torch(shifted, torch.float32)
    # The forward pass keeps its digits; the backward pass knows lse as one fp32 number, so its
    # probabilities are as good as those of exp(logits - logits.logsumexp()).
    for name, a, b, c in zip(NAMES[:3], ours, truth, plain, strict=False):
        assert_close_to_truth(a, b, c, name)
    case = replace(fuzz.random_case(0, ISAS), **as_case(shifted))
    from_lse = fuzz.by_torch(case, torch.float32, from_lse=True)[0]
    for name, a, b, c in zip(NAMES[3:], ours[3:], truth[3:], from_lse[3:], strict=True):
        assert_close_to_truth(a, b, c, name)


def as_case(inputs: HeadInputs) -> dict[str, object]:
    """The fields of a fuzz.Case for `by_native(inputs)`."""
    return {
        "hidden": inputs.hidden,
        "weight": inputs.weight,
        "targets": inputs.targets,
        "bias": inputs.bias,
        "temperature": 1.0,
        "token_temperature": None,
        "softcap": 0.0,
        "ignore_index": -100,
        "upstream": upstream(len(inputs.targets)),
        "coefficients": inputs.coefficients,
    }


def test_one_hot_distributions_match_truth(isa: str) -> None:
    inputs = head_inputs(20, 16, 150)
    assert_as_expected(expectation(replace(inputs, hidden=inputs.hidden * 20)))


def test_random_cases_match_truth() -> None:
    for number in range(200):
        case = fuzz.random_case(number, ISAS)
        try:
            fuzz.check(case)
        except AssertionError as error:
            raise AssertionError(case.summary) from error


# --- exp and tanh ---------------------------------------------------------------------------------


def call_elementwise(name: str, x: Tensor) -> Tensor:
    y = torch.full_like(x, torch.nan)
    assert LIBRARY is not None
    getattr(LIBRARY, name)(x.data_ptr(), y.data_ptr(), len(x))
    return y


def ulp(values: Tensor) -> Tensor:
    """Distance to the next larger fp32 of each positive normal number, in float64."""
    return torch.exp2(values.abs().log2().floor() - 23.0)


def floats_between(low: float, high: float, step: int) -> Tensor:
    """Every step-th fp32 from low to high, both of one sign."""
    bits = torch.tensor([low, high]).view(torch.int32).sort().values
    return torch.arange(int(bits[0]), int(bits[1]) + 1, step, dtype=torch.int32).view(torch.float32)


def test_exp_errs_by_at_most_one_ulp_over_its_whole_range(isa: str) -> None:
    x = torch.cat(
        [floats_between(-87.33, -1e-30, 769), floats_between(1e-30, 88.72, 769), torch.zeros(1)]
    )
    truth = x.double().exp()
    assert truth.min() >= 2.0**-126 and truth.max() < 3.4028235e38  # normal numbers
    y = call_elementwise("agro_exp", x)
    assert float(((y.double() - truth).abs() / ulp(truth)).max()) <= 1.0


def test_exp_at_its_ends(isa: str) -> None:
    below = torch.tensor([-87.4, -100.0, -1e4, -3e38, -torch.inf])
    y = call_elementwise("agro_exp", below)
    assert torch.all((y == 0.0) | ((y - below.exp()).abs() <= 2.0**-126))
    assert torch.equal(y[1:], torch.zeros(4))
    assert call_elementwise("agro_exp", torch.zeros(1)).item() == 1.0
    assert call_elementwise("agro_exp", torch.tensor([-0.0])).item() == 1.0
    assert call_elementwise("agro_exp", torch.tensor([torch.nan])).isnan().all()


def test_exp_never_falls_where_its_argument_grows(isa: str) -> None:
    x = floats_between(-20.0, -1e-3, 997).sort().values
    assert (call_elementwise("agro_exp", x).diff() >= 0).all()


def test_tanh_errs_by_at_most_two_ulp(isa: str) -> None:
    x = torch.cat([floats_between(1e-30, 1e4, 769), -floats_between(1e-30, 1e4, 769)])
    truth = x.double().tanh()
    y = call_elementwise("agro_tanh", x)
    assert float(((y.double() - truth).abs() / ulp(truth)).max()) <= 2.0
    ends = call_elementwise("agro_tanh", torch.tensor([0.0, torch.inf, -torch.inf, torch.nan]))
    assert ends[:3].tolist() == [0.0, 1.0, -1.0] and ends[3].isnan()


# --- Bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_does_not_depend_on_threads_or_neighbours(
    isa: str, dtype: torch.dtype, threads: None
) -> None:
    inputs = head_inputs(300, 40, 700, dtype=dtype, bias=True)

    def forward(rows: slice | Tensor) -> list[Tensor]:
        taken = replace(inputs, hidden=inputs.hidden[rows], targets=inputs.targets[rows])
        return list(cpu.linear_logprobs_fwd(taken.head(temperature=0.7, softcap=20.0), True))

    torch.set_num_threads(2)
    together = forward(slice(None))
    for num_threads in (1, 3, 7):
        torch.set_num_threads(num_threads)
        for ours, expected in zip(forward(slice(None)), together, strict=True):
            assert torch.equal(ours, expected)
    torch.set_num_threads(2)
    shuffled = torch.randperm(300)
    some = [slice(i, i + 1) for i in (0, 31, 299)] + [slice(i, i + 5) for i in (0, 14, 60, 295)]
    for rows in [*some, slice(3, 20), slice(1, 98), shuffled]:
        for ours, expected in zip(forward(rows), together, strict=True):
            assert torch.equal(ours, expected[rows]), rows


def test_row_does_not_depend_on_ignored_rows_between(isa: str) -> None:
    inputs = head_inputs(100, 40, 300, ignored=True)
    counted = inputs.targets != -100
    between = cpu.linear_logprobs_fwd(inputs.head(), True)
    kept = replace(inputs, hidden=inputs.hidden[counted], targets=inputs.targets[counted])
    alone = cpu.linear_logprobs_fwd(kept.head(), True)
    for ours, expected in zip(between, alone, strict=True):
        assert torch.equal(ours[counted], expected)
        assert torch.equal(ours[~counted], torch.zeros(int((~counted).sum())))


def test_row_does_not_depend_on_n_above_a_token_chunk(isa: str) -> None:
    expected_of_all = expected_of_shape((4500, 3, 70), torch.float32)
    head = expected_of_all.inputs.head()
    many = cpu.linear_logprobs_fwd(head, True)
    few = cpu.linear_logprobs_fwd(head.part(slice(4000, 4100)), True)
    for ours, expected in zip(many, few, strict=True):
        assert torch.equal(ours[4000:4100], expected)
    assert_as_expected(expected_of_all)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_gradients_repeat(isa: str, dtype: torch.dtype, num_threads: int, threads: None) -> None:
    inputs = head_inputs(90, 40, 1300, dtype=dtype, bias=True)
    torch.set_num_threads(num_threads)
    first = by_native(inputs) + known_form(inputs, None)
    for _ in range(3):
        again = by_native(inputs) + known_form(inputs, None)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_gradients_are_the_same_for_four_threads_and_more(isa: str, threads: None) -> None:
    # More than one slice of tokens, which many threads take one after the other, and more than one
    # piece of D.
    inputs = head_inputs(600, 300, 1500, bias=True)
    torch.set_num_threads(4)
    four = by_native(inputs)
    for num_threads in (5, 8):
        torch.set_num_threads(num_threads)
        for name, a, b in zip(NAMES, by_native(inputs), four, strict=True):
            assert torch.equal(a, b), name


def test_concurrent_calls_give_the_same_bits(isa: str) -> None:
    inputs = head_inputs(70, 40, 900, bias=True)
    expected = by_native(inputs)
    failures: list[str] = []

    def work() -> None:
        for _ in range(5):
            for name, a, b in zip(NAMES, by_native(inputs), expected, strict=True):
                if not torch.equal(a, b):
                    failures.append(name)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_other_python_threads_run_during_a_call(threads: None) -> None:
    inputs = head_inputs(256, 256, 4096)
    torch.set_num_threads(1)
    ticks = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(1e-4)

    with chosen("scalar"):  # long enough to count in
        worker = threading.Thread(target=count)
        worker.start()
        while ticks == 0:
            time.sleep(1e-4)
        before, began = ticks, time.monotonic()
        by_native(inputs)
        counted, seconds = ticks - before, time.monotonic() - began
        stop.set()
        worker.join()
    # Outside the library there is time for a handful of ticks.
    assert seconds > 0.05
    assert counted > 50, f"{counted} in {seconds} s"


def test_new_process_uses_the_best_instruction_set_and_its_forked_child_can_call() -> None:
    program = (
        "import os, torch\n"
        "from tests.kernels.test_cpu_linear_logprobs import by_native, head_inputs\n"
        "from tests.kernels.test_cpu_linear_logprobs import ISAS, LIBRARY\n"
        "assert LIBRARY.agro_isa().decode() == ISAS[0]\n"
        "torch.set_num_threads(2)\n"
        "inputs = head_inputs(40, 30, 500)\n"
        "expected = by_native(inputs)\n"
        "def same():\n"
        "    return all(torch.equal(a, b) for a, b in zip(by_native(inputs), expected))\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(0 if same() else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "assert same()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "AGRO_CPU_ISA"}
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, env=environment, timeout=60
    )


# --- What is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_every_output_mask(isa: str, mask: list[int]) -> None:
    inputs = head_inputs(37, 53, 301, bias=True)
    head = inputs.head()
    asked = [bool(one) for one in mask]
    _logprobs, lse, entropy = cpu.linear_logprobs_fwd(head, True)
    everything = cpu.linear_logprobs_bwd(Backward(Upstream(*upstream(37), lse, entropy), head, ALL))
    some = cpu.linear_logprobs_bwd(Backward(Upstream(*upstream(37), lse, entropy), head, asked))
    for ours, expected, wanted in zip(some, everything, asked, strict=True):
        assert ours.shape == (expected.shape if wanted else (0,))
        assert torch.equal(ours, expected[: len(ours)] if wanted else expected.new_empty(0))


@pytest.mark.parametrize("given", [[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_missing_upstream_is_zero(isa: str, given: list[int]) -> None:
    inputs = head_inputs(37, 53, 301)
    head = inputs.head()
    _, lse, entropy = cpu.linear_logprobs_fwd(head, True)
    some = [u if one else None for u, one in zip(upstream(37), given, strict=True)]
    zeros = [u * one for u, one in zip(upstream(37), given, strict=True)]
    ours = cpu.linear_logprobs_bwd(Backward(Upstream(*some, lse, entropy), head, ALL))
    expected = cpu.linear_logprobs_bwd(Backward(Upstream(*zeros, lse, entropy), head, ALL))
    for name, a, b in zip(NAMES[3:], ours, expected, strict=True):
        if not any(given):
            assert torch.equal(a, torch.zeros_like(a)), name
        assert_close_to_truth(a, b.double(), b, name)


def test_entropy_is_not_made_unless_asked_for(isa: str) -> None:
    inputs = head_inputs(37, 53, 301)
    with_entropy = cpu.linear_logprobs_fwd(inputs.head(), True)
    without = cpu.linear_logprobs_fwd(inputs.head(), False)
    assert without[2].shape == (0,)
    assert torch.equal(without[0], with_entropy[0])
    assert torch.equal(without[1], with_entropy[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_grad_is_added_to_in_fp32(isa: str, dtype: torch.dtype) -> None:
    inputs = head_inputs(37, 53, 301, dtype=dtype, bias=True)
    _, lse, entropy = cpu.linear_logprobs_fwd(inputs.head(), True)
    held = torch.randn(301, 53, generator=torch.Generator().manual_seed(1))
    truth = by_plain_torch(inputs, torch.float64)[4] + held
    # In half precision the gradient of the logits is rounded on its way into the product.
    plain = by_plain_torch(inputs, dtype)[4].float() + held
    for weight_grad in (held.clone(), held.T.contiguous().T):
        arguments = Upstream(*upstream(37), lse, entropy), inputs.head()
        gradients = cpu.linear_logprobs_bwd(Backward(*arguments, ALL, weight_grad))
        assert gradients[1].shape == (0,)
        assert_close_to_truth(weight_grad, truth, plain, "weight_grad")
        before = weight_grad.clone()
        cpu.linear_logprobs_bwd(Backward(*arguments, [True, False, True], weight_grad))
        assert torch.equal(weight_grad, before)


# --- Banned, ignored, empty -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_banned_tokens_equal_a_vocabulary_without_them(isa: str, dtype: torch.dtype) -> None:
    inputs = head_inputs(20, 16, 500, dtype=dtype, bias=True)
    bias = inputs.bias.clone()
    bias[:270] = -torch.inf  # more than a whole vocabulary block
    bias[300::7] = -torch.inf
    banned = bias == -torch.inf
    allowed = (~banned).nonzero().squeeze(1)
    targets = allowed[inputs.targets % len(allowed)]
    inputs = replace(inputs, bias=bias, targets=targets)
    kept = replace(
        inputs,
        weight=inputs.weight[allowed],
        bias=bias[allowed],
        targets=torch.searchsorted(allowed, targets),
    )
    for name, ours, truth, plain in zip(
        NAMES,
        by_native(inputs),
        by_plain_torch(kept, torch.float64),
        by_plain_torch(kept, dtype),
        strict=True,
    ):
        if name in ("dweight", "dbias"):
            assert torch.equal(ours[banned], torch.zeros_like(ours[banned])), name
            ours = ours[allowed]
        assert_close_to_truth(ours, truth, plain, name)


def test_banned_target_has_logprob_minus_infinity_and_no_nan_elsewhere(isa: str) -> None:
    inputs = head_inputs(20, 16, 150, bias=True)
    bias = inputs.bias.clone()
    bias[3] = -torch.inf
    targets = inputs.targets.where(inputs.targets != 3, 4)
    before = by_native(replace(inputs, bias=bias, targets=targets))
    targets = targets.clone()
    targets[[0, 5]] = 3
    swapped = replace(inputs, bias=bias, targets=targets)
    ours = by_native(swapped)
    hit = targets == 3
    assert torch.equal(ours[0] == -torch.inf, hit)
    assert torch.equal(ours[0][~hit], before[0][~hit])
    assert all(result.isfinite().all() for result in ours[1:])
    total, *gradients = known_form(swapped, ours[1])
    assert total.isinf()
    assert all(result.isfinite().all() for result in gradients)


def test_row_with_every_token_banned(isa: str) -> None:
    inputs = head_inputs(5, 16, 150, bias=True)
    banned = replace(inputs, bias=torch.full((150,), -torch.inf))
    logprobs, lse, entropy = cpu.linear_logprobs_fwd(banned.head(), True)
    assert torch.equal(lse, torch.full((5,), -torch.inf))
    assert logprobs.isnan().all() and entropy.isnan().all()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_ignored_rows_give_exact_zeros_whatever_they_hold(isa: str, garbage: float) -> None:
    inputs = head_inputs(40, 16, 150, bias=True, ignored=True)
    ignored = inputs.targets == -100
    hidden = inputs.hidden.masked_fill(ignored[:, None], garbage)
    coefficients = inputs.coefficients.masked_fill(ignored, garbage)
    coefficients[1] = 0.0
    filled = replace(inputs, hidden=hidden, coefficients=coefficients)
    ours = by_native(filled, temperature=torch.ones(40).masked_fill(ignored, garbage))
    for result in ours[:4]:
        assert torch.equal(result[ignored], torch.zeros_like(result[ignored]))
    assert all(result.isfinite().all() for result in ours)
    hidden = hidden.clone()
    hidden[1] = garbage  # its coefficient is 0
    left_out = ignored.clone()
    left_out[1] = True
    for lse in (None, ours[1].masked_fill(left_out, garbage)):
        total, *gradients = known_form(replace(filled, hidden=hidden), lse)
        assert torch.equal(gradients[0][left_out], torch.zeros(int(left_out.sum()), 16))
        assert all(result.isfinite().all() for result in (total, *gradients))


@pytest.mark.parametrize("n", [0, 3])
def test_no_counted_tokens_give_zeros(isa: str, n: int) -> None:
    inputs = HeadInputs(
        hidden=torch.full((n, 8), torch.nan),
        weight=torch.randn(70, 8),
        targets=torch.full((n,), -100),
        bias=torch.randn(70),
        coefficients=torch.ones(n),
    )
    for result in by_native(inputs) + known_form(inputs, None):
        assert torch.equal(result, torch.zeros_like(result))


def test_no_hidden_dimension_is_a_uniform_distribution(isa: str) -> None:
    """The kernels have an answer to what the public functions refuse."""
    narrow = HeadInputs(
        torch.ones(3, 1), torch.ones(8, 1), torch.tensor([1, 2, 7]), None, torch.ones(3)
    )
    head = narrow.head()._replace(hidden=torch.ones(3, 0), weight=torch.ones(8, 0))
    logprobs, lse, entropy, dhidden, dweight = results_of(head)
    log_8 = torch.tensor(8.0).log().expand(3)
    torch.testing.assert_close(logprobs, -log_8)
    torch.testing.assert_close(lse, log_8)
    torch.testing.assert_close(entropy, log_8)
    assert dhidden.shape == (3, 0) and dweight.shape == (8, 0)


# --- Layouts and types of the arguments -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*fuzz.LAYOUTS, "expanded"])
def test_layout_does_not_change_a_bit(isa: str, layout: str, dtype: torch.dtype) -> None:
    inputs = head_inputs(37, 53, 301, dtype=dtype)
    if layout == "expanded":
        hidden, weight = inputs.hidden[:1].expand(37, 53), inputs.weight[:1].expand(301, 53)
        inputs = replace(inputs, hidden=hidden.contiguous(), weight=weight.contiguous())
    else:
        generator = torch.Generator().manual_seed(0)
        hidden = fuzz.laid_out(inputs.hidden, layout, generator)
        weight = fuzz.laid_out(inputs.weight, layout, generator)
    ours = by_native(replace(inputs, hidden=hidden, weight=weight))
    for name, a, b in zip(NAMES, ours, by_native(inputs), strict=False):
        assert torch.equal(a, b), name
        assert a.is_contiguous(), name


def test_small_tensors_may_have_any_layout_and_integer_type(isa: str) -> None:
    inputs = head_inputs(37, 53, 301, bias=True)
    temperature = torch.linspace(0.5, 2.0, 37)

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(2)[::2]

    expected = by_native(inputs, temperature=temperature) + known_form(inputs, None)
    strided = HeadInputs(
        hidden=inputs.hidden,
        weight=inputs.weight,
        targets=spread(inputs.targets.int()),
        bias=spread(inputs.bias),
        coefficients=spread(inputs.coefficients.double()),
    )
    ours = by_native(strided, temperature=spread(temperature.double())) + known_form(strided, None)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    head = inputs.head()
    _, lse, entropy = cpu.linear_logprobs_fwd(head, True)
    ones = [torch.ones(37)] * 3
    expanded = [torch.ones(()).expand(37)] * 3
    expected = cpu.linear_logprobs_bwd(Backward(Upstream(*ones, lse, entropy), head, ALL))
    ours = cpu.linear_logprobs_bwd(
        Backward(Upstream(*expanded, spread(lse), spread(entropy)), head, ALL)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_inputs_are_left_as_they_are(isa: str) -> None:
    inputs = head_inputs(37, 53, 301, bias=True)
    before = [t.clone() for t in vars(inputs).values()]
    by_native(inputs)
    known_form(inputs, None)
    assert all(torch.equal(a, b) for a, b in zip(vars(inputs).values(), before, strict=True))


# --- Division of labour, and errors ---------------------------------------------------------------


@pytest.mark.parametrize("why", ["float64", "rounded", "kept"])
def test_the_torch_path_serves_the_rest(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: pytest.fail("the library must not be asked"))
    dtype = torch.float64 if why == "float64" else torch.float32
    inputs = head_inputs(7, 9, 33, dtype=dtype)
    head = inputs.head(
        round_logits="bf16" if why == "rounded" else None,
        kept_ids=torch.full((7, 1), -1) if why == "kept" else None,
    )
    logprobs, lse, _entropy = cpu.linear_logprobs_fwd(head, True)
    ones = torch.ones_like(logprobs)
    gradients = cpu.linear_logprobs_bwd(Backward(Upstream(ones, None, None, lse, None), head, ALL))
    assert all(result.isfinite().all() for result in (logprobs, *gradients))


@pytest.mark.parametrize("value", [-1, 33, 10**9])
def test_rejects_out_of_range_targets(value: int) -> None:
    inputs = head_inputs(7, 9, 33)
    head = inputs.head()
    _, lse, entropy = cpu.linear_logprobs_fwd(head, True)
    inputs.targets[3] = value
    message = rf"targets: expected token ids in \[0, 33\).*got {value} at position 3"
    with pytest.raises(ValueError, match=message):
        by_native(inputs)
    with pytest.raises(ValueError, match=message):
        known_form(inputs, None)
    with pytest.raises(ValueError, match=message):
        cpu.linear_logprobs_bwd(Backward(Upstream(*upstream(7), lse, entropy), head, ALL))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_rejects_token_temperatures_that_are_no_temperature(value: float) -> None:
    inputs = head_inputs(7, 9, 33)
    temperature = torch.ones(7)
    temperature[2] = value
    message = r"temperature: expected finite .* got .* at position 2"
    with pytest.raises(ValueError, match=message):
        by_native(inputs, temperature=temperature)
    with pytest.raises(ValueError, match=message):
        known_form(inputs, None, temperature=temperature)
