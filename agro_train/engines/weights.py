"""Weights on their way to an engine: safetensors files of limited size."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

MEMORY = Path("/dev/shm")  # files that never reach a disk, where the system has such a folder
FILE_BYTES = 1 << 30  # a file is full once it has this many


@contextmanager
def gathered_by_all(weights: Iterator[tuple[str, Tensor]]) -> Iterator[None]:
    """Takes the weights to the last one, whatever the block does with them: where they are sharded
    a rank that does not write, or fails, takes part in gathering them all the same."""
    try:
        yield
    finally:
        for _ in weights:
            pass


def one_by_one(
    weights: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype
) -> Iterator[Path]:
    """Files of `dtype`, FILE_BYTES and a tensor at most; each lasts until the next one is asked
    for."""
    for path in written(weights, folder, dtype):
        yield path
        path.unlink()


def written(
    weights: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype | None
) -> Iterator[Path]:
    """The same files, all of which last. dtype: None keeps each weight's own."""
    held: dict[str, Tensor] = {}
    size = number = 0

    def write() -> Path:
        path = folder / f"weights-{number}.safetensors"
        save_file(held, path)
        held.clear()
        return path

    for name, weight in weights:
        held[name] = weight.to(dtype or weight.dtype).cpu().contiguous()
        size += held[name].nbytes
        if size >= FILE_BYTES:
            yield write()
            size, number = 0, number + 1
    if held:
        yield write()
