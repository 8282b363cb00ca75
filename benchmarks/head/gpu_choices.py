"""What `benchmarks.head.gpu_parts` compares: kernels and products alone, and choices in ours."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from agro_kernels import tiles
from agro_kernels._torch import linear_logprobs as torch_linear_logprobs
from agro_kernels.backward import Backward
from agro_kernels.head import Head, Upstream
from benchmarks.head.providers.base import Inputs, Step
from benchmarks.head.providers.ours import Ours
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.head.tune_kernel import instead_of_shipped

Result = tuple[Tensor | None, ...]

# Splits and groups of the forward pass, columns of a chunk of the backward pass.
SPLITS = (16, 32, 64, 128)
GROUPS = (8, 32)
COLUMNS = (4096, 8448, 32768)
SHARES = (0.25, 0.5, 1.0)  # of the logits that are kept


@dataclass(frozen=True)
class Choice:
    """One way to do the work of a part, or why it cannot be done here."""

    name: str
    call: Callable[[], Result]
    inside: Callable[[], AbstractContextManager[Any]] = field(default=contextlib.nullcontext)
    """Entered around its calls."""
    reason_against: str | None = None


def shipped_tile(kernel: str, head: Head) -> tiles.TileConfig:
    # Not on import: a smoke run tells Triton first that its kernels are to be interpreted.
    from agro_kernels._triton import launch

    return launch.select_config(kernel, head)


def head_of(inputs: Inputs, *, compact: bool = False) -> Head:
    return Head.of(
        inputs.hidden, inputs.weight, inputs.targets, softcap=inputs.softcap, compact=compact
    )


# --- Parts ----------------------------------------------------------------------------------------


def activity(inputs: Inputs) -> dict[str, Callable[[], Result]]:
    """Kernels and products alone; each does 2 N D V operations, or the part of a chunk of it."""
    from agro_kernels._triton import gemm, linear_logprobs

    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    n, d = hidden.shape
    columns = min(weight.shape[0], chunk_columns(inputs))
    chunk = weight[:columns]
    dlogits = torch.randn(n, columns, device=hidden.device).to(hidden.dtype)
    logits = torch.empty_like(dlogits)
    dweight = torch.empty_like(chunk)
    dweight_sums = torch.empty(columns, d, device=hidden.device)
    dhidden = torch.empty(n, d, device=hidden.device)
    part = Inputs(
        hidden, chunk, inputs.targets % columns, inputs.coefficients, inputs.entropy_coefficients
    )
    head = head_of(part)
    _, lse, _ = linear_logprobs.linear_logprobs_fwd(head, with_entropy=False)
    upstream = Upstream(inputs.coefficients, None, None, lse, None)

    def forward() -> Result:
        return linear_logprobs.linear_logprobs_fwd(head, with_entropy=False)

    def recompute() -> Result:
        # The bias's gradient alone: the kernel and none of the products.
        return linear_logprobs.linear_logprobs_bwd(Backward(upstream, head, [False, False, True]))

    def product(function: Callable[..., Any], *arguments: Any, **options: Any) -> Result:
        function(*arguments, **options)
        return ()

    add = functools.partial(product, gemm.add_product, keep=False)
    return {
        "mm logits": functools.partial(product, torch.mm, hidden, chunk.T, out=logits),
        "forward kernels": forward,
        "gradient of the logits, kernel": recompute,
        "mm dweight, fp32 result": functools.partial(add, dweight_sums, dlogits.T, hidden),
        "mm dweight, rounded result": functools.partial(
            product, gemm.rounded_product, dweight, dlogits.T, hidden
        ),
        "mm dhidden, fp32 result": functools.partial(add, dhidden, dlogits, chunk),
    }


def chunk_columns(inputs: Inputs) -> int:
    """Of a chunk of the backward pass."""
    from agro_kernels._triton import head_gradients, launch

    hidden = inputs.hidden
    tile = shipped_tile("linear_logprobs_bwd", head_of(inputs))
    at_once = launch.programs_at_once(tile, hidden)
    v = inputs.weight.shape[0]
    shape = head_gradients.chunk_shape(hidden.shape[0], v, hidden.element_size(), tile, at_once)
    return shape[1]


def forward(inputs: Inputs) -> Iterator[Choice]:
    """The forward kernels, in other cuts of the same work."""
    from agro_kernels._triton import linear_logprobs

    kernel = "linear_logprobs_fwd"
    heads = {compact: head_of(inputs, compact=compact) for compact in (True, False)}
    shipped = shipped_tile(kernel, heads[False])

    def call(compact: bool = False) -> Result:
        return linear_logprobs.linear_logprobs_fwd(heads[compact], with_entropy=True)

    yield Choice("shipped", call)
    yield Choice("rows compacted: waits once", functools.partial(call, True))
    others = {f"flatten {not shipped.flatten}": replace(shipped, flatten=not shipped.flatten)}
    others |= {f"at most {most} splits": replace(shipped, max_splits=most) for most in SPLITS}
    others |= {f"groups of {group}": replace(shipped, group_n=group) for group in GROUPS}
    for name, tile in others.items():
        yield Choice(name, call, functools.partial(instead_of_shipped, kernel, tile))


def gradients(inputs: Inputs) -> Iterator[Choice]:
    """Forward and backward, with the gradient's columns and products in other ways."""
    from agro_kernels._triton import gemm, head_gradients

    call = forward_and_backward(inputs)
    yield Choice("shipped", call)
    for columns in COLUMNS:
        change = functools.partial(mock.patch.object, head_gradients, "COLUMN_CHUNK", columns)
        yield Choice(f"at most {columns} columns", call, change)

    def by_way_of_fp32(result: Tensor, a: Tensor, b: Tensor) -> None:
        sums = torch.empty(result.shape, dtype=torch.float32, device=result.device)
        gemm.add_product(sums, a, b, keep=False)
        result.copy_(sums)

    change = functools.partial(mock.patch.object, head_gradients, "rounded_product", by_way_of_fp32)
    yield Choice("dweight by way of fp32", call, change)
    yield Choice("rows compacted: waits twice", forward_and_backward(inputs, compact=True))


