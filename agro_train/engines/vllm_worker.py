"""Inside vLLM's worker processes: the policy's weights, from files, from a group that the trainer
broadcasts to, or, where trainer and worker are one process, as they are.

A backend, by the name "agro", of vLLM's own weight transfer interface. A worker has it once it has
imported this module, which `worker_extension_cls` makes it do. Which of the ways it is, the trainer
says when it joins; over NCCL vLLM's own backend receives.
"""

import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from agro_train.engines.weight_transfer import JOIN_S, NEVER_CUT, GlooGroup, sizes, unpacked

BACKEND = "agro"
REACH_S = 10.0  # to reach the trainer, once it is known to listen
PARCEL_S = 600.0  # for the trainer's next bytes, once it has said that they come
POLL_S = 0.001


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the trainer's group meets, in the fields of vLLM's own NCCL backend; none: there is no
    group, and files come."""

    master_address: str | None = None
    master_port: int | None = None
    rank_offset: int = 1
    world_size: int = 0
    packed: bool = True
    packed_buffer_size_bytes: int = NEVER_CUT
    packed_num_buffers: int = 1
    group: str = "nccl"  # or gloo


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Some of the weights, by their names in a checkpoint. One of three."""

    path: str | None = None  # of a safetensors file
    weights: dict[str, Tensor] | None = None
    names: list[str] = field(default_factory=list)  # of what the trainer broadcasts
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)


class AgroWeightTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Every worker receives all weights and keeps its part. A file may go, and a tensor change,
    when the update is finished."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.parts = parts
        self.gloo: GlooGroup | None = None
        self.nccl: NCCLWeightTransferEngine | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()  # the group of an earlier run
        address, port = init_info.master_address, init_info.master_port
        if address is None or port is None:
            return
        if init_info.group == "nccl" and self.device.type != "cuda":
            raise ValueError(f"vLLM's worker is on {self.device.type}, where there is no NCCL")
        # At once, and not after the minutes that a store tries it.
        with socket.create_connection((address, port), timeout=REACH_S) as way:
            own_address = way.getsockname()[0]
        if init_info.group == "nccl":
            names = NCCLWeightTransferInitInfo.__dataclass_fields__
            given = {name: value for name, value in vars(init_info).items() if name in names}
            self.nccl = NCCLWeightTransferEngine(*self.parts)
            self.nccl.init_transfer_engine(NCCLWeightTransferInitInfo(**given))
            if self.nccl.model_update_group.disabled:
                raise ValueError("vLLM's worker found no NCCL")
        else:
            within = timedelta(seconds=JOIN_S)
            store = dist.TCPStore(  # type: ignore[attr-defined]
                address, port, None, False, within, wait_for_workers=False, use_libuv=False
            )
            ranks = self.parallel_config
            rank = ranks.data_parallel_index * ranks.world_size + ranks.rank
            size = init_info.world_size
            self.gloo = GlooGroup(
                store, rank + init_info.rank_offset, size, own_address, JOIN_S, PARCEL_S
            )

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.path is not None:
            # Not from a map of the file: layers may be put together after it has gone.
            weights = load_file(update_info.path)
            self.load((name, weight.clone()) for name, weight in weights.items())
        elif update_info.weights is not None:
            # Not the trainer's own memory, which layers may keep until the update is finished.
            self.load((name, weight.clone()) for name, weight in update_info.weights.items())
        elif self.nccl is not None:
            self.nccl.receive_weights(
                NCCLWeightTransferUpdateInfo(
                    update_info.names, update_info.dtype_names, update_info.shapes
                )
            )
        else:
            self.load(self.broadcast(update_info))

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.model.load_weights(weights)

    def broadcast(self, update_info: UpdateInfo) -> list[tuple[str, Tensor]]:
        if self.gloo is None:
            raise RuntimeError("weights are to come from a group that this worker is not in")
        told = update_info.dtype_names, update_info.shapes
        packed = torch.empty(sum(sizes(*told)), dtype=torch.uint8)
        done = self.gloo.start(packed)
        while not done():
            time.sleep(POLL_S)
        return unpacked(packed, update_info.names, *told)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # A head that is tied to the embeddings, on a CPU: it multiplies by a packed copy of the
            # weight, and no file has told vLLM that it is another one now.
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        if self.gloo is not None:
            self.gloo.close()
        if self.nccl is not None:
            self.nccl.shutdown()
        self.gloo = self.nccl = None


class WorkerExtension:
    """Adds nothing: vLLM imports the module of the class it is given."""


WeightTransferEngineFactory.register_engine(BACKEND, AgroWeightTransfer)
EXTENSION = f"{__name__}.{WorkerExtension.__name__}"
