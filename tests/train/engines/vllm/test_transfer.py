"""vLLM's own code for NCCL reads what the trainer broadcasts; here over gloo, on a CPU."""

import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from agro_train.engines.background import in_background
from agro_train.engines.weight_transfer import NEVER_CUT, GlooGroup, Transfer

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]


def joined() -> tuple[GlooGroup, GlooGroup]:
    """Two ends of a group in this process."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=60))
    ends = [
        in_background(
            lambda rank=rank: GlooGroup(store, rank, 2, "127.0.0.1", 60, 60)  # type: ignore[misc]
        )
        for rank in range(2)
    ]
    trainer, worker = (end.result(60) for end in ends)
    return trainer, worker


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllms_nccl_backend_reads_each_parcel(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.weight_transfer import packed_tensor
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLWeightTransferEngine,
        NCCLWeightTransferInitInfo,
        NCCLWeightTransferUpdateInfo,
    )

    # Imported when weights arrive, which takes a while the first time.
    from vllm.model_executor.model_loader import mtp_validation  # noqa: F401

    # Of NCCL's, only what a CPU lacks: streams, and the communicator.
    streams = (SimpleNamespace(synchronize=lambda: None),)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda *_: streams)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    trainer, worker = joined()

    def broadcast(packed: torch.Tensor, src: int) -> None:
        assert src == 0
        done = worker.start(packed)
        while not done():
            time.sleep(0.001)

    info = NCCLWeightTransferInitInfo(
        master_address="127.0.0.1",
        master_port=1,
        rank_offset=1,
        world_size=2,
        packed=True,
        packed_buffer_size_bytes=NEVER_CUT,
        packed_num_buffers=1,
    )
    arrived: dict[str, torch.Tensor] = {}

    def load_weights(weights: list[tuple[str, torch.Tensor]]) -> None:
        arrived.update({name: weight.clone() for name, weight in weights})

    engine = object.__new__(NCCLWeightTransferEngine)
    engine.model = SimpleNamespace(load_weights=load_weights)
    engine.device = torch.device("cpu")
    engine.model_update_group = SimpleNamespace(broadcast=broadcast)
    engine.packed = info.packed
    engine.packed_buffer_size_bytes = info.packed_buffer_size_bytes
    engine.packed_num_buffers = info.packed_num_buffers

    def take(update: dict[str, Any]) -> None:
        engine.receive_weights(NCCLWeightTransferUpdateInfo(**update))

    sent = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(5, 2).to(dtype).T}
    transfer, receive = Transfer(trainer, 60.0), take
    check: Callable[[], bool] = lambda: all(torch.equal(arrived[n], w) for n, w in sent.items())  # noqa: E731
    for _ in range(2):
        transfer.send(sent, receive)
        assert check()
        sent = {name: weight + 1 for name, weight in sent.items()}
