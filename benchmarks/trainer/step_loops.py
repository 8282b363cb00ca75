"""The loops of the step benchmark: ours and TRL's, each in its own process, with a stopwatch."""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.measure import timing


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


def reward(completions: Sequence[Any], **columns: object) -> list[float]:
    """Varies from completion to completion, and costs nothing."""
    return [float(len(str(completion)) % 7) for completion in completions]


class Stopwatch:
    """Called by a trainer at the borders of its step; sends each step to the parent process."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.warm = False  # whether a step has been taken

    def begin(self) -> None:
        """Before the rollout: waits for this process's turn, but for the first step."""
        if self.warm:
            self.connection.recv()
        self.began = time.perf_counter()

    def rolled_out(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Between rollout and update. The numbers are those of the whole step."""
        self.middle = time.perf_counter()
        timing.reset_peak()
        self.resident = timing.resident_bytes()
        self.tokens = prompt_tokens, completion_tokens
        self.largest = 0
        self.resumed = time.perf_counter()  # reading the memory is part of neither phase

    def micro_batch(self, completions: int) -> None:
        """For each micro-batch: how many completions it has."""
        self.largest = max(self.largest, completions)

    def end(self) -> None:
        """After the update."""
        update_s = time.perf_counter() - self.resumed
        peak = timing.high_water_bytes() - self.resident
        rollout_s = self.middle - self.began
        step = Step(rollout_s, update_s, peak, self.resident, *self.tokens, self.largest)
        self.warm = True
        self.connection.send(step)


def run_agro(stopwatch: Stopwatch, setting: Setting) -> None:
    """agro_train's own loop, with a stopwatch around `collect` and a look at its batches."""
    from agro_train import config, train
    from agro_train.data.batch import build_batch
    from agro_train.engines.transformers_engine import TransformersEngine
    from agro_train.setup import setup

    # A step ends where the next one begins: one step more than the warm-up and the timed ones.
    steps = setting.steps + 2
    data = Path(setting.folder) / "agro.jsonl"
    data.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in setting.questions))
    settings = [
        f"model={setting.model}", f"data={data}", f"steps={steps}",
        f"prompts_per_step={len(setting.questions)}", f"num_generations={setting.generations}",
        f"max_completion_length={setting.completion_length}", "beta=0.01", "learning_rate=1e-6",
        "eval_every=0", "eval_prompts=0", "reward=benchmarks.trainer.step_loops:reward",
        f"output_dir={setting.folder}/agro",
    ]  # fmt: skip
    run = setup(config.load(config.find("smollm2-arithmetic"), settings), resume=False)
    assert isinstance(run.engine, TransformersEngine)
    model: Any = run.models.policy.model
    run.engine.end_tokens = {model.config.vocab_size}  # an id that is never drawn
    # The model never reads the last token of a completion.
    longest = max(len(prompt.ids) for prompt in run.questions.prompts)
    one_group = longest + setting.generations * (setting.completion_length - 1)
    run = replace(run, config=replace(run.config, token_budget=one_group))
    collect = train.collect

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

    with (
        mock.patch.object(train, "build_batch", watched_build_batch),
        mock.patch.object(train, "collect", timed_collect),
    ):
        train.train(run)


def trl_settings(generations: int, tokens: int, steps: int) -> dict[str, Any]:
    """What TRL's trainers are given wherever their steps are timed: completions of so many tokens
    each, one step more than the timed ones, to warm up, and no files."""
    return {
        "num_generations": generations,
        "max_completion_length": tokens,
        "generation_kwargs": {"min_new_tokens": tokens},
        "beta": 0.01,
        "learning_rate": 1e-6,
        "max_steps": steps + 1,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


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
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            model_init_kwargs={"dtype": "float32"},
            **trl_settings(setting.generations, setting.completion_length, setting.steps),
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


def measure(connection: Connection, trainer: str, setting: Setting) -> None:
    """What a process runs: sends a Step when warm, and one for every call received."""
    torch.set_num_threads(setting.threads)
    torch.set_float32_matmul_precision(setting.precision)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the benchmark itself has ended
        TRAINERS[trainer](Stopwatch(connection), setting)