def forward_and_backward(
    inputs: Inputs, *, share: float = 0.0, compact: bool = False
) -> Callable[[], Result]:
    """A call of the kernels for logprobs, dhidden and dweight, a share of the logits kept."""
    from agro_kernels._triton import linear_logprobs
    from agro_kernels.kept_logits import empty_kept_logits

    head = head_of(inputs, compact=compact)
    n, v = inputs.hidden.shape[0], inputs.weight.shape[0]
    budget = math.ceil(share * n * v * (inputs.hidden.element_size() + 0.1))

    def call() -> Result:
        kept = empty_kept_logits(head, budget)
        room = kept if kept.columns > 0 else None
        logprobs, lse, _ = linear_logprobs.linear_logprobs_fwd(head, False, room)
        upstream = Upstream(inputs.coefficients, None, None, lse, None)
        dhidden, dweight, _ = linear_logprobs.linear_logprobs_bwd(
            Backward(upstream, head, [True, True, False], None, room)
        )
        return logprobs, dhidden, dweight

    return call


def keeping(inputs: Inputs) -> Iterator[Choice]:
    """Forward and backward where the forward pass keeps none, some or all of the logits."""
    yield Choice("none kept", forward_and_backward(inputs))
    on_gpu = inputs.hidden.device.type == "cuda"
    reason = None if on_gpu else "these kernels keep a GPU's tiles"
    for share in SHARES:
        call = forward_and_backward(inputs, share=share)
        yield Choice(f"{share:.0%} kept", call, reason_against=reason)


def known(inputs: Inputs) -> Iterator[Choice]:
    """Known coefficients with lse: the target's logit in two ways, and the whole."""
    from agro_kernels._triton import target_logprobs

    lse = torch.zeros(inputs.hidden.shape[0], device=inputs.hidden.device)
    head = head_of(inputs)

    def blocked() -> Result:
        return (torch_linear_logprobs.many_target_logprobs(head, head.targets[:, None], lse)[1],)

    yield Choice(
        "target logits by one kernel", lambda: (target_logprobs.target_logprobs(head, lse),)
    )
    yield Choice("target logits by torch", lambda: (blocked()[0].squeeze(1),))  # type: ignore[union-attr]


def graphs(inputs: Inputs) -> Iterator[Choice]:
    """Forward and backward, launched one by one and from a CUDA graph: what launching costs."""
    call = forward_and_backward(inputs)
    yield Choice("launched", call)
    if inputs.hidden.device.type != "cuda":
        yield Choice("a CUDA graph", call, reason_against="a CPU has no CUDA graphs")
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or probed at a first call
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Result:
        graph.replay()
        return results

    yield Choice("a CUDA graph", replay)


def sums(inputs: Inputs) -> Iterator[Choice]:
    """The summed cross-entropy and its gradients, by us and by the peers that are installed."""
    equal = replace(inputs, coefficients=torch.ones_like(inputs.coefficients), lse=None)
    for name in (Ours.name, "torch", "torch_compile", "trl_chunked", "liger_scaled", "quack"):
        provider_type = PROVIDERS[name]
        reason = provider_type.missing()
        if name == "torch_compile" and inputs.hidden.device.type == "cpu":
            reason = "not for cpu here: compiling takes longer than all else"
        if reason is None:
            provider = provider_type()
            reason = provider.reason_against("known_coefficients", False, equal)
        if reason is not None:
            yield Choice(name, tuple, reason_against=reason)
            continue
        yield Choice(
            name, results_of(Step(provider, "known_coefficients", equal, with_entropy=False))
        )


def results_of(step: Step) -> Callable[[], Result]:
    def call() -> Result:
        step()
        found = step.results()
        return found.dhidden, found.dweight

    return call


PARTS: dict[str, tuple[str, Callable[[Inputs], Iterator[Choice]]]] = {
    # name -> (the form whose products are its floor, its choices)
    "forward": ("forward", forward),
    "gradients": ("forward_backward", gradients),
    "keeping": ("forward_backward", keeping),
    "known": ("forward", known),
    "graphs": ("forward_backward", graphs),
    "sums": ("known_coefficients", sums),
}
