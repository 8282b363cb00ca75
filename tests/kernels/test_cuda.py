"""The public functions on a GPU's tensors: autograd, opcheck, compilation, memory, large sizes.

What the kernels compute is compared with float64, option by option, in test_triton_*.py.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from agro_kernels import (
    agro_coefficients,
    agro_loss,
    linear_logprobs,
    linear_logprobs_with_stats,
    reference,
    selective_logprobs,
    weighted_logprob_sum,
)
from tests.kernels.test_agro_loss import BETA, Batch
from tests.kernels.test_linear_logprobs import assert_matches_truth
from tests.kernels.test_ops import CALLS, OPS
from tests.numerics import HeadInputs, head_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs_of(dtype: torch.dtype, shape: tuple[int, int, int] = (300, 264, 1003)) -> HeadInputs:
    return head_inputs(*shape, dtype=dtype, device="cuda", bias=True, ignored=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_match_float64(dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype)
    temperature = torch.linspace(0.5, 2.0, len(inputs.hidden), device="cuda")
    assert_matches_truth(inputs, dtype, temperature=temperature, softcap=5.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_known_coefficients_are_the_gradient_of_the_sum(dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype)
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    stats = linear_logprobs_with_stats(hidden, weight, inputs.targets, bias=inputs.bias)
    terms = stats.logprobs * inputs.coefficients
    expected = torch.autograd.grad(terms.sum(), (hidden, weight))
    terms = terms.detach()
    another_order = 2.0**-20 * float(terms.abs().sum())
    for lse in (None, stats.lse.detach()):
        total = weighted_logprob_sum(
            hidden, weight, inputs.targets, inputs.coefficients, lse=lse, bias=inputs.bias
        )
        torch.testing.assert_close(total.detach(), terms.sum(), rtol=0.0, atol=another_order)
        assert all(map(torch.equal, torch.autograd.grad(total, (hidden, weight)), expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch_and_a_repeat_is_the_same(dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype, (700, 2304, 5003))
    whole = linear_logprobs(inputs.hidden, inputs.weight, inputs.targets)
    assert torch.equal(linear_logprobs(inputs.hidden, inputs.weight, inputs.targets), whole)
    for rows in (slice(0, 1), slice(5, 137), slice(690, 700)):
        part = linear_logprobs(inputs.hidden[rows], inputs.weight, inputs.targets[rows])
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("name", CALLS)
def test_op_passes_opcheck(name: str) -> None:
    for index, arguments in enumerate(CALLS[name](torch.float32)):
        moved = pytree.tree_map_only(
            Tensor, lambda t: t.detach().cuda().requires_grad_(t.requires_grad), arguments
        )
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        checks += ["test_aot_dispatch_dynamic"] if index == 0 else []
        torch.library.opcheck(getattr(OPS, name), moved, test_utils=checks)


def test_compiles_fullgraph_with_backward() -> None:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        stats = linear_logprobs_with_stats(hidden, weight, targets, softcap=9.0)
        return stats.logprobs + 0.1 * stats.entropy - stats.lse

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = head_inputs(200, 64, 1500, dtype=torch.bfloat16, device="cuda", ignored=True)
    leaves = [inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()]
    expected, ours = (f(*leaves, inputs.targets) for f in (loss, compiled))
    torch.testing.assert_close(ours, expected)
    gradients = torch.autograd.grad(ours.sum(), leaves)
    for gradient, same in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, same)


def test_the_logits_are_never_stored() -> None:
    inputs = head_inputs(8192, 128, 65536, dtype=torch.bfloat16, device="cuda")
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    logits_bytes = 2 * len(hidden) * len(weight)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs = linear_logprobs(hidden, weight, inputs.targets)
    forward = torch.cuda.max_memory_allocated() - before
    (logprobs @ inputs.coefficients).backward()
    assert forward < 0.02 * logits_bytes
    assert torch.cuda.max_memory_allocated() - before < 0.75 * logits_bytes


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 48e9,
    reason="needs 48 GB of GPU memory, most of it for the truth",
)
@pytest.mark.parametrize("shape", [(70001, 64, 32771), (40, 8448, 262147)], ids=["NV", "VD"])
def test_products_of_sizes_beyond_31_bits(shape: tuple[int, int, int]) -> None:
    n, d, v = shape
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16) / d**0.5
    targets = torch.arange(v - 1, v - 1 - n, -1, device="cuda") % v
    hidden.requires_grad_()
    logprobs = linear_logprobs(hidden, weight, targets)
    rows = torch.tensor([0, n // 2, n - 1], device="cuda")
    (dhidden,) = torch.autograd.grad(logprobs.sum(), hidden)
    hidden_rows = hidden[rows].detach().double().requires_grad_()
    truth = reference.linear_logprobs(hidden_rows, weight.double(), targets[rows])
    (expected,) = torch.autograd.grad(truth.sum(), hidden_rows)
    torch.testing.assert_close(logprobs[rows].double(), truth, rtol=0.0, atol=1e-4)
    error = (dhidden[rows].double() - expected).norm() / expected.norm()
    assert error < 2.0**-8


def test_autocast_takes_16_bit_operands() -> None:
    inputs = head_inputs(50, 64, 300, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = linear_logprobs(inputs.hidden, inputs.weight, inputs.targets)
    expected = linear_logprobs(inputs.hidden.bfloat16(), inputs.weight.bfloat16(), inputs.targets)
    assert torch.equal(ours, expected)


def test_float64_is_served_by_the_torch_path() -> None:
    inputs = head_inputs(50, 64, 300, dtype=torch.float64, device="cuda")
    ours = linear_logprobs(inputs.hidden, inputs.weight, inputs.targets)
    truth = reference.linear_logprobs(inputs.hidden, inputs.weight, inputs.targets)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_selective_logprobs_match_float64() -> None:
    logits = torch.randn(33, 5001, device="cuda", dtype=torch.bfloat16).mul_(4.0)
    targets = torch.randint(0, 5001, (33,), device="cuda")
    leaf = logits.clone().requires_grad_()
    ours = selective_logprobs(leaf, targets)
    ours.sum().backward()
    exact = logits.double().requires_grad_()
    truth = exact.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    truth.sum().backward()
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    assert leaf.grad is not None and exact.grad is not None
    assert (leaf.grad.double() - exact.grad).norm() < 2.0**-8 * exact.grad.norm()


@pytest.mark.parametrize("taper", [0.0, 1.0, math.inf])
def test_agro_loss_and_coefficients_are_those_of_the_cpu(taper: float) -> None:
    batch = Batch()
    results = []
    for device in ("cpu", "cuda"):
        logprobs, *others = (tensor.to(device) for tensor in batch.tokens)
        leaf = logprobs.requires_grad_()
        options = {"sampling_logprobs": batch.sampling_logprobs.to(device), "taper": taper}
        loss = agro_loss(leaf, *others, beta=BETA, num_groups=3, **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
        sums = (tensor.to(device) for tensor in batch.sums)
        coefficients, _ = agro_coefficients(*sums, beta=BETA, **options)
        results.append([tensor.detach().cpu() for tensor in (loss, gradient, coefficients)])
    torch.testing.assert_close(results[1], results[0])
