"""How near `agro plan` comes to what a training step really holds, on a CPU.

    python -m benchmarks.trainer.plan [--cases small small_checkpointing ...] [--results FOLDER]

Prints a row a case and stage and writes bench_plan.csv.

Question: is the memory that a plan names the memory that a run takes? Each case runs in a fresh
process: the trainer's own update (two passes without gradients, and one with, over two
micro-batches of token_budget tokens), and transformers' generation of a step. Every completion has
the length that the configuration allows, as a plan assumes.

Method. `planned_mb` is the plan's largest of scoring, update and optimiser, or its sampling.
`measured_mb` is the most memory in RAM (Linux's VmHWM) during the second update, or during
generation, less what the process had after a step of a tiny model and before the case's model was
loaded: Python, the libraries and their code are no part of a plan. Freed blocks above 64 kB
return to the system at once (MALLOC_MMAP_THRESHOLD_), so that what is in RAM is what is alive.
`apart` is planned / measured - 1.

Cases, all with random weights: a Llama whose activations are most of the memory (small), the
architecture of SmolLM2-135M, whose weights are (smollm2), each also with gradient checkpointing, an
adapter, or bfloat16; and a Llama so small that its step takes seconds (smoke).
"""

import argparse
import copy
import csv
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig

from agro_train import config as configuration
from agro_train.config import TrainConfig
from agro_train.data.batch import build_batch
from agro_train.engines.transformers_engine import generate
from agro_train.models import make_optimizer
from agro_train.plan.machine import Machine
from agro_train.plan.memory import plan
from agro_train.policy import tiny
from agro_train.policy.adapter import AdapterOff, add_adapter
from agro_train.policy.attention import name_at_load, settle
from agro_train.policy.load import load_architecture, prepare, set_matmul_precision
from agro_train.policy.policy import Policy
from agro_train.run import Start
from agro_train.step import update
from agro_train.types import Prompt, Rollout
from benchmarks.measure import timing
from benchmarks.measure.arguments import parser_of
from benchmarks.measure.rows import RESULTS, column_names, texts

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}
SMOKE = {
    **SMALL,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "vocab_size": 16384,
}
COMMON = ["data=tiny-arithmetic", "share_prompts=false", "max_prompt_length=8", "eval_every=0"]
OF_SMALL = [*COMMON, "prompts_per_step=2", "num_generations=4", "max_completion_length=249",
            "token_budget=1024", "generation_batch_size=8"]  # fmt: skip
OF_SMOLLM2 = [*COMMON, "model=smollm2", "prompts_per_step=2", "num_generations=4",
              "max_completion_length=25", "token_budget=64", "generation_batch_size=8"]  # fmt: skip
OF_SMOKE = [*COMMON, "prompts_per_step=2", "num_generations=4", "max_completion_length=121",
            "token_budget=512", "generation_batch_size=8"]  # fmt: skip
CASES = {
    "smoke": OF_SMOKE,
    "smoke_checkpointing": [*OF_SMOKE, "gradient_checkpointing=true"],
    "smoke_adapter": [*OF_SMOKE, "use_peft=true"],
    # torch's own products: what oneDNN keeps for each shape is no tensor.
    "smoke_adapter_highest": [*OF_SMOKE, "use_peft=true", "matmul_precision=highest"],
    "smoke_bf16": [*OF_SMOKE, "mixed_precision=bf16"],
    "smoke_eager": [*OF_SMOKE, "attn_implementation=eager"],
    "small": OF_SMALL,
    "small_checkpointing": [*OF_SMALL, "gradient_checkpointing=true"],
    "small_adapter": [*OF_SMALL, "use_peft=true"],
    "small_bf16": [*OF_SMALL, "mixed_precision=bf16"],
    "small_eager": [*OF_SMALL, "attn_implementation=eager"],
    "smollm2": OF_SMOLLM2,
    "smollm2_checkpointing": [*OF_SMOLLM2, "gradient_checkpointing=true"],
    "smollm2_adapter": [*OF_SMOLLM2, "use_peft=true"],
}


@dataclass(frozen=True)
class Row:
    """One stage of one case; MB are 1e6 bytes."""

    case: str
    stage: str
    settings: str
    planned_mb: float | None
    measured_mb: float | None
    apart: float | None
    cpu: str
    torch: str
    threads: str
    commit: str


def case_config(name: str, folder: str) -> TrainConfig:
    """The configuration of a case; the small model's architecture is written to `folder`."""
    settings = CASES[name]
    if not any(setting.startswith("model=") for setting in settings):
        LlamaConfig(**(SMOKE if name.startswith("smoke") else SMALL)).save_pretrained(folder)
        settings = [*settings, f"model={folder}"]
    return configuration.load(None, settings)


