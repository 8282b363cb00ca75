"""Training curves of `agro train` and of TRL's AGROTrainer: the same task, settings and budget.

    python -m benchmarks.trainer.curves_trl [--seeds 8] [--steps 40]

Question: does AGRO learn the same thing at the same speed in TRL as in this project's own trainer?

Method. The tiny Llama after its supervised warm start, one folder for all runs, is policy and
reference of each; the task is two-digit sums (tiny-arithmetic), right or wrong. Seeds differ in
prompts' order and samples. Every setting that affects the result is written out in both
configurations below: 16 prompts of 8 completions a step, temperature 1, AdamW (0.9, 0.95), no
weight decay, gradients clipped at norm 1, 3 steps of warm-up and a linear decay. `agro train`
packs the batch by tokens, TRL cuts it into four micro-batches of 32 rows. Runs of `agro_slower`, at
half the learning rate, show whether the comparison would detect a difference of that size.

What is compared, of each run, on the completions that it trains on:

    start   mean reward of the first 3 steps
    whole   mean reward of all steps: the speed of learning
    end     mean reward of the last quarter of the steps
    kl      mean log(policy / reference) of a completion, nats, over the last quarter

as mean over seeds and its standard error. TRL's and ours agree where the differences of whole, end
and kl are within two standard errors and both rewards have risen by more than ten. A row of the
CSV is one step of one run.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.measure import timing
from benchmarks.measure.arguments import parser_of
from benchmarks.measure.rows import RESULTS, read_csv
from benchmarks.trainer.curves_plots import plot_training

TRAINERS = ("agro", "trl", "agro_slower")
WARM_START_STEPS = 400
BETA, LEARNING_RATE, WARMUP_STEPS = 0.01, 1e-4, 3
PROMPTS, GENERATIONS, LENGTH = 16, 8, 24
MICRO_BATCH = 32  # completions, in TRL
SAME, RISEN = 2.0, 10.0  # standard errors
MEASURES = ("start", "whole", "end", "kl")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error."""

    mean: float
    error: float

    def minus(self, other: "Estimate") -> "Estimate":
        return Estimate(self.mean - other.mean, (self.error**2 + other.error**2) ** 0.5)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


# --- In a run's own process -----------------------------------------------------------------------


def make_base(folder: Path) -> None:
    """Saves the warm-started model, its tokenizer and the training prompts."""
    from agro_train.data.tasks import tiny_arithmetic
    from agro_train.policy import tiny

    rows = tiny_arithmetic("train")
    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(len(tokenizer), seed=0)
    tiny.warm_start(model, tokenizer, rows, steps=WARM_START_STEPS, seed=0)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    kept = [{name: row[name] for name in ("prompt", "answer")} for row in rows]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def run_agro(folder: Path, seed: int, steps: int, learning_rate: float) -> list[dict[str, float]]:
    """Reward and KL of each step of `agro train`."""
    from agro_train import config
    from agro_train.setup import setup
    from agro_train.train import train

    output = folder / f"agro-{learning_rate}-{seed}"
    settings = {
        "model": folder / "base",
        "warm_start_steps": 0,
        "data": folder / "prompts.jsonl",
        "reward": "number",
        "output_dir": output,
        "seed": seed,
        "steps": steps,
        "beta": BETA,
        "prompts_per_step": PROMPTS,
        "num_generations": GENERATIONS,
        "generation_batch_size": PROMPTS * GENERATIONS,
        "max_completion_length": LENGTH,
        "temperature": 1.0,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP_STEPS,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "eval_every": 0,
        "eval_prompts": 0,
        "save_every": 0,
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    train(setup(config.load(config.find("tiny-arithmetic"), overrides), resume=False))
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{name: row[name] for name in ("reward", "kl")} for row in map(json.loads, lines)]


