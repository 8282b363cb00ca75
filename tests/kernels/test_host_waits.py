"""What makes the host wait for a GPU: with compact=False nothing does, on the Triton path.

Triton's interpreter runs the kernels on CPU tensors here, where nothing waits for anything. So the
tests watch for the operations that would: those that read a number, or whose result's shape depends
on the numbers in a tensor.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agro_kernels import (
    agro_coefficients,
    agro_loss,
    kept_logits,
    linear_cross_entropy,
    linear_logprobs,
    linear_logprobs_with_stats,
    weighted_logprob_sum,
)
from agro_kernels._triton import agro_loss as agro_kernels_of_triton
from agro_kernels._triton import head_gradients, target_logprobs
from agro_kernels._triton import linear_logprobs as kernels
from agro_kernels.ops import many_logprobs, smoothed_logprobs
from agro_kernels.ops.agro_loss import with_options, with_tokens
from agro_kernels.ops.dispatch import with_head
from agro_kernels.ops.linear_logprobs import (
    with_kept,
    with_upstream,
    with_upstream_and_buffer,
)
from tests.conftest import SetSizes
from tests.numerics import HeadInputs, assert_close_to_truth, head_inputs

N, D, V = 21, 40, 75
WAITING = {
    "_local_scalar_dense",  # item, tolist, bool, int, float
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
}
TRITON: dict[str, Callable[..., Any]] = {
    "linear_logprobs_fwd": with_head(with_kept(kernels.linear_logprobs_fwd)),
    "linear_logprobs_bwd": with_upstream(kernels.linear_logprobs_bwd),
    "linear_logprobs_bwd_accumulate": with_upstream_and_buffer(kernels.linear_logprobs_bwd),
    "target_logprobs": with_head(target_logprobs.target_logprobs),
    "many_logprobs_fwd": with_head(many_logprobs._many_logprobs_fwd),
    "smoothed_logprobs_fwd": with_head(smoothed_logprobs._smoothed_logprobs_fwd),
    "agro_coefficients": with_options(agro_kernels_of_triton.agro_coefficients),
    "agro_loss_fwd": with_tokens(agro_kernels_of_triton.agro_loss_fwd),
    "agro_loss_bwd": agro_kernels_of_triton.agro_loss_bwd,
}

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are interpreted here"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


class Watch(TorchDispatchMode):
    """Lists the operations that would wait for a GPU.

    A mode sees an op as one operation; inside this one the ops are what serves a GPU's tensors,
    whose operations it sees.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if func.namespace == "agro":
            with self:
                return TRITON[name](*args)
        indices = args[1] if name.startswith("index") and len(args) > 1 else None
        by_mask = isinstance(indices, (list, tuple)) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in indices
        )
        if name in WAITING or by_mask:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, set_sizes: SetSizes) -> None:
    """Several chunks, the kernel for many targets, and no look at the ids, which a CPU's get."""
    set_sizes(head_gradients, DLOGITS_CHUNK_BYTES=2100, TOKEN_CHUNK=16)
    many = target_logprobs.many_target_logprobs
    monkeypatch.setattr(many_logprobs.torch_linear_logprobs, "many_target_logprobs", many)
    monkeypatch.setattr(many_logprobs, "check_ids", lambda head, ids: None)


def results(
    op: str, inputs: HeadInputs, lse: Tensor, **options: Any
) -> tuple[list[Tensor], list[str]]:
    """(one number of an op and its gradients of hidden and weight, the operations that wait)."""
    copy = inputs.in_dtype(inputs.hidden.dtype)
    hidden, weight, targets, c = copy.hidden, copy.weight, inputs.targets, inputs.coefficients
    with Watch() as watch:
        if op == "stats":
            found = linear_logprobs_with_stats(hidden, weight, targets, **options)
            result = (found.logprobs + 0.3 * found.entropy) @ c + found.lse.sum()
        elif op == "many":
            ids = torch.stack([targets, targets.flip(0)], 1)
            result = (linear_logprobs(hidden, weight, ids, **options) * c[:, None]).sum()
        elif op == "known":
            result = weighted_logprob_sum(hidden, weight, targets, c, lse=lse, **options)
        elif op == "smoothed":
            result = linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1, **options)
        else:
            result = linear_logprobs(hidden, weight, targets, **options) @ c
        gradients = torch.autograd.grad(result, [hidden, weight])
    return [result.detach(), *gradients], watch.waits


