"""Weights that no process holds whole: read from safetensors files, rows by rows, into the shards
of a model that was built without any.

The files are those of a model as transformers saves it, or those that the ranks of a sharded run
wrote, each its own rows (torch.distributed.checkpoint's HuggingFaceStorageWriter).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

FOLDER = "weights"  # of a sharded run's checkpoint: a file or more of each rank
FILE_BYTES = 1 << 30  # about; what a rank writes at once is in its memory twice
SHARDING = "DCP_SHARDING_INFO"  # in a file's metadata: where each of its tensors begins


class Piece(NamedTuple):
    """Neighbouring rows of a tensor, in a file."""

    file: Path
    first: int  # row of the whole tensor; 0 for a number
    end: int


@dataclass(frozen=True)
class Stored:
    """A tensor in files, in pieces along its first dimension."""

    pieces: list[Piece]  # in the order of their rows
    row: tuple[int, ...] | None  # shape of a row; None: a single number
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...] | None:
        """None where pieces are missing in between; those at the end nobody misses here."""
        ends = [0, *(piece.end for piece in self.pieces)]
        if any(piece.first != end for piece, end in zip(self.pieces, ends, strict=False)):
            return None
        return () if self.row is None else (ends[-1], *self.row)


class Weights:
    """Tensors in safetensors files, by name. A file is open only while something is read, so that
    its pages do not count as this process's memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.tensors: dict[str, Stored] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                offsets = json.loads((opened.metadata() or {}).get(SHARDING, "{}"))
                for name in opened.keys():  # noqa: SIM118  not a mapping
                    shape = tuple(opened.get_slice(name).get_shape())
                    first = offsets[name]["saved_offsets"][0] if shape and name in offsets else 0
                    piece = Piece(file, first, first + (shape[0] if shape else 1))
                    row, none = (shape[1:], opened.get_slice(name)[:0]) if shape else (None, None)
                    dtype = (opened.get_tensor(name) if none is None else none).dtype
                    self.tensors.setdefault(name, Stored([], row, dtype)).pieces.append(piece)
        for stored in self.tensors.values():
            stored.pieces.sort(key=lambda piece: piece.first)

    def whole(self, name: str) -> Tensor:
        """The tensor; where it is in one piece its bytes are read when they are looked at."""
        parts = []
        for piece in self.tensors[name].pieces:
            with safe_open(piece.file, framework="pt") as opened:
                parts.append(opened.get_tensor(name))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read(self, name: str, target: Tensor) -> None:
        """Puts the tensor into one of its shape, of which a DTensor's local rows alone are read;
        rounded to its dtype."""
        local, first = local_rows(target.detach())
        if not local.shape:
            local.copy_(self.whole(name))
            return
        end = first + local.shape[0]
        for piece in self.tensors[name].pieces:
            start, stop = max(first, piece.first), min(end, piece.end)
            if start < stop:
                with safe_open(piece.file, framework="pt") as opened:
                    rows = opened.get_slice(name)[start - piece.first : stop - piece.first]
                    local[start - first : stop - first].copy_(rows)


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a tensor that is sharded along its first dimension, and which one is the
    first; of another tensor all."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    local = tensor.to_local()
    assert tuple(local.shape) == tuple(shape), f"expected {shape}, got {tuple(local.shape)}"
    return local, offset[0] if offset else 0


def why_not(model: nn.Module, weights: Weights) -> str | None:
    """Why a model's weights cannot be read one by one; None: they can, each under its own name."""
    names: dict[int, list[str]] = {}  # of tied weights all
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in model.named_parameters():
        known = [each for each in names[id(parameter)] if each in weights.tensors]
        if known != [name]:
            found = " and ".join(known) or "no such weight"
            return f"expected {name} in its files, got {found}"
        if (shape := weights.tensors[name].shape) != (wanted := tuple(parameter.shape)):
            found = "one with rows missing" if shape is None else str(shape)
            return f"expected {name} of shape {wanted} in its files, got {found}"
    return None


def allocate(module: nn.Module, device: torch.device) -> None:
    """Gives parameters on the meta device, shards or whole ones, memory on `device`. Tied weights
    stay tied, and buffers keep their numbers."""
    buffers = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((owner, name))
    module.to_empty(device=device)
    for owner, name, buffer in buffers:
        owner._buffers[name] = buffer.to(device)
    for (first, its_name), *others in owners.values():
        for owner, name in others:
            setattr(owner, name, getattr(first, its_name))


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, tied ones once, and the buffers that are saved with a model, by name."""
    found: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters()}
    for at, owner in model.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                found[f"{at}.{name}".lstrip(".")] = buffer
    return found


def fill(model: nn.Module, weights: Weights) -> None:
    """Reads every parameter, and of the buffers those that are saved with a model and were."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in saved_tensors(model).items():
        if name in parameters or name in weights.tensors:
            weights.read(name, tensor)


def write(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Every rank of a process group writes its rows of DTensors; of other tensors one does.

    Every rank must call it. What goes wrong on one of them is raised on all.
    """
    # The same on all ranks, whose rows differ by one.
    world, size, numbers = dist.get_world_size(group), 0, {}
    for name, tensor in tensors.items():
        numbers[name] = 1 + size // FILE_BYTES
        size += tensor.numel() * tensor.element_size() // world
    writer = HuggingFaceStorageWriter(str(folder), numbers, save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise RuntimeError(f"a rank could not write its shards: {error}") from cause


def are_in(folder: Path) -> bool:
    """Whether a folder is a checkpoint whose weights are in shards."""
    return any((folder / FOLDER).glob("shard-*.safetensors"))


def written_by(folder: Path, rank: int) -> list[Path]:
    """The files that a rank has written in a folder."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def stored(folder: Path) -> Weights:
    """What all ranks have written in a folder."""
    return Weights(sorted(folder.glob("*.safetensors")))