def run_trl(folder: Path, seed: int, steps: int) -> list[dict[str, float]]:
    """Reward and KL of each step of TRL's AGROTrainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from agro_train.data.rows import read_jsonl
    from agro_train.integrations.trl import AGROConfig, AGROTrainer
    from agro_train.rewards.number import number_reward

    args = AGROConfig(
        str(folder / f"trl-{seed}"),
        seed=seed,
        max_steps=steps,
        beta=BETA,
        num_generations=GENERATIONS,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=PROMPTS * GENERATIONS // MICRO_BATCH,
        max_completion_length=LENGTH,
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_STEPS,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = AGROTrainer(
        str(folder / "base"),
        number_reward,
        args,
        train_dataset=Dataset.from_list(read_jsonl(folder / "prompts.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    return [{"reward": row["reward"], "kl": row["agro/kl_seq"]} for row in rows]


def in_process(what: str, folder: Path, seed: int, steps: int) -> None:
    """Makes the base, or one run, and writes its steps into the folder."""
    if what == "base":
        make_base(folder)
        return
    if what == "trl":
        found = run_trl(folder, seed, steps)
    else:
        rate = LEARNING_RATE / 2 if what == "agro_slower" else LEARNING_RATE
        found = run_agro(folder, seed, steps, rate)
    assert len(found) == steps, f"expected {steps} steps of {what}, got {len(found)}"
    (folder / f"{what}-{seed}.json").write_text(json.dumps(found))


# --- Outside --------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row a step of every run. Raises RuntimeError, with its last lines, for a run that fails."""
    run_one("base", 0, options.steps, folder)
    work = [(trainer, seed) for seed in range(options.seeds) for trainer in options.trainers]
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # a core for each
        jobs = [pool.submit(run_one, *item, options.steps, folder) for item in work]
        try:
            for (trainer, seed), job in zip(work, jobs, strict=True):
                steps = job.result()
                rows += [
                    {"trainer": trainer, "seed": seed, "step": step, **numbers}
                    for step, numbers in enumerate(steps, start=1)
                ]
                first, last = steps[0]["reward"], steps[-1]["reward"]
                print(f"{trainer:12} seed {seed}: reward {first:.2f} to {last:.2f}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return rows


def run_one(what: str, seed: int, steps: int, folder: Path) -> list[dict[str, float]]:
    """The steps of one run, in a fresh process; none for the base."""
    arguments = [f"--steps={steps}", f"--process={what}", f"--seed={seed}", f"--folder={folder}"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trainer.curves_trl", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
    )
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"{what}, seed {seed}, ended with {done.returncode}:\n{last}")
    if what == "base":
        return []
    found: list[dict[str, float]] = json.loads((folder / f"{what}-{seed}.json").read_text())
    return found


def estimates(rows: Sequence[dict[str, Any]], trainer: str) -> dict[str, Estimate]:
    """MEASURES of one trainer over its seeds, of which there must be two or more."""
    runs: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["trainer"] == trainer:
            numbers = (float(row["reward"]), float(row["kl"]))
            runs.setdefault(str(row["seed"]), []).append(numbers)
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for run in runs.values():
        rewards, kls = [reward for reward, _ in run], [kl for _, kl in run]
        quarter = max(1, len(run) // 4)
        found["start"].append(fmean(rewards[:3]))
        found["whole"].append(fmean(rewards))
        found["end"].append(fmean(rewards[-quarter:]))
        found["kl"].append(fmean(kls[-quarter:]))
    return {
        name: Estimate(fmean(values), stdev(values) / len(values) ** 0.5)
        for name, values in found.items()
    }


def verdict(rows: Sequence[dict[str, Any]], one: str, other: str) -> tuple[bool, str]:
    """Whether two trainers agree, see the top of this file, and the table that says so."""
    first, second = estimates(rows, one), estimates(rows, other)
    lines = [f"{'':8} {one:>16} {other:>16} {'difference':>16}"]
    same = True
    for name in MEASURES:
        difference = second[name].minus(first[name])
        same &= name == "start" or abs(difference.mean) <= SAME * difference.error
        apart = abs(difference.mean) / difference.error if difference.error else 0.0
        lines.append(
            f"{name:8} {first[name]!s:>16} {second[name]!s:>16} {difference!s:>16}   "
            f"{apart:.1f} standard errors"
        )
    for trainer, found in ((one, first), (other, second)):
        rise = found["end"].minus(found["start"])
        same &= rise.mean > RISEN * rise.error
        lines.append(f"{trainer}: reward risen by {rise}")
    return same, "\n".join(lines)


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The CSV, with the versions of both trainers in every line."""
    facts = {
        "agro_commit": timing.commit(),
        **{name: timing.version_or(name, "none") for name in ("trl", "transformers", "torch")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        for row in rows:
            numbers = {name: f"{row[name]:.5g}" for name in ("reward", "kl")}
            writer.writerow({**row, **numbers, **facts})


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 unless TRL's curves agree with ours and those of agro_slower do not."""
    options = parse(arguments)
    if options.process:
        in_process(options.process, options.folder, options.seed, options.steps)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write(run_all(options, Path(folder)), options.out)
    plot_training(options.out)
    return 0 if agrees(read_csv(options.out), options.trainers) else 1


def agrees(rows: Sequence[dict[str, Any]], trainers: Sequence[str]) -> bool:
    """Prints a table for each pair; whether each pair is the same or not as it should be."""
    as_expected = True
    for other in ("trl", "agro_slower"):
        if {"agro", other} <= set(trainers):
            same, table = verdict(rows, "agro", other)
            as_expected &= same == (other == "trl")
            print(f"{table}\nagro and {other}: {'the same' if same else 'not the same'}\n")
    return as_expected


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=8, help="runs of each trainer, at least 2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--out", type=Path, default=RESULTS / "curves_trl.csv")
    for hidden, kind in (("--process", str), ("--seed", int), ("--folder", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds: expected at least 2, got {options.seeds}; one has no spread")
    return options


if __name__ == "__main__":
    sys.exit(main())
