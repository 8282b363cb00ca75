"""Weights on their way to an engine: parcels of limited size, in memory or as safetensors files."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch import Tensor

from agro_train.config import TrainConfig
from agro_train.refusal import Refusal

MEMORY = Path("/dev/shm")  # files that never reach a disk, where the system has such a folder
FILE_BYTES = 1 << 30  # a file is full once it has this many
PARCEL_BYTES = 1 << 28  # what is sent at once, on the trainer's device beside the policy

Parcel = Path | Mapping[str, Tensor]


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
    on_cpu = ((name, weight.to(dtype or weight.dtype).cpu()) for name, weight in weights)
    for number, held in enumerate(parcels(on_cpu, FILE_BYTES)):
        path = folder / f"weights-{number}.safetensors"
        save_file({name: weight.contiguous() for name, weight in held.items()}, path)
        held.clear()
        yield path


def parcels(weights: Iterator[tuple[str, Tensor]], full: int) -> Iterator[dict[str, Tensor]]:
    """Each of `full` bytes and a tensor at most."""
    held: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        held[name] = weight
        size += weight.nbytes
        if size >= full:
            yield held
            held, size = {}, 0
    if held:
        yield held


def weights_folder(config: TrainConfig, *, takes_tensors: bool = False) -> Path:
    """Where weights lie on their way to vLLM: where both sides see them.

    Args:
        takes_tensors: whether they only wait there, and this process sends them on.
    """
    if config.vllm_weights_dir:
        return Path(config.vllm_weights_dir).resolve()
    hosts = {urlsplit(url).hostname for url in config.vllm_server_base_url}
    near = (
        takes_tensors
        or config.vllm_mode == "colocate"
        or hosts <= {"localhost", "127.0.0.1", "::1"}
    )
    if near:
        return MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
    return Path(config.output_dir).resolve()


def make_weights_folder(config: TrainConfig, *, takes_tensors: bool = False) -> None:
    folder = weights_folder(config, takes_tensors=takes_tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(
            f"vllm_weights_dir: expected a folder to write weights to, got {folder}: {error}"
        ) from error


def rollout_dtype(config: TrainConfig) -> torch.dtype:
    """What the policy computes in, and so what vLLM should."""
    low = config.mixed_precision == "bf16" or config.dtype == "bfloat16"
    return torch.bfloat16 if low else torch.float32
