"""The registration of the ops: schemas, fakes and gradients agree with what the kernels do."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import agro_kernels
from agro_kernels._torch import linear_logprobs as blocked
from agro_kernels._torch.divergences import Kind
from agro_kernels.head import Head
from agro_kernels.ops import dispatch
from tests.kernels.test_agro_loss import Batch
from tests.numerics import head_inputs

OPS = torch.ops.agro


def head(dtype: torch.dtype, kind: str = "few", *, bias: bool = True) -> Head:
    """9 tokens of a vocabulary of 33, some ignored; `kind` "all" has every option.

    opcheck compares inputs, so none is NaN.
    """
    inputs = head_inputs(9, 8, 33, dtype=dtype, bias=bias, ignored=True)
    inputs = replace(inputs, hidden=inputs.hidden.nan_to_num())
    if kind == "few":
        return inputs.head(temperature=0.7)
    kept_ids = torch.randint(0, 33, (9, 5))
    kept_ids[::3] = -1
    temperature = torch.linspace(0.5, 2.0, 9)
    return inputs.head(temperature=temperature, softcap=3.0, round_logits="bf16", kept_ids=kept_ids)


def with_leaves(made: Head) -> Head:
    """The same head with the tensors that may get a gradient as leaves of autograd."""
    assert made.bias is not None
    hidden, weight, bias = (
        tensor.clone().requires_grad_() for tensor in (made.hidden, made.weight, made.bias)
    )
    return made._replace(hidden=hidden, weight=weight, bias=bias)


def linear_logprobs_fwd_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for kind, with_entropy in (("few", True), ("all", True), ("all", False)):
        yield *with_leaves(head(dtype, kind)), with_entropy
    plain = head(dtype, bias=False)
    yield *plain._replace(hidden=plain.hidden.clone().requires_grad_()), False
    yield *plain._replace(targets=plain.targets.clamp_min(0)), True


def linear_logprobs_bwd_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for kind, mask in (
        ("few", [True, True, True]),
        ("all", [True, True, True]),
        ("all", [True, False, False]),
        ("few", [False, True, False]),
    ):
        made = head(dtype, kind)
        logprobs, lse, entropy, *kept = OPS.linear_logprobs_fwd(*made, True, 9 * 16 * 4)
        upstream = logprobs.sin(), None if mask[2] else lse.cos(), entropy.cos()
        yield *upstream, *made, lse, entropy, mask, *kept
    ids = torch.tensor([[3, -1, 7]] * 9)  # of many targets a token
    yield (
        None,
        lse,
        None,
        *made,
        lse,
        entropy,
        mask,
        *kept,
        ids,
        torch.ones_like(lse)[:, None] * ids,
    )


def linear_logprobs_bwd_accumulate_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    fields = 3 + len(Head._fields) + 5
    for arguments in linear_logprobs_bwd_calls(dtype):
        buffer = torch.ones(33, 8, dtype=results_dtype(dtype))
        yield *arguments[:fields], buffer, *arguments[fields:]


def many_logprobs_fwd_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for kind, with_entropy, keep in (
        ("few", True, 0),
        ("all", True, 0),
        ("few", False, 9 * 16 * 4),
    ):
        made = with_leaves(head(dtype, kind))
        ids = torch.randint(0, 33, (9, 4))
        ids[2, 1], ids[4] = -100, -100
        yield *made, ids, with_entropy, keep


def target_logprobs_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for kind in ("few", "all"):
        made = with_leaves(head(dtype, kind))
        with torch.no_grad():
            lse = OPS.linear_logprobs_fwd(*made, False)[1]
        yield *made, lse


def linear_topk_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    yield *head(dtype)._replace(hidden=torch.randn(9, 8).to(dtype)), 3
    yield *head(dtype, "all"), 33


def divergence_fwd_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    student, teacher = with_leaves(head(dtype)), head(dtype)
    teacher = teacher._replace(hidden=torch.randn(9, 8).to(dtype), bias=None)
    with torch.no_grad():
        lses = [OPS.linear_logprobs_fwd(*side, False)[1] for side in (student, teacher)]
    for kind in Kind:
        yield *student, *teacher, int(kind), 0.3, *lses


def divergence_bwd_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for *arguments, lse, teacher_lse in divergence_fwd_calls(dtype):
        constants = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        _, inner = OPS.divergence_fwd(*constants, lse, teacher_lse)
        yield inner.cos(), *constants, inner, lse, teacher_lse, [True, False, True]


def smoothed_logprobs_fwd_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for kind, keep in (("few", 0), ("few", 10**4), ("all", 0)):
        yield *with_leaves(head(dtype, kind)), keep


def pack_kept_ids_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for ids in (torch.tensor([[1, 32, -1], [-1, -1, -1]]), torch.tensor([[31, 0, 31]]).int()):
        yield ids, 33


def selective_logprobs_fwd_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    logits, targets = torch.randn(3, 4, 17).to(dtype), torch.randint(0, 17, (3, 4))
    targets[1, 1] = -100
    yield logits.requires_grad_(), targets, 1.0, torch.linspace(0.5, 2.0, 12), -100
    yield logits[:, 1:], targets[:, 1:], 0.7, None, -100


def selective_stats_fwd_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for *arguments, ignore_index in selective_logprobs_fwd_calls(dtype):
        yield *arguments, 3.0, ignore_index


def selective_stats_bwd_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for logits, *rest in selective_stats_fwd_calls(dtype):
        logprobs, lse, entropy = OPS.selective_stats_fwd(logits.detach(), *rest)
        yield logprobs.cos(), None, entropy, logits.detach(), *rest, lse, entropy


def selective_logprobs_bwd_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for logits, *rest in selective_logprobs_fwd_calls(dtype):
        logprobs, lse = OPS.selective_logprobs_fwd(logits.detach(), *rest)
        yield logprobs.cos(), logits.detach(), *rest, lse


AGRO_OPTIONS = ("off-policy", "mixed-capped", "importance-weighted", "global-count")
AGRO_OPTIONS += ("tapered", "tapered-by-row")


def agro_coefficients_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    batch = Batch()
    for name in AGRO_OPTIONS:
        rewards, logprobs, ref_logprobs, groups = batch.sums
        sums = rewards.to(dtype), logprobs.to(dtype), ref_logprobs.to(dtype)
        yield *sums, groups, *batch.op_options(name)


def agro_loss_fwd_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    batch = Batch()
    for name in AGRO_OPTIONS:
        logprobs, ref_logprobs, *rest = batch.tokens
        leaf = logprobs.to(dtype, copy=True).requires_grad_()
        yield leaf, ref_logprobs.to(dtype), *rest, *batch.op_options(name)


def agro_loss_bwd_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    batch = Batch()
    coefficients = torch.linspace(-1.0, 1.0, len(batch.rewards), dtype=torch.float64)
    yield torch.tensor(2.0), coefficients, batch.cu_seqlens, len(batch.logprobs), dtype


def results_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


CALLS: dict[str, Callable[[torch.dtype], Iterator[tuple[Any, ...]]]] = {
    "agro_coefficients": agro_coefficients_calls,
    "agro_loss_bwd": agro_loss_bwd_calls,
    "agro_loss_fwd": agro_loss_fwd_calls,
    "divergence_bwd": divergence_bwd_calls,
    "divergence_fwd": divergence_fwd_calls,
    "linear_logprobs_bwd": linear_logprobs_bwd_calls,
    "linear_logprobs_bwd_accumulate": linear_logprobs_bwd_accumulate_calls,
    "linear_logprobs_fwd": linear_logprobs_fwd_calls,
    "linear_topk": linear_topk_calls,
    "many_logprobs_fwd": many_logprobs_fwd_calls,
    "pack_kept_ids": pack_kept_ids_calls,
    "selective_logprobs_bwd": selective_logprobs_bwd_calls,
    "selective_logprobs_fwd": selective_logprobs_fwd_calls,
    "selective_stats_bwd": selective_stats_bwd_calls,
    "selective_stats_fwd": selective_stats_fwd_calls,
    "smoothed_logprobs_fwd": smoothed_logprobs_fwd_calls,
    "target_logprobs": target_logprobs_calls,
}
# A handful of torch operations on any device.
WITHOUT_A_CUDA_KERNEL = {
    "divergence_bwd",
    "divergence_fwd",
    "linear_topk",
    "many_logprobs_fwd",
    "pack_kept_ids",
    "selective_stats_bwd",
    "selective_stats_fwd",
    "smoothed_logprobs_fwd",
}


def test_every_op_is_checked_here() -> None:
    registered = [name for name in torch._C._dispatch_get_all_op_names() if "agro::" in name]
    assert sorted(CALLS) == sorted(name.removeprefix("agro::") for name in registered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_op_passes_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schema (what it mutates and aliases), fake, autograd registration, and AOT tracing."""
    for index, arguments in enumerate(CALLS[name](dtype)):
        # Tracing takes a second: once an op is enough, the others differ in options only.
        traced = index == 0 and dtype == torch.float32
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        checks += ["test_aot_dispatch_dynamic"] if traced else []
        torch.library.opcheck(getattr(OPS, name), arguments, test_utils=checks)


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, False]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_nobody_asked_for_are_empty(dtype: torch.dtype, mask: list[bool]) -> None:
    made = head(dtype)
    logprobs, lse, entropy, *kept = OPS.linear_logprobs_fwd(*made, False)
    gradients = OPS.linear_logprobs_bwd(logprobs, None, None, *made, lse, entropy, mask, *kept)
    for gradient, asked, shape in zip(gradients, mask, [(9, 8), (33, 8), (33,)], strict=True):
        assert gradient.shape == (shape if asked else (0,))
        assert gradient.dtype == dtype


