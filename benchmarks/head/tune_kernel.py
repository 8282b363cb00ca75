"""A head kernel launched with a chosen tile, and what it should return."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from agro_kernels import reference, tiles
from agro_kernels.backward import Backward
from agro_kernels.head import Head, Upstream
from agro_kernels.tiles import TileConfig
from benchmarks.head.providers.base import Inputs

KERNELS = ("linear_logprobs_fwd", "linear_logprobs_bwd")


def call_of(kernel: str, inputs: Inputs) -> Callable[[], Tensor]:
    """Launches the kernel on these inputs and returns what is to be compared."""
    # Not on import: a smoke run tells Triton first that its kernels are to be interpreted.
    from agro_kernels._triton import linear_logprobs

    head = Head.of(inputs.hidden, inputs.weight, inputs.targets, softcap=inputs.softcap)
    if kernel == "linear_logprobs_fwd":
        return lambda: torch.stack(linear_logprobs.linear_logprobs_fwd(head, with_entropy=True))
    _, lse, _ = linear_logprobs.linear_logprobs_fwd(head, with_entropy=False)
    upstream = Upstream(inputs.coefficients, None, None, lse, None)
    only_bias = Backward(upstream, head, [False, False, True])
    return lambda: linear_logprobs.linear_logprobs_bwd(only_bias)[2]


def truth_of(kernel: str, inputs: Inputs) -> Tensor:
    """What `call_of` returns, in float64."""
    bias = torch.zeros(
        inputs.weight.shape[0], dtype=torch.float64, device=inputs.weight.device
    ).requires_grad_()
    logprobs, entropy, lse = reference.linear_logprobs_with_stats(
        inputs.hidden.double(),
        inputs.weight.double(),
        inputs.targets,
        bias=bias,
        softcap=inputs.softcap,
    )
    if kernel == "linear_logprobs_fwd":
        return torch.stack([logprobs, lse, entropy]).detach()
    (dbias,) = torch.autograd.grad((logprobs * inputs.coefficients.double()).sum(), bias)
    return dbias


def error_of(kernel: str, tile: TileConfig, inputs: Inputs, truth: Tensor) -> float:
    """The largest error of a tile, NaN counted as infinite."""
    with instead_of_shipped(kernel, tile):
        result = call_of(kernel, inputs)().double()
    return float((result - truth).abs().nan_to_num(nan=torch.inf).max())


@contextmanager
def instead_of_shipped(kernel: str, tile: TileConfig) -> Iterator[None]:
    """Inside, the launches of a kernel get this tile, whatever tiles.py has for them."""
    select = tiles.select

    def chosen(name: str, *arguments: Any, **options: Any) -> TileConfig:
        return tile if name == kernel else select(name, *arguments, **options)

    with mock.patch.object(tiles, "select", chosen):
        yield


def describe(tile: TileConfig) -> str:
    """Such as "128x256x64 w8 s4 group 16 splits 16 descriptors"."""
    text = f"{tile.block_n}x{tile.block_v}x{tile.block_d} w{tile.num_warps} s{tile.num_stages}"
    text += f" group {tile.group_n} splits {tile.max_splits}"
    return text + (" descriptors" if tile.descriptors else "")
