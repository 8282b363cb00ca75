"""How long a sharded run is held up by a checkpoint: written beside its next steps, or before them.

    python -m benchmarks.trainer.saving [--ranks 2] [--out FILE]

Question: how much of the time that a checkpoint takes do the next steps hide?

Method. A Llama of SmolLM2-135M's shape with random float32 weights and AdamW's moments, sharded
over the ranks (gloo, on the CPU, a core each) as `agro train fsdp=true` does it. A step is a
forward and a backward pass over --tokens tokens and AdamW's update. A round is some steps without a
checkpoint, and as many after one has begun, by each way in turn: `beside`, as the trainer does it,
and `before`, where the run waits until the checkpoint is complete. The ranks wait for each other in
every step, so the main rank's clock speaks for all.

One row of the CSV is one checkpoint:

    way            beside, before
    round
    ranks
    checkpoint_mb  files of the checkpoint, 1e6 bytes
    step_s         a step of this round without a checkpoint, the mean
    steps          that followed the checkpoint's beginning
    held_s         until the first of them could begin
    complete_s     until the checkpoint was seen to be complete; beside steps, at the end of one
    lost_s         until steps and checkpoint were done, beyond as many steps without a checkpoint
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from agro_train.data.batch import pack
from agro_train.policy import tiny
from agro_train.policy.checkpoint import Learner, TrainerState
from agro_train.policy.policy import Policy, shard
from agro_train.policy.saver import Saver
from agro_train.ranks import Ranks
from agro_train.run_folder import RunFolder
from agro_train.types import Rollout
from benchmarks.measure.arguments import parser_of
from benchmarks.measure.rows import RESULTS

WAYS = ("beside", "before")
LEARNING_RATE = 1e-6


def config_of(layers: int) -> LlamaConfig:
    """SmolLM2-135M's, for 30 layers."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


class Training:
    """One rank's share of a run that learns the same completion again and again."""

    def __init__(self, folder: Path, layers: int, tokens: int) -> None:
        torch.manual_seed(0)  # every rank has the same weights before they are sharded
        self.ranks = Ranks(dist.get_rank(), dist.get_world_size())
        self.policy: Any = Policy(LlamaForCausalLM(config_of(layers)))
        shard(self.policy, "no", init_device_mesh("cpu", (self.ranks.world,)))
        parameters = self.policy.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
        self.scheduler = get_scheduler("constant", self.optimizer)
        ids = tuple(range(2, 2 + tokens))
        completion = Rollout("", "", ids[:1], "", ids[1:], finish="length", reward=None)
        (self.micro,) = pack([completion], token_budget=tokens, share_prompts=False)
        self.coefficients = torch.full((tokens - 1,), 1.0 / tokens)
        self.folder, self.saver = folder, Saver(folder, self.ranks, keep=1)
        self.taken = 0

    def step(self) -> None:
        self.policy(self.micro, 1.0, self.coefficients).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1

    def begin_save(self) -> Path:
        learner = Learner(self.policy, tiny.build_tokenizer(), self.optimizer, self.scheduler)
        self.saver.save(TrainerState(step=self.taken, base_model=""), learner)
        return RunFolder(self.folder).checkpoint(self.taken)

    def without(self, steps: int) -> float:
        """Seconds a step where nothing is saved."""
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - began) / steps

    def save_once(self, way: str, steps: int, step_s: float) -> dict[str, Any]:
        """The columns of one checkpoint that the clock gives."""
        dist.barrier()
        began = time.perf_counter()
        path = self.begin_save()
        if way == "before":
            self.saver.complete()
        held = time.perf_counter() - began
        complete = held if way == "before" else None
        for _ in range(steps):
            self.step()
            if complete is None and path.is_dir():
                complete = time.perf_counter() - began
        self.saver.complete()
        total = time.perf_counter() - began
        files = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
        times = {"held_s": held, "complete_s": complete or total, "lost_s": total - steps * step_s}
        return {"checkpoint_mb": files / 1e6, "step_s": step_s, "steps": steps, **times}


def measure(training: Training, steps: int, rounds: int) -> list[dict[str, Any]]:
    training.step()  # makes the moments, and touches all memory
    rows = []
    for number in range(rounds):
        for way in WAYS if number % 2 == 0 else WAYS[::-1]:
            found = training.save_once(way, steps, training.without(steps))
            rows.append({"way": way, "round": number, "ranks": training.ranks.world, **found})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the checkpoints; default: /tmp")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_saving.csv")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    if "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc-per-node={options.ranks}", "-m", "benchmarks.trainer.saving"]
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            command = [*launch, *given, "--folder", name]
            return subprocess.call(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if options.folder is None:
        parser.error("--folder: expected a folder that all ranks see, got none; name one")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    training = Training(options.folder, options.layers, options.tokens)
    rows = measure(training, options.steps, options.rounds)
    dist.destroy_process_group()
    if training.ranks.main:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            for row in rows:
                texts = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow(texts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
