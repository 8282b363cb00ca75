"""Logits that the native CPU forward keeps for its backward, on every instruction set of this CPU.

Results do not change by a bit; gradients obey the law of `tests/numerics.py` as those do that are
made of logits computed again.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import agro_kernels
from agro_kernels._cpu import linear_logprobs as cpu
from agro_kernels.backward import Backward
from agro_kernels.head import Head, Upstream
from agro_kernels.kept_logits import CPU_TILE, KeptLogits, empty_kept_logits
from tests.kernels.isas import ISAS, chosen
from tests.kernels.test_cpu_linear_logprobs import (
    DTYPES,
    NAMES,
    by_plain_torch,
    expected_of_options,
    expected_of_shape,
    head_of,
    peaky,
    relative,
    upstream,
)
from tests.numerics import assert_close_to_truth, head_inputs

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
EVERYTHING = 2**40  # bytes
BLOCK = 192  # vocabulary entries that are kept together


def bytes_of_blocks(head: Head, blocks: int) -> int:
    """What that many whole blocks cost, with the maxima of their tiles."""
    return len(head.targets) * blocks * (BLOCK * head.hidden.element_size() + BLOCK // CPU_TILE * 4)


def forward(head: Head, keep_logits_bytes: int) -> tuple[list[Tensor], KeptLogits]:
    kept = empty_kept_logits(head, keep_logits_bytes)
    return list(cpu.linear_logprobs_fwd(head, True, kept)), kept


def backward(
    head: Head, results: list[Tensor], kept: KeptLogits | None, weight_grad: Tensor | None = None
) -> list[Tensor]:
    _, lse, entropy = results
    asked = [True, True, head.bias is not None]
    gradients = Upstream(*upstream(len(lse)), lse, entropy)
    return list(cpu.linear_logprobs_bwd(Backward(gradients, head, asked, weight_grad, kept)))


# --- Closeness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["nocap", "softcap"])
@pytest.mark.parametrize("temperature", ["scalar", "per-token"])
@pytest.mark.parametrize("blocks", [1, 2], ids=["part", "all"])
def test_options_match_truth(
    isa: str, dtype: torch.dtype, softcap: float | None, temperature: str, blocks: int
) -> None:
    """With bias, ignored rows, a ragged last block, and gradients of all three results."""
    expected = expected_of_options(dtype, softcap, temperature)
    options: dict[str, Any] = expected.options
    head = head_of(expected.inputs, **options)
    plain_results = cpu.linear_logprobs_fwd(head, True)
    results, kept = forward(head, bytes_of_blocks(head, blocks))
    assert kept.columns == (BLOCK if blocks == 1 else 301)
    for name, ours, other in zip(NAMES, results, plain_results, strict=False):
        assert torch.equal(ours, other), name
    for name, *three in zip(
        NAMES[3:],
        backward(head, results, kept),
        expected.truth[3:],
        expected.plain[3:],
        strict=True,
    ):
        assert_close_to_truth(*three, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 384), (5, 16, 1000), (1, 33, 65), (0, 8, 16)])
def test_shapes_match_truth(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    expected = expected_of_shape(shape, dtype)
    head = head_of(expected.inputs)
    results, kept = forward(head, EVERYTHING)
    assert kept.columns == shape[2]
    for name, *three in zip(
        NAMES[3:5],
        backward(head, results, kept),
        expected.truth[3:],
        expected.plain[3:],
        strict=False,
    ):
        assert_close_to_truth(*three, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errors_stay_below_the_promise(isa: str, dtype: torch.dtype) -> None:
    inputs, truth, _ = peaky(dtype)
    results, kept = forward(inputs.head(), EVERYTHING)
    dhidden, dweight, _ = backward(inputs.head(), results, kept)
    assert relative(dhidden, truth[3]) <= 2.5e-3
    assert relative(dweight, truth[4]) <= 2.5e-3


def test_fp32_errors_are_those_of_plain_torch(isa: str) -> None:
    inputs, truth, plain = peaky(torch.float32)
    results, kept = forward(inputs.head(), EVERYTHING)
    for name, *three in zip(
        NAMES[3:5], backward(inputs.head(), results, kept), truth[3:], plain[3:], strict=False
    ):
        ours, exact, theirs = three
        assert relative(ours, exact) <= 1.5 * relative(theirs, exact), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_banned_tokens_get_no_gradient_and_make_no_nan(isa: str, dtype: torch.dtype) -> None:
    inputs = head_inputs(40, 16, 500, dtype=dtype, bias=True)
    assert inputs.bias is not None
    bias = inputs.bias.clone()
    bias[:270] = -torch.inf  # more than a whole block
    bias[300::7] = -torch.inf
    banned = bias == -torch.inf
    allowed = (~banned).nonzero().squeeze(1)
    inputs = replace(inputs, bias=bias, targets=allowed[inputs.targets % len(allowed)])
    results, kept = forward(inputs.head(), EVERYTHING)
    ours = backward(inputs.head(), results, kept)
    again = backward(inputs.head(), results, None)
    for name, one, other in zip(NAMES[3:], ours, again, strict=True):
        assert one.isfinite().all(), name
        if name != "dhidden":
            assert torch.equal(one[banned], torch.zeros_like(one[banned])), name
        assert relative(one, other.double()) <= 4e-3, name


def test_many_tokens_and_few_dimensions_match_truth(isa: str) -> None:
    expected = expected_of_shape((4500, 3, 210), torch.bfloat16)  # more than two token chunks
    inputs = expected.inputs
    results, kept = forward(inputs.head(), EVERYTHING)
    for name, *three in zip(
        NAMES[3:5],
        backward(inputs.head(), results, kept),
        expected.truth[3:],
        expected.plain[3:],
        strict=False,
    ):
        assert_close_to_truth(*three, name)


# --- Bits -----------------------------------------------------------------------------------------


def test_nothing_kept_is_what_was_before(isa: str) -> None:
    inputs = head_inputs(37, 53, 301, bias=True)
    results, kept = forward(inputs.head(), 0)
    assert kept.columns == 0
    for one, other in zip(
        backward(inputs.head(), results, kept), backward(inputs.head(), results, None), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_backward_may_leave_out_other_rows_than_its_forward(isa: str, dtype: torch.dtype) -> None:
    """Runs of rows and single ones, so that panels start and end anywhere."""
    n = 150
    inputs = head_inputs(n, 40, 700, dtype=dtype, bias=True)
    for left_out in (slice(0, 32), slice(3, 70), slice(0, n, 3), slice(20, n), slice(0, n)):
        targets = inputs.targets.clone()
        targets[left_out] = -100
        fewer = replace(inputs, targets=targets).head()
        of_all, kept_of_all = forward(inputs.head(), EVERYTHING)
        of_fewer, kept_of_fewer = forward(fewer, EVERYTHING)
        for name, one, other in zip(
            NAMES[3:],
            backward(fewer, of_all, kept_of_all),
            backward(fewer, of_fewer, kept_of_fewer),
            strict=True,
        ):
            assert torch.equal(one, other), (left_out, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_more_threads_and_of_a_second_backward(isa: str, dtype: torch.dtype) -> None:
    inputs = head_inputs(90, 40, 1300, dtype=dtype, bias=True)
    before = torch.get_num_threads()
    found = []
    for threads in (4, 7):
        torch.set_num_threads(threads)
        results, kept = forward(inputs.head(), bytes_of_blocks(inputs.head(), 3))
        assert kept.columns == 3 * BLOCK
        held = [tensor.clone() for tensor in kept]
        found += [backward(inputs.head(), results, kept) for _ in range(2)]
        used = [held[0].nan_to_num(nan=1.0), held[1].nan_to_num(nan=1.0)]
        now = [kept[0].nan_to_num(nan=1.0), kept[1].nan_to_num(nan=1.0)]
        assert all(torch.equal(a, b) for a, b in zip(used, now, strict=True))
    torch.set_num_threads(before)
    for gradients in found[1:]:
        for name, one, other in zip(NAMES[3:], gradients, found[0], strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_read_what_others_wrote(dtype: torch.dtype) -> None:
    inputs = head_inputs(61, 40, 400, dtype=dtype, ignored=True)
    truth, plain = (by_plain_torch(inputs, at)[3:] for at in (torch.float64, dtype))
    for writer, reader in zip(ISAS, ISAS[1:] + ISAS[:1], strict=True):
        with chosen(writer):
            results, kept = forward(inputs.head(), EVERYTHING)
        with chosen(reader):
            ours = backward(inputs.head(), results, kept)
        for name, *three in zip(NAMES[3:5], ours, truth, plain, strict=False):
            assert_close_to_truth(*three, f"{name}, written by {writer}, read by {reader}")


# --- Through the public functions -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [0, 37 * BLOCK * 5, EVERYTHING, "auto"])
def test_public_function_with_any_budget(dtype: torch.dtype, budget: int | str) -> None:
    inputs = head_inputs(37, 53, 301, dtype=dtype, bias=True, ignored=True).in_dtype(dtype)
    truth, plain = (by_plain_torch(inputs, at)[3:] for at in (torch.float64, dtype))

    def results(**options: Any) -> list[Tensor]:
        logprobs, entropy, lse = agro_kernels.linear_logprobs_with_stats(
            inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, **options
        )
        return [logprobs, lse, entropy]

    kept, again = results(keep_logits_bytes=budget), results()
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    loss = (torch.stack(kept) * torch.stack(upstream(37))).sum()
    first = torch.autograd.grad(loss, inputs.leaves, retain_graph=True)
    second = torch.autograd.grad(loss, inputs.leaves)
    for name, one, other, *law in zip(NAMES[3:], first, second, truth, plain, strict=True):
        assert torch.equal(one, other), name
        assert_close_to_truth(one, *law, name)
    weight_grad = torch.zeros(301, 53)
    kept = results(keep_logits_bytes=budget, weight_grad=weight_grad)
    (torch.stack(kept) * torch.stack(upstream(37))).sum().backward()
    assert_close_to_truth(weight_grad, truth[1], plain[1].float(), "weight_grad")


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [5, 191, 384])
def test_the_library_refuses_part_of_a_block(columns: int) -> None:
    head = head_inputs(7, 9, 301).head()
    kept = KeptLogits(torch.empty(7, columns), torch.empty(7, 6))
    with pytest.raises(RuntimeError, match="refused their arguments"):
        cpu.linear_logprobs_fwd(head, True, kept)
