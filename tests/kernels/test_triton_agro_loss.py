"""The Triton kernels of the AGRO ops against the torch path: interpreted, or run on a GPU."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not available on this platform")

from agro_kernels._torch import agro_loss as torch_path
from agro_kernels._triton import agro_loss as kernels
from agro_kernels.agro_loss import agro_coefficients, agro_loss
from tests.kernels.test_agro_loss import BETA, OPTIONS, Batch
from tests.numerics import assert_close_to_truth

options = pytest.mark.parametrize("name", OPTIONS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that eighteen sequences and forty tokens take several blocks of everything."""
    for name, size in {"BLOCK_T": 4, "BLOCK_I": 4, "BLOCK_J": 8, "BLOCK_B": 8}.items():
        monkeypatch.setattr(kernels, name, size)


def on_device(values: tuple) -> tuple:
    return tuple(v.to(DEVICE) if isinstance(v, Tensor) else v for v in values)


def assert_same(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """Both are float64 inside and differ by the order of their sums only."""
    for value, expected in zip(ours, exact, strict=True):
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value.cpu(), expected.cpu(), rtol=1e-12, atol=1e-14)


def spoiled(batch: Batch) -> Batch:
    """With invalid rows of every kind, one of which leaves its group too small."""
    batch.rewards[0] = math.nan
    batch.logprobs[batch.cu_seqlens[3]] = -math.inf
    batch.ref_logprobs[batch.cu_seqlens[5]] = -math.inf
    batch.weights[7], batch.weights[8] = -1.0, math.inf
    return batch


@options
@pytest.mark.parametrize("prepare", [lambda batch: batch, spoiled], ids=["valid", "invalid-rows"])
def test_coefficients_match_torch_path(name: str, prepare) -> None:
    batch = prepare(Batch())
    arguments = (*batch.sums, *batch.op_options(name))
    ours = kernels.agro_coefficients(*on_device(arguments))
    assert_same(ours, torch_path.agro_coefficients(*arguments))


@options
@pytest.mark.parametrize("prepare", [lambda batch: batch, spoiled], ids=["valid", "invalid-rows"])
def test_loss_matches_torch_path(name: str, prepare) -> None:
    batch = prepare(Batch())
    arguments = (*batch.tokens, *batch.op_options(name))
    ours = kernels.agro_loss_fwd(*on_device(arguments))
    assert_same(ours, torch_path.agro_loss_fwd(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_match_torch_path(dtype: torch.dtype) -> None:
    batch = Batch()
    logprobs, ref_logprobs, rewards, groups, cu_seqlens = batch.tokens
    tokens = (logprobs.to(dtype), ref_logprobs.to(dtype), rewards.to(dtype))
    arguments = (*tokens, groups.int(), cu_seqlens.long(), *batch.op_options("on-policy"))
    loss, coefficients = kernels.agro_loss_fwd(*on_device(arguments))
    exact_loss, exact_coefficients = torch_path.agro_loss_fwd(*arguments)
    assert_same((coefficients,), (exact_coefficients,))
    torch.testing.assert_close(loss.cpu(), exact_loss, rtol=2**-23, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_gradients_match_torch_path(dtype: torch.dtype) -> None:
    batch = Batch()
    num_tokens, num_rows = len(batch.logprobs), len(batch.rewards)
    coefficients = torch.linspace(-1, 1, num_rows, dtype=torch.float64)
    arguments = (torch.tensor(1.5), coefficients, batch.cu_seqlens, num_tokens)
    ours = kernels.agro_loss_bwd(*on_device(arguments), dtype)
    truth = torch_path.agro_loss_bwd(*arguments, torch.float64)
    # The interpreter cuts bf16 off where a GPU rounds, so equality is too much to ask.
    assert_close_to_truth(ours, truth, torch_path.agro_loss_bwd(*arguments, dtype))
    assert ours.dtype == dtype


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_tiny_batches_match_torch_path(num_rows: int) -> None:
    logprobs, ref_logprobs, rewards = torch.randn(
        3, num_rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    groups, cu_seqlens = torch.zeros(num_rows).long(), torch.arange(num_rows + 1)
    arguments = (logprobs, ref_logprobs, rewards, groups, cu_seqlens)
    arguments += Batch().op_options("capped")
    ours = kernels.agro_loss_fwd(*on_device(arguments))
    exact = torch_path.agro_loss_fwd(*arguments)
    assert_same(ours, exact)
    backward = (torch.tensor(1.0), exact[1], cu_seqlens, num_rows, torch.float64)
    assert_same(
        (kernels.agro_loss_bwd(*on_device(backward)),), (torch_path.agro_loss_bwd(*backward),)
    )


def test_a_sequence_with_impossible_bounds_is_dropped() -> None:
    """The values cannot be checked without waiting for the device, so no address may trust them."""
    batch = Batch()
    wrong = batch.cu_seqlens.clone()
    wrong[-1] = len(batch.logprobs) + 1000
    arguments = (*batch.tokens[:-1], wrong, *batch.op_options("off-policy"))
    loss, coefficients = kernels.agro_loss_fwd(*on_device(arguments))
    batch.rewards[-1] = math.nan
    exact = torch_path.agro_loss_fwd(*batch.tokens, *batch.op_options("off-policy"))
    assert_same((loss, coefficients), exact)


def test_tokens_after_the_last_sequence_get_no_gradient() -> None:
    arguments = (torch.tensor(1.0), torch.ones(2).double(), torch.tensor([0, 2, 3]), 7)
    ours = kernels.agro_loss_bwd(*on_device(arguments), torch.float32)
    assert ours.tolist() == [1.0] * 3 + [0.0] * 4


def test_noncontiguous_inputs_match_torch_path() -> None:
    batch = Batch()
    arguments = (*batch.sums, *batch.op_options("mixed"))
    strided = tuple(
        torch.stack([v, v], 1)[:, 0] if isinstance(v, Tensor) and v.ndim == 1 else v
        for v in on_device(arguments)
    )
    assert_same(kernels.agro_coefficients(*strided), torch_path.agro_coefficients(*arguments))


def test_repeat_is_bitwise_equal() -> None:
    batch = Batch()
    arguments = on_device((*batch.tokens, *batch.op_options("on-policy")))
    first, second = (kernels.agro_loss_fwd(*arguments) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


COMPILE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from agro_kernels._triton.agro_loss import compile_cases

target = GPUTarget("cuda", 90, 32)
compiled = {
    name: triton.compile(ASTSource(kernel, signature, constexprs), target=target)
    for name, kernel, signature, constexprs in compile_cases()
}
print(json.dumps({name: ".f64" in kernel.asm["ptx"] for name, kernel in compiled.items()}))
"""


def test_kernels_compile_for_sm_90() -> None:
    """In a process of its own, because interpreted kernels cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    in_float64 = json.loads(done.stdout)
    assert len(in_float64) == 4
    assert all(in_float64.values()), in_float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_are_served_without_a_host_synchronisation() -> None:
    batch = Batch()
    tokens = on_device(batch.tokens)
    logprobs = tokens[0].requires_grad_()
    sums = on_device(batch.sums)

    def step() -> None:
        agro_loss(logprobs, *tokens[1:], beta=BETA, num_groups=3).backward()
        agro_coefficients(*sums, beta=BETA, num_groups=3)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
