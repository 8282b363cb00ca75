"""Weights on their way to a vLLM server by a collective.

The trainer's main process and the server's workers join a group, in which the trainer broadcasts
one parcel of weights after another. With "nccl" the group is vLLM's own, and the bytes are what
vLLM's own NCCL backend reads. With "gloo" the same lines run between CPUs. Each server has a group
of its own, so that one that dies takes no other with it.
"""

import math
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from agro_train.engines.background import in_background
from agro_train.engines.engine import BrokenEngine

Kind = Literal["nccl", "gloo"]

JOIN_S = 60.0  # to join a group
POLL_S = 0.001
# A call of /update_weights takes one parcel in one broadcast, however large: vLLM cuts what arrives
# where it exceeds this many bytes.
NEVER_CUT = 1 << 62


class Group(Protocol):
    """The trainer, which is rank 0, and the workers of a server."""

    device: torch.device  # where what is broadcast lies

    def start(self, packed: Tensor) -> Callable[[], bool]:
        """Begins to broadcast rank 0's bytes into everyone's. What it gives tells whether that is
        done, and raises where it failed. `packed` must be kept until then."""

    def close(self) -> None:
        """Leaves the group, when what is under way in it has ended or its time is over."""


class GlooGroup:
    """Of CPUs. It leaves the process's own groups alone.

    Args:
        store: of torch.distributed, where the group meets.
        own_address: of this machine, at which the others reach it.
        within_s: seconds for all to join.
        limit_s: seconds for one broadcast.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        own_address: str,
        within_s: float,
        limit_s: float,
    ) -> None:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address)]
        options._timeout = timedelta(seconds=within_s)
        self.group: Any = dist.ProcessGroupGloo(store, rank, size, options)
        self.limit = timedelta(seconds=limit_s)

    def start(self, packed: Tensor) -> Callable[[], bool]:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.timeout = self.limit
        work = self.group.broadcast([packed], options)
        return lambda: work.is_completed() and bool(work.wait())

    def close(self) -> None:
        # Torch waits here for a broadcast that nobody has taken, until its time limit.
        self.group = None


class NcclGroup:
    """Of GPUs: vLLM's own communicator.

    Args:
        communicator: a PyNcclCommunicator.
    """

    def __init__(self, communicator: Any, device: torch.device) -> None:
        # vLLM's broadcast does nothing, silently, where it found no NCCL.
        if communicator.disabled:
            raise RuntimeError("vLLM found no NCCL here")
        self.communicator, self.device = communicator, device
        # Beside what the trainer computes: a copy of older weights may go out during an update.
        self.stream = torch.cuda.Stream(device)

    def start(self, packed: Tensor) -> Callable[[], bool]:
        with torch.cuda.device(self.device):  # in a thread it may be another one
            self.stream.wait_stream(torch.cuda.current_stream())
            self.communicator.broadcast(packed, src=0, stream=self.stream)
            sent = torch.cuda.Event()
            sent.record(self.stream)
        return sent.query

    def close(self) -> None:
        self.communicator.destroy()  # vLLM has NCCL abort, and waits for that 5 s at most


def gloo_group(
    listening: socket.socket, size: int, device: torch.device, within_s: float, limit_s: float
) -> GlooGroup:
    """The trainer's end. Waits for the others."""
    del device
    address, port = listening.getsockname()[:2]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        size,
        True,  # this process keeps the store
        timedelta(seconds=within_s),
        wait_for_workers=False,
        use_libuv=False,  # which takes no socket that listens already
        master_listen_fd=listening.detach(),
    )
    return GlooGroup(store, 0, size, address, within_s, limit_s)


def nccl_group(
    listening: socket.socket, size: int, device: torch.device, within_s: float, limit_s: float
) -> NcclGroup:
    """The trainer's end. Waits for the others."""
    del limit_s  # NCCL has none: whoever sends looks at the clock
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.utils.nccl import unpinned_nccl_env

    if device.index is None:  # which vLLM compares with that of what is sent
        device = torch.device(device.type, torch.cuda.current_device())
    address, port = listening.getsockname()[:2]
    # vLLM takes the socket over (it detaches it), so closing ours does not close its own.
    group = StatelessProcessGroup.create(
        address, port, 0, size, store_timeout=math.ceil(within_s), listen_socket=listening
    )
    with unpinned_nccl_env():
        return NcclGroup(PyNcclCommunicator(group, device), device)


MADE_BY: dict[str, Callable[[socket.socket, int, torch.device, float, float], Group]] = {
    "nccl": nccl_group,
    "gloo": gloo_group,
}