def models(config: TrainConfig) -> tuple[Policy, torch.nn.Module]:
    """Policy and reference, as `setup` makes them on one process."""
    base: Any = AutoModelForCausalLM.from_config(
        load_architecture(config.model, offline=True),
        dtype=torch.float32,
        attn_implementation=name_at_load(config.attn_implementation),
    )
    settle(base, config.attn_implementation)
    prepare(base, config)
    if config.use_peft:
        add_adapter(base, config, None)
        policy = Policy(base)
        return policy, AdapterOff(policy)
    return Policy(copy.deepcopy(base)), Policy(base).requires_grad_(False)


def batch_of(config: TrainConfig, vocabulary: int) -> Any:
    """A step's completions of the greatest length."""
    ids = torch.randint(2, vocabulary, (config.max_prompt_length + config.max_completion_length,))
    prompt, completion = ids.split([config.max_prompt_length, config.max_completion_length])
    rollouts, groups = [], []
    for group in range(config.prompts_per_step):
        for number in range(config.num_generations):
            rollouts.append(
                Rollout(
                    group=str(group),
                    prompt="",
                    prompt_ids=tuple(prompt.tolist()),
                    completion="",
                    completion_ids=tuple(completion.tolist()),
                    finish="stop",
                    reward=float(number % 2),
                )
            )
            groups.append(group)
    return build_batch(
        rollouts,
        groups,
        [True] * len(rollouts),
        token_budget=config.token_budget,
        share_prompts=config.share_prompts,
    )


class Steps:
    """Policy, reference and optimiser of a configuration, and updates of them."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        policy, reference = models(config)
        self.model: Any = policy.model
        self.policy = accelerator.prepare_model(policy)
        self.reference = reference
        if not config.use_peft:
            self.reference = accelerator.prepare_model(reference, evaluation_mode=True)
        self.optimizer, self.scheduler = make_optimizer(config, self.policy, Start())
        self.batch = batch_of(config, self.model.config.vocab_size)

    def update(self) -> None:
        update(
            self.policy,
            self.reference,
            self.batch,
            self.config,
            self.accelerator,
            self.optimizer,
            self.scheduler,
        )

    def sample(self) -> None:
        config = self.config
        ids = tuple(range(2, 2 + config.max_prompt_length))
        prompts = [Prompt("", "", ids, {})] * config.prompts_per_step
        with self.accelerator.autocast():
            generate(
                self.model,
                tiny.build_tokenizer(),  # what its text is does not matter
                prompts,
                seeds=list(range(len(prompts))),
                num_generations=config.num_generations,
                temperature=1.0,
                max_completion_length=config.max_completion_length,
                batch_size=config.generation_batch_size,
                end_tokens={self.model.config.vocab_size + 1},  # never drawn
            )


def measure(name: str) -> dict[str, float]:
    """Measured bytes of the two stages of a case, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        config = case_config(name, folder)
        accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=True)
        set_matmul_precision(config.matmul_precision)
        small = configuration.load(
            None, [*COMMON, "warm_start_steps=0", "model=tiny", "max_completion_length=16"]
        )
        warm = Steps(small, accelerator)
        warm.update()
        warm.sample()
        del warm
        timing.reset_peak()
        before = timing.resident_bytes()
        steps = Steps(config, accelerator)
    steps.update()
    timing.reset_peak()
    steps.update()
    found = {"update": float(timing.high_water_bytes() - before)}
    timing.reset_peak()
    steps.sample()
    found["sampling"] = float(timing.high_water_bytes() - before)
    return found


def planned(name: str) -> dict[str, float]:
    """The same of the plan."""
    with tempfile.TemporaryDirectory() as folder:
        found = plan(case_config(name, folder), Machine(gpus=1, gpu="cpu"))
    totals = {stage.name: stage.total for stage in found.stages}
    updating = max(totals[stage] for stage in ("scoring", "update", "optimiser"))
    return {"update": updating, "sampling": totals["sampling"]}


def rows_of(case: str, measured: dict[str, float], facts: dict[str, str]) -> list[Row]:
    """A row for each stage, printed, too."""
    rows = []
    for stage, size in planned(case).items():
        apart = size / measured[stage] - 1
        print(
            f"{case:24s}{stage:10s} planned {size / 1e6:7.0f} MB   measured "
            f"{measured[stage] / 1e6:7.0f} MB   {apart:+.1%}",
            flush=True,
        )
        about = (facts[name] for name in ("cpu", "torch", "threads", "commit"))
        settings = " ".join(CASES[case])
        rows.append(Row(case, stage, settings, size / 1e6, measured[stage] / 1e6, apart, *about))
    return rows


def write(rows: list[Row], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench_plan.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(column_names(Row))
        writer.writerows(map(texts, rows))
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--process", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.process:
        print(json.dumps(measure(options.process)))
        return 0
    facts = timing.machine_facts()
    rows: list[Row] = []
    for case in options.cases:
        command = [sys.executable, "-m", "benchmarks.trainer.plan", "--process", case]
        environment = {**os.environ, **timing.RETURNS_FREED_MEMORY}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode != 0:
            print(f"{case}: ended with status {done.returncode}, see its output above")
            return 1
        measured = json.loads(done.stdout.splitlines()[-1])
        rows += rows_of(case, measured, facts)
    print(write(rows, options.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