@pytest.mark.parametrize("name", sorted(set(CALLS) - WITHOUT_A_CUDA_KERNEL))
def test_cuda_has_a_kernel_of_its_own(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"agro::{name}", "CUDA")


def triton_or_torch() -> Callable[..., Any]:
    """What CUDA tensors are served by; here it gets CPU tensors."""
    return dispatch.triton_if_possible("linear_logprobs_fwd", "linear_logprobs", blocked)


def test_cuda_falls_back_without_triton_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    dispatch.triton_import_error.cache_clear()
    made, kernel = head(torch.float32), triton_or_torch()
    with pytest.warns(UserWarning, match="triton cannot be imported .*triton") as warned:
        logprobs, _, _ = kernel(made, False)
        kernel(made, False)
    assert len(warned) == 1
    assert isinstance(dispatch.triton_import_error(), ImportError)
    assert torch.equal(logprobs, blocked.linear_logprobs_fwd(made, False)[0])
    dispatch.triton_import_error.cache_clear()


def test_float64_is_never_sent_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "agro_kernels._triton.linear_logprobs", None)
    logprobs, _, _ = triton_or_torch()(head(torch.float64), False)
    assert logprobs.dtype == torch.float64


def test_kernels_switch_autocast_off() -> None:
    made = head(torch.float32)
    expected = OPS.linear_logprobs_fwd(*made, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = OPS.linear_logprobs_fwd(*made, True)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_schemas_are_those_that_compiled_graphs_hold() -> None:
    """The order and the names of the head's arguments, which callers of the ops rely on."""
    fields = list(Head._fields)
    expected = {
        "linear_logprobs_fwd": [*fields, "with_entropy", "keep_logits_bytes"],
        "linear_logprobs_bwd": [
            *("dlogprobs", "dlse", "dentropy"),
            *fields,
            *("lse", "entropy", "output_mask", "kept_logits", "kept_maxima"),
        ],
        "many_logprobs_fwd": [*fields, "ids", "with_entropy", "keep_logits_bytes"],
        "target_logprobs": [*fields, "lse"],
    }
    expected["linear_logprobs_bwd_accumulate"] = [*expected["linear_logprobs_bwd"], "weight_grad"]
    for name in ("linear_logprobs_bwd", "linear_logprobs_bwd_accumulate"):
        expected[name] += ["entry_ids", "entry_values", "dsum"]
    for name, arguments in expected.items():
        schema = getattr(OPS, name).default._schema
        assert [argument.name for argument in schema.arguments] == arguments


def test_cpu_calls_do_not_import_triton() -> None:
    program = (
        "import sys, torch, agro_kernels\n"
        "h, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)\n"
        "agro_kernels.linear_logprobs(h, w, torch.tensor([0, 1, 2])).sum().backward()\n"
        "kernels = [m for m in sys.modules if m.startswith('agro_kernels._triton')]\n"
        "assert not kernels, kernels\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_meta_tensors_give_shapes() -> None:
    """Forward and backward of every public function, without a number."""
    hidden = torch.empty(3, 7, 8, device="meta", requires_grad=True)
    weight = torch.empty(9, 8, device="meta", requires_grad=True)
    numbers = torch.empty(3, 7, device="meta")
    targets = numbers.long()
    options: Any = {"temperature": numbers, "kept_ids": targets[..., None], "softcap": 3.0}
    stats = agro_kernels.linear_logprobs_with_stats(hidden, weight, targets, **options)
    assert all(result.shape == (3, 7) and result.is_meta for result in stats)
    buffer = torch.empty(9, 8, device="meta")
    of_many = agro_kernels.linear_logprobs(hidden, weight, targets[..., None].expand(3, 7, 4))
    assert of_many.shape == (3, 7, 4) and of_many.is_meta
    into_buffer = agro_kernels.linear_logprobs(hidden, weight, targets, weight_grad=buffer)
    rest = agro_kernels.weighted_logprob_sum(hidden, weight, targets, numbers, lse=numbers)
    (stats.entropy.sum() + of_many.sum() + into_buffer.sum() + rest).backward()
    assert hidden.grad is not None and hidden.grad.shape == (3, 7, 8)
    assert weight.grad is not None and weight.grad.shape == (9, 8) and weight.grad.is_meta
    logits = torch.empty(3, 7, 5, device="meta", requires_grad=True)
    agro_kernels.selective_logprobs(logits, targets).sum().backward()
    assert logits.grad is not None and logits.grad.shape == (3, 7, 5)
    row = numbers[0].clone().requires_grad_()
    rows = row, row.detach(), row.detach()[:2], targets[0, :2], targets[0, :3]
    agro_kernels.agro_loss(*rows, beta=0.1).backward()
    assert row.grad is not None and row.grad.shape == (7,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert agro_kernels.linear_logprobs(hidden, weight, targets).shape == (3, 7)
