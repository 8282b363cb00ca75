"""vLLM for real: in a process beside the tests, and as a server. `make test-vllm` runs these."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agro_train.policy import tiny

# For vLLM on a CPU: GiB for its cache, and no thread bound to a core that others use too.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


class Started(NamedTuple):
    """A server, at whose address nothing may answer yet."""

    address: str
    group: int  # of processes, to kill
    log: Path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's tokenizer, and a Llama whose heads are wide enough for vLLM's kernels,
    with weights larger than at initialisation, so that errors show.
    """
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny.build_tokenizer()
    embedded = tiny.build_config(len(tokenizer)).to_dict()
    config = LlamaConfig(**embedded | {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 2})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        llama = LlamaForCausalLM(config)
        for parameter in llama.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def serve(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Started]]:
    """Starts `agro serve` on a free port, with one thread."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> Started:
        log = tmp_path_factory.mktemp("serve") / "log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "agro_train", "serve", str(model), "--port", str(port)]
        options = ["--dtype", "float32", "--max-model-len", "64", "--enforce-eager"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command + options,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        started.append(process)
        return Started(f"http://127.0.0.1:{port}", process.pid, log)

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
