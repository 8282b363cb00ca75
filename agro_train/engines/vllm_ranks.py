"""vLLM beside the trainer on several ranks: an engine of each rank's own, or one that consecutive
ranks share, each with a part of the model.
"""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist

from agro_train.engines.engine import TOKENS_S
from agro_train.engines.vllm_beside import Colocated, Served
from agro_train.engines.vllm_client import Answer, Request

# What a launcher tells its processes. vLLM's own processes would take it for theirs: they would
# look for the launch's store, or take the rank's number for that of a GPU.
OF_THE_LAUNCH = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID",
)


@contextmanager
def alone(local_rank: int) -> Iterator[None]:
    """What is started within knows nothing of the launch, and sees one GPU: this rank's."""
    before = {name: os.environ.get(name) for name in (*OF_THE_LAUNCH, "CUDA_VISIBLE_DEVICES")}
    for name in OF_THE_LAUNCH:
        os.environ.pop(name, None)
    if torch.cuda.is_available():
        visible = before["CUDA_VISIBLE_DEVICES"]
        devices = visible.split(",") if visible else [str(i) for i in range(local_rank + 1)]
        # A launcher may have left each rank one device.
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local_rank % len(devices)]
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Shared(Colocated):
    """One engine of `vllm_tensor_parallel_size` consecutive ranks, in their own processes.

    Each rank asks for its own prompts: all ranks of the engine generate those of all, and each
    keeps its part. A completion depends on its own seed, and so not on who shares an engine.
    """

    takes_tensors = True
    failed = False  # vLLM itself has
    options: ClassVar[dict[str, Any]] = {"distributed_executor_backend": "external_launcher"}

    def __init__(self, served: Served) -> None:
        size = served.config.vllm_tensor_parallel_size
        limit = timedelta(seconds=TOKENS_S)  # a rank waits for what others decode
        together = [list(range(i, i + size)) for i in range(0, dist.get_world_size(), size)]
        self.group, _ = dist.new_subgroups_by_enumeration(together, timeout=limit, backend="gloo")
        with kept():
            super().__init__(served)

    def ask(self, requests: Sequence[Request]) -> list[tuple[int, Answer]]:
        everyone = self._gathered(list(requests))
        answers = self._generated(everyone)
        first = sum(len(asked or ()) for asked in everyone[: dist.get_rank(self.group)])
        return [(place, answers[first + place]) for place in range(len(requests))]

    @contextmanager
    def asking(self) -> Iterator[None]:
        """In this block the rank asks for all that it wants. Whether it gets it or fails at it, it
        then generates for the engine's other ranks, which would wait for it. The block's own
        failure is the one that is raised."""
        try:
            yield
        except Exception as first:
            try:
                self.rest()
            except Exception as second:
                first.add_note(f"Then, generating for other ranks: {second!r}")
            raise
        self.rest()

    def rest(self) -> None:
        """Generates what other ranks of the engine still ask for, until none does."""
        if self.failed:
            return
        everyone = self._gathered(None)
        while any(asked is not None for asked in everyone):
            self._generated(everyone)
            everyone = self._gathered(None)

    def _generated(self, everyone: Sequence[Sequence[Request] | None]) -> list[Answer]:
        asked = [request for requests in everyone for request in requests or ()]
        try:
            return [answer for _, answer in super().ask(asked)]
        except Exception:
            # On all ranks of the engine, or the others wait in vLLM: none asks for more.
            self.failed = True
            raise

    def _gathered(self, requests: list[Request] | None) -> list[list[Request] | None]:
        everyone: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, requests, group=self.group)
        return everyone


@contextmanager
def kept() -> Iterator[None]:
    """vLLM in this very process seeds its random numbers, and may take over its threads: they are
    the trainer's again afterwards."""
    own, numpys, setting = random.getstate(), np.random.get_state(), torch.set_num_threads
    threads = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)
            torch.set_num_threads = setting
            torch.set_num_threads(threads)
