"""Compiling ahead of a search: processes leave the tiles' code in Triton's cache on disk."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace

import torch

from agro_kernels.tiles import TileConfig
from benchmarks.head.providers.base import make_inputs
from benchmarks.head.tune_kernel import call_of, describe, instead_of_shipped
from benchmarks.measure.shapes import Shape

COMPILED_TOKENS = 64  # of the call that compiles: the code does not depend on their number


def compile_ahead(
    kernel: str,
    tiles: Sequence[TileConfig],
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    workers: int,
) -> None:
    """Compiles all tiles, each for every head of the shapes, in `workers` processes."""
    heads = {shape.head: replace(shape, tokens=COMPILED_TOKENS) for shape in shapes}
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tiles)), mp_context=spawned) as pool:
        futures = [
            pool.submit(compile_one, kernel, tile, list(heads.values()), dtype) for tile in tiles
        ]
    for tile, future in zip(tiles, futures, strict=True):
        if (error := future.exception()) is not None:
            print(f"{describe(tile)}: not compiled ahead, its process ended: {error}")


def compile_one(kernel: str, tile: TileConfig, shapes: Sequence[Shape], dtype: torch.dtype) -> None:
    """Compiles one tile. One that fails here fails again, and is reported, when it is checked."""
    for shape in shapes:
        with suppress(Exception), instead_of_shipped(kernel, tile):
            call_of(kernel, make_inputs(shape, dtype, "cuda"))()
            torch.cuda.synchronize()