class Transfer:
    """The trainer's end of the group with one server."""

    def __init__(self, group: Group, limit_s: float) -> None:
        self.group, self.limit_s = group, limit_s

    def send(self, weights: Mapping[str, Tensor], take: Callable[[dict[str, Any]], object]) -> None:
        """Broadcasts the weights, while `take` has the server receive them.

        Args:
            weights: of one dtype.
            take: tells the server what comes, and returns when it has arrived there.
        Raises:
            BrokenEngine: if the server does not take them.
        """
        update = {
            "names": list(weights),
            "dtype_names": [str(w.dtype).removeprefix("torch.") for w in weights.values()],
            "shapes": [list(w.shape) for w in weights.values()],
        }
        packed = pack(weights, self.group.device)
        told = in_background(lambda: take(update))
        try:
            done = self.group.start(packed)
            wait(done, told, self.limit_s)
            told.result(self.limit_s)
        except (RuntimeError, TimeoutError) as error:
            raise BrokenEngine(
                f"vllm: expected {sum(w.nbytes for w in weights.values())} bytes of weights to "
                f"reach the server within {self.limit_s:g} s, got {reason(error)}; start the "
                "server again with `agro serve MODEL`, and then the run with --resume"
            ) from error

    def close(self) -> None:
        self.group.close()


def pack(weights: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """(bytes,) uint8 on the device: the weights in their order, one after another."""
    flat = [w.to(device).contiguous().view(-1).view(torch.uint8) for w in weights.values()]
    return torch.cat(flat)


def unpacked(
    packed: Tensor, names: list[str], dtype_names: list[str], shapes: list[list[int]]
) -> list[tuple[str, Tensor]]:
    """The weights that `pack` put together: views of the bytes."""
    dtypes = [getattr(torch, name) for name in dtype_names]
    parts = packed.split(sizes(dtype_names, shapes))
    return [
        (name, part.view(dtype).view(shape))
        for name, part, dtype, shape in zip(names, parts, dtypes, shapes, strict=True)
    ]


def sizes(dtype_names: list[str], shapes: list[list[int]]) -> list[int]:
    """Bytes of each of the weights."""
    return [
        int(torch.Size(shape).numel()) * int(getattr(torch, name).itemsize)
        for name, shape in zip(dtype_names, shapes, strict=True)
    ]


def join(
    kind: Kind,
    base_url: str,
    workers: int,
    tell: Callable[[dict[str, Any]], object],
    device: torch.device,
    limit_s: float,
) -> Transfer:
    """A group of this process and the workers of the server.

    Args:
        base_url: of the server.
        tell: has the server's workers join what its argument describes, and returns once they have.
        device: of the trainer.
        limit_s: seconds that a parcel may take later on; joining takes JOIN_S at most.
    Raises:
        BrokenEngine: in one sentence with both addresses, if the group does not come about.
    """
    within, here, size = min(JOIN_S, limit_s), "no address of this machine", 1 + workers
    try:
        with listen(base_url) as listening:
            address, port = listening.getsockname()[:2]
            here = f"{address}:{port}"
            # The fields of vLLM's own NCCL backend, which an `agro serve` understands, too.
            meeting = {
                "master_address": address,
                "master_port": port,
                "rank_offset": 1,  # the trainer is rank 0
                "world_size": size,
                "packed": True,
                "packed_buffer_size_bytes": NEVER_CUT,
                "packed_num_buffers": 1,
            }
            if kind != "nccl":
                meeting["group"] = kind
            told = in_background(lambda: tell(meeting))
            made = in_background(lambda: MADE_BY[kind](listening, size, device, within, limit_s))
            try:
                wait(made.done, told, within)
                group = made.result()
                told.result(within)
            except Exception:
                # Nobody uses the group: neither one that is there, nor one that comes about later.
                made.add_done_callback(close_made)
                raise
    except Exception as error:  # of sockets, stores, NCCL, vLLM: there is no common class
        raise BrokenEngine(
            f"vllm_weight_transfer: expected the server at {base_url} and the trainer at {here} to "
            f"join a group of {kind} within {within:g} s, got {reason(error)}; let the server "
            "reach that address, or set vllm_weight_transfer=files"
        ) from error
    return Transfer(group, limit_s)


def close_made(made: Future[Group]) -> None:
    """Closes the group, if there is one."""
    if made.exception() is None:
        made.result().close()


def listen(base_url: str) -> socket.socket:
    """A socket at this machine's address on the way to the server, at any free port."""
    split = urlsplit(base_url)
    port = split.port or (443 if split.scheme == "https" else 80)
    with socket.create_connection((split.hostname, port), timeout=JOIN_S) as way:
        address, family = way.getsockname()[0], way.family
    return socket.create_server((address, 0), family=family)


def wait(done: Callable[[], bool], told: Future[Any], limit_s: float) -> None:
    """Until it is done. Raises what the other side failed with, or TimeoutError."""
    deadline = time.monotonic() + limit_s
    while not done():
        if told.done():
            told.result()
        if time.monotonic() > deadline:
            raise TimeoutError("nothing in that time")
        time.sleep(POLL_S)


def reason(error: BaseException) -> str:
    """One line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
