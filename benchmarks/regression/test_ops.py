"""The ops and the coefficients on small shapes, each beside the run that was saved last.

    make regression

The first run has nothing to compare with; its numbers are kept in .benchmarks. Numbers of two
machines do not compare: pytest-benchmark keeps them apart. What is compared is the minimum; a
slowdown below a tenth is noise. These are no tests, so `make test` leaves them out.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from agro_kernels import (
    agro_coefficients,
    agro_loss,
    linear_logprobs,
    linear_logprobs_with_entropy,
    selective_logprobs,
    weighted_logprob_sum,
)

pytest.importorskip("pytest_benchmark", reason="pip install '.[dev]'")

N, D, V = 512, 512, 16384
GROUPS, SIZE, LENGTH = 32, 8, 64  # of a step: prompts, completions of each, tokens of those
DTYPES = [torch.float32, torch.bfloat16]
HEADS = {"linear_logprobs": linear_logprobs, "with_entropy": linear_logprobs_with_entropy}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
Benchmark = Any  # pytest-benchmark's fixture


def head_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=draw).to(dtype)
    weight = (torch.randn(V, D, generator=draw) / D**0.5).to(dtype)
    return hidden, weight, torch.randint(V, (N,), generator=draw)


def total(results: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    together = results if isinstance(results, tuple) else (results,)
    return torch.stack([each.sum() for each in together]).sum()


def timed(benchmark: Benchmark, function: Callable[[], object]) -> None:
    benchmark.pedantic(function, rounds=7, warmup_rounds=2)


@dtypes
@heads
def test_forward(benchmark: Benchmark, head: Callable[..., Any], dtype: torch.dtype) -> None:
    inputs = head_inputs(dtype)
    timed(benchmark, lambda: head(*inputs))


@dtypes
@heads
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen_weight"])
def test_forward_and_backward(
    benchmark: Benchmark, head: Callable[..., Any], dtype: torch.dtype, frozen: bool
) -> None:
    hidden, weight, targets = head_inputs(dtype)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)

    def step() -> None:
        hidden.grad = weight.grad = None
        total(head(hidden, weight, targets)).backward()

    timed(benchmark, step)


@dtypes
def test_known_coefficients(benchmark: Benchmark, dtype: torch.dtype) -> None:
    hidden, weight, targets = head_inputs(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    coefficients = torch.randn(N, generator=torch.Generator().manual_seed(1))

    def step() -> None:
        hidden.grad = weight.grad = None
        weighted_logprob_sum(hidden, weight, targets, coefficients).backward()

    timed(benchmark, step)


@dtypes
def test_selective_logprobs(benchmark: Benchmark, dtype: torch.dtype) -> None:
    hidden, weight, targets = head_inputs(dtype)
    logits = (hidden @ weight.T).requires_grad_()

    def step() -> None:
        logits.grad = None
        selective_logprobs(logits, targets).sum().backward()

    timed(benchmark, step)


def sequences() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    rows = GROUPS * SIZE
    return {
        "rewards": torch.rand(rows, generator=draw),
        "logprobs": -torch.rand(rows, generator=draw),
        "ref_logprobs": -torch.rand(rows, generator=draw),
        "groups": torch.arange(GROUPS).repeat_interleave(SIZE),
    }


def test_agro_coefficients(benchmark: Benchmark) -> None:
    rows = sequences()
    timed(benchmark, lambda: agro_coefficients(**rows, beta=0.01))


def test_agro_loss(benchmark: Benchmark) -> None:
    rows = sequences()
    of_tokens = {
        name: rows.pop(name).repeat_interleave(LENGTH) / LENGTH for name in list(rows)[1:3]
    }
    logprobs = of_tokens.pop("logprobs").requires_grad_()
    cu_seqlens = torch.arange(GROUPS * SIZE + 1, dtype=torch.int32) * LENGTH

    def step() -> None:
        logprobs.grad = None
        agro_loss(logprobs, cu_seqlens=cu_seqlens, **of_tokens, **rows, beta=0.01).backward()

    timed(benchmark, step)
