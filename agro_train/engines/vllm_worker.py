"""Inside vLLM's worker processes: the policy's weights, read from files.

A backend, by the name "agro", of vLLM's own weight transfer interface. A worker has it once it has
imported this module, which `worker_extension_cls` makes it do.
"""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

BACKEND = "agro"


@dataclass
class FilesInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing has to be agreed on."""


@dataclass
class FilesUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    path: str  # a safetensors file of some of the weights, by their names in a checkpoint


class FilesWeightTransfer(WeightTransferEngine[FilesInitInfo, FilesUpdateInfo]):  # type: ignore[misc]
    """Every worker reads every file and keeps its part. A file may go when the update returns."""

    init_info_cls = FilesInitInfo
    update_info_cls = FilesUpdateInfo

    def init_transfer_engine(self, init_info: FilesInitInfo) -> None:
        del init_info

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FilesUpdateInfo) -> None:
        # Not from a map of the file: layers may be put together after it has gone.
        weights = load_file(update_info.path)
        self.model.load_weights((name, weight.clone()) for name, weight in weights.items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # A head that is tied to the embeddings, on a CPU: it multiplies by a packed copy of the
            # weight, and no file has told vLLM that it is another one now.
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class WorkerExtension:
    """Adds nothing: vLLM imports the module of the class it is given."""


WeightTransferEngineFactory.register_engine(BACKEND, FilesWeightTransfer)
EXTENSION = f"{__name__}.{WorkerExtension.__name__}"