@pytest.mark.parametrize("op", ["logprobs", "stats", "many", "known", "smoothed"])
def test_nothing_waits_without_compact(op: str) -> None:
    inputs = head_inputs(N, D, V)
    lse = torch.linspace(8.0, 9.0, N)
    compacted, waits = results(op, inputs, lse)
    assert set(waits) == {"nonzero"}  # a pass each, so the tests would see one
    ours, waits = results(op, inputs, lse, compact=False)
    assert waits == []
    for mine, other in zip(ours, compacted, strict=True):
        assert torch.equal(mine, other)  # all rows count: there is nothing to leave out


@pytest.mark.parametrize("op", ["logprobs", "stats", "many", "known"])
def test_rows_that_stay_are_exact_zeros_whatever_they_hold(op: str) -> None:
    inputs = head_inputs(N, D, V, ignored=True, dtype=torch.bfloat16)  # ignored rows hold NaN
    inputs.coefficients[1] = 0.0
    inputs.targets[17] = -100  # with row 3, all the ids of both
    ignored = (inputs.targets == -100) & ((inputs.targets.flip(0) == -100) | (op != "many"))
    inputs.hidden[inputs.targets == -100] = 1.0
    inputs.hidden[ignored] = torch.nan
    lse = torch.linspace(8.0, 9.0, N)
    compacted, _ = results(op, inputs, lse)
    ours, waits = results(op, inputs, lse, compact=False)
    assert waits == [] and ignored.any()
    assert (ours[1][ignored] == 0).all()
    for mine, other in zip(ours, compacted, strict=True):
        assert mine.isfinite().all()
        # The library's products sum over another number of rows.
        assert_close_to_truth(mine, other.double(), other)


def test_weight_grad_and_kept_logits_do_not_wait(set_sizes: SetSizes) -> None:
    # Half a tile of the interpreter's kernels each, and bytes for 64 of the 75 columns.
    set_sizes(kept_logits, CPU_TILE=16, CPU_STEP=32)
    inputs = head_inputs(N, D, V, dtype=torch.bfloat16)
    copy = inputs.in_dtype(torch.bfloat16)
    total = torch.zeros(V, D)
    with Watch() as watch:
        logprobs = linear_logprobs(
            copy.hidden, copy.weight, inputs.targets, weight_grad=total, compact=False
        )
        kept = linear_logprobs(
            copy.hidden, copy.weight, inputs.targets, keep_logits_bytes=N * 144, compact=False
        )
        ((logprobs + kept) @ inputs.coefficients).backward()
    assert watch.waits == [] and bool((total != 0).any())


def test_the_agro_loss_never_waits() -> None:
    lengths = torch.tensor([0, 3, 7, 8, 12], dtype=torch.int32)
    logprobs = torch.randn(12, requires_grad=True)
    rows = torch.rand(4), torch.tensor([0, 0, 1, 1])
    with Watch() as watch:
        agro_loss(logprobs, torch.randn(12), *rows, lengths, beta=0.1, taper=1.0).backward()
        agro_coefficients(rows[0], torch.randn(4), torch.randn(4), rows[1], beta=0.1, num_groups=2)
    assert watch.waits == []
    assert logprobs.grad is not None


def test_compact_is_checked() -> None:
    inputs = head_inputs(N, D, V)
    with pytest.raises(TypeError, match="compact: expected True or False, got None; False keeps"):
        linear_logprobs(inputs.hidden, inputs.weight, inputs.targets, compact=None)  # type: ignore[arg-type]
    inputs.targets[3] = -7
    with pytest.raises(ValueError, match=r"in \[0, 75\) or ignore_index, got -7 at position 3"):
        linear_logprobs(inputs.hidden, inputs.weight, inputs.targets, compact=False)
