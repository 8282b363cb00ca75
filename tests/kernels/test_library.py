"""The registration of the ops: schemas, fakes and gradients agree with what the kernels do."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from agro_kernels import library, linear_logprobs
from tests.numerics import HeadInputs, head_inputs

OPS = torch.ops.agro


def options(temperature: str, softcap: float) -> tuple[float, Tensor | None, float, int]:
    per_token = torch.linspace(0.5, 2.0, 9) if temperature == "per-token" else None
    return 1.0 if per_token is not None else 0.7, per_token, softcap, -100


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def inputs(request: pytest.FixtureRequest) -> HeadInputs:
    return head_inputs(9, 8, 33, dtype=request.param, bias=True, ignored=True)


@pytest.mark.parametrize("with_entropy", [True, False], ids=["entropy", "no-entropy"])
def test_linear_logprobs_fwd_passes_opcheck(inputs: HeadInputs, with_entropy: bool) -> None:
    hidden = inputs.hidden.nan_to_num().requires_grad_()  # opcheck compares inputs: NaN != NaN
    bias = inputs.bias.requires_grad_() if with_entropy else None
    arguments = (hidden, inputs.weight.requires_grad_(), inputs.targets, bias)
    torch.library.opcheck(
        OPS.linear_logprobs_fwd, (*arguments, *options("per-token", 3.0), with_entropy)
    )


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, False]])
def test_linear_logprobs_bwd_passes_opcheck(inputs: HeadInputs, mask: list[bool]) -> None:
    hidden = inputs.hidden.nan_to_num()
    arguments = (hidden, inputs.weight, inputs.targets, inputs.bias, *options("scalar", 0.0))
    logprobs, lse, entropy = OPS.linear_logprobs_fwd(*arguments, True)
    dlse = None if mask[0] else lse.cos()
    torch.library.opcheck(
        OPS.linear_logprobs_bwd,
        (logprobs.sin(), dlse, entropy.cos(), *arguments, lse, entropy, mask),
    )
    gradients = OPS.linear_logprobs_bwd(
        logprobs, None, None, *arguments, lse, entropy.new_empty(0), mask
    )
    shapes = [(9, 8), (33, 8), (33,)]
    for gradient, asked, shape in zip(gradients, mask, shapes, strict=True):
        assert gradient.shape == (shape if asked else (0,))
        assert gradient.dtype == hidden.dtype


@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "no-lse"])
def test_weighted_logprob_sum_passes_opcheck(inputs: HeadInputs, with_lse: bool) -> None:
    hidden = inputs.hidden.nan_to_num()
    arguments = (hidden, inputs.weight, inputs.targets)
    lse = OPS.linear_logprobs_fwd(*arguments, None, *options("scalar", 0.0), False)[1]
    leaves = (hidden.requires_grad_(), inputs.weight.requires_grad_(), inputs.targets)
    torch.library.opcheck(
        OPS.weighted_logprob_sum_fwd,
        (
            *leaves,
            inputs.coefficients,
            lse if with_lse else None,
            None,
            *options("scalar", 0.0),
            [True, True, False],
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_selective_logprobs_pass_opcheck(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 4, 17).to(dtype)
    targets = torch.randint(0, 17, (3, 4))
    per_token = torch.linspace(0.5, 2.0, 12)
    logprobs, lse = OPS.selective_logprobs_fwd(logits, targets, 1.0, per_token, -100)
    torch.library.opcheck(
        OPS.selective_logprobs_bwd, (logprobs, logits, targets, 1.0, per_token, -100, lse)
    )
    torch.library.opcheck(
        OPS.selective_logprobs_fwd, (logits.requires_grad_(), targets, 1.0, per_token, -100)
    )


@pytest.mark.parametrize(
    "name", ["linear_logprobs_fwd", "linear_logprobs_bwd", "weighted_logprob_sum_fwd"]
)
def test_cuda_has_a_kernel_of_its_own(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"agro::{name}", "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"agro::{name}", "CPU")


def test_cuda_falls_back_without_triton_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    library.triton_import_error.cache_clear()
    inputs = head_inputs(5, 8, 33)
    kernel = library._triton_if_possible(
        "linear_logprobs_fwd", "linear_logprobs", library.torch_linear_logprobs
    )
    arguments = (inputs.hidden, inputs.weight, inputs.targets, None, 1.0, None, 0.0, -100, False)
    with pytest.warns(UserWarning, match="triton cannot be imported .*triton") as warned:
        logprobs, _, _ = kernel(*arguments)
        kernel(*arguments)
    assert len(warned) == 1
    assert isinstance(library.triton_import_error(), ImportError)
    assert torch.equal(logprobs, linear_logprobs(inputs.hidden, inputs.weight, inputs.targets))
    library.triton_import_error.cache_clear()


def test_float64_is_never_sent_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "agro_kernels._triton.linear_logprobs", None)
    inputs = head_inputs(5, 8, 33, dtype=torch.float64)
    kernel = library._triton_if_possible(
        "linear_logprobs_fwd", "linear_logprobs", library.torch_linear_logprobs
    )
    arguments = (inputs.hidden, inputs.weight, inputs.targets, None, 1.0, None, 0.0, -100, False)
    assert kernel(*arguments)[0].dtype == torch.float64


def test_kernels_switch_autocast_off() -> None:
    inputs = head_inputs(5, 8, 33)
    arguments = (inputs.hidden, inputs.weight, inputs.targets, None, 1.0, None, 0.0, -100, True)
    expected = OPS.linear_logprobs_fwd(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = OPS.linear_logprobs_fwd(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_cpu_calls_do_not_import_triton() -> None:
    program = (
        "import sys, torch, agro_kernels\n"
        "h, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)\n"
        "agro_kernels.linear_logprobs(h, w, torch.tensor([0, 1, 2])).sum().backward()\n"
        "kernels = [m for m in sys.modules if m.startswith('agro_kernels._triton')]\n"
        "assert not kernels, kernels\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
