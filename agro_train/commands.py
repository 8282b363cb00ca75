"""The commands around training: `agro rollout`, `agro score`, `agro eval`. One process each."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from agro_train import checkpoint, tiny
from agro_train import config as configuration
from agro_train.config import TrainConfig
from agro_train.data import derive_seed, load_prompts, numbered_rows
from agro_train.evaluate import Estimate, Evaluation, estimates, evaluate
from agro_train.metrics import share
from agro_train.model import end_tokens, load_model, load_tokenizer, set_matmul_precision
from agro_train.recorded import rollout_to_json
from agro_train.rewards import check_columns, load_rewards, score, with_readable_gold
from agro_train.rollout import TransformersEngine
from agro_train.run import check_context, load_base
from agro_train.tasks import Row
from agro_train.types import Prompt, Rollout

SCORE_KEYS = ("reward", "reward_weights", "reward_timeout_s", "math_timeout_s")
SCORED_AT_ONCE = 256  # rows, and the rest of the last one's group

Scorable = tuple[tuple[int, Row], Rollout]  # a line's number, the line, and what a reward sees


@dataclass(frozen=True)
class Sampler:
    """A model to sample from, and the prompts and rewards of its configuration."""

    config: TrainConfig
    source: str  # where the weights are
    model: PreTrainedModel
    tokenizer: Any
    step: int | None  # optimiser steps the weights have taken; None: not a run's checkpoint
    prompts: list[Prompt]
    held_out: list[Prompt]
    left_out: dict[str, int]  # training prompts, by reason
    left_out_held: dict[str, int]  # held-out prompts, by reason

    def engine(self) -> TransformersEngine:
        """transformers', whatever sampled in the run."""
        ends = end_tokens(self.model, self.tokenizer)
        return TransformersEngine(
            lambda function: function(self.model), self.tokenizer, ends, self.config
        )


def load_sampler(config: TrainConfig) -> Sampler:
    """Loads `config.model`, which may also be a run's folder, for its newest checkpoint."""
    source, step = find_model(config.model)
    set_matmul_precision(config.matmul_precision)
    if source == "tiny":
        tokenizer, model, _ = load_base(config, None)
    else:
        tokenizer, model = load_tokenizer(source), load_model(source, config)
    prompts, held_out, too_long = load_prompts(
        config.data,
        config.eval_data,
        config.eval_prompts,
        tokenizer,
        config.prompt_template,
        config.max_prompt_length,
    )
    if source == "tiny":
        tiny.check_prompts([*prompts, *held_out])
    for spec in config.reward:
        check_columns(spec, [*prompts, *held_out])
    context = getattr(model.config, "max_position_embeddings", None)
    check_context(config, [*prompts, *held_out], context)
    good, good_held = (with_readable_gold(part, config) for part in (prompts, held_out))
    left_out, left_out_held = (
        {"too_long": long, "unreadable_gold": len(before) - len(after)}
        for long, before, after in zip(
            too_long, (prompts, held_out), (good, good_held), strict=True
        )
    )
    return Sampler(
        config=config,
        source=source,
        model=model.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer=tokenizer,
        step=step,
        prompts=good,
        held_out=good_held,
        left_out=left_out,
        left_out_held=left_out_held,
    )


def find_model(name: str) -> tuple[str, int | None]:
    """What to load for `name`, and the steps it has taken if it is a run or its checkpoint."""
    path = Path(name)
    if _is_run(path):
        newest = checkpoint.newest(path, print)
        if newest is None:
            raise ValueError(
                f"model: expected a run with a checkpoint, got {name!r}; there is none in it "
                "(save_every sets how often one is written)"
            )
        path = newest
    if (path / checkpoint.STATE).is_file():
        return str(path), checkpoint.read_state(path).step
    return name, None


def _is_run(path: Path) -> bool:
    """A folder may have a config.yaml of anything's; metrics only a run's has."""
    return (path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file()


def record(config: TrainConfig, output: Path, count: int | None) -> tuple[int, dict[str, int]]:
    """Writes num_generations scored completions of `count` (None: all) training prompts to
    `output`, lines that `recorded=` takes. Returns how many, and the prompts left out by reason.

    The file appears when it is complete.
    """
    check_free(output, "output")
    rewards = load_rewards(config)
    sampler = load_sampler(config)
    prompts = sampler.prompts[:count]
    if not prompts:
        raise ValueError(
            f"data: expected gold answers that math-verify can parse, got none in {config.data}; "
            "choose another reward, or mend the column of answers"
        )
    partial = output.with_name(f".partial-{output.name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with partial.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for start in range(0, len(prompts), config.prompts_per_step):
            chosen = range(len(prompts))[start : start + config.prompts_per_step]
            rollouts = sampler.engine().complete(
                [prompts[number] for number in chosen],
                seeds=[derive_seed(config.seed, "record", number) for number in chosen],
                num_generations=config.num_generations,
                temperature=config.temperature,
                step=sampler.step,
            )
            for rollout in score(rollouts, rewards):
                file.write(rollout_to_json(rollout) + "\n")
                written += 1
    os.replace(partial, output)
    return written, sampler.left_out


def score_file(source: Path, config: TrainConfig, output: Path) -> dict[str, float]:
    """Copies a file of rollouts with new rewards and failures; all its other columns stay. Returns
    the number of rows, their mean reward and how many have none.

    Every row is checked before the first is scored, and the file appears when it is complete.
    """
    check_free(output, "output")
    rewards = load_rewards(config)
    rows = numbered_rows(source)
    rollouts = [_scorable(row, f"{source}, line {number}") for number, row in rows]
    for spec in config.reward:
        check_columns(spec, [Prompt(r.group, r.prompt, (), r.columns) for r in rollouts])
    partial = output.with_name(f".partial-{output.name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    values: list[float | None] = []
    try:
        with partial.open("w", encoding="utf-8", errors="surrogatepass") as file:
            for chunk in _chunks(list(zip(rows, rollouts, strict=True))):
                results = score([rollout for _, rollout in chunk], rewards)
                for ((_, row), _), scored in zip(chunk, results, strict=True):
                    file.write(_scored_line(row, scored) + "\n")
                    values.append(scored.reward)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    there = [value for value in values if value is not None]
    return {
        "rows": len(values),
        "mean": sum(there) / len(there) if there else float("nan"),
        "without": len(values) - len(there),
    }


def _scored_line(row: Row, scored: Rollout) -> str:
    new = {"reward": scored.reward, "rewards": dict(scored.rewards), "failure": scored.failure}
    return json.dumps({**row, **new}, ensure_ascii=False, default=str)


def evaluate_model(
    name: str, settings: Sequence[str]
) -> tuple[Path, dict[str, Estimate], dict[str, int]]:
    """Evaluates a run's newest checkpoint, one of its checkpoints, or any model, on the held-out
    prompts of its configuration with `settings` over it.

    Writes results.json, samples.jsonl (every completion) and config.yaml to the folder it returns:
    `output_dir` where it is among the settings, else RUN/evaluations/CHECKPOINT for a run and
    evaluations/MODEL for any other model. Returns the estimates and, by reason, how many held-out
    prompts were left out, too.
    """
    source, step = find_model(name)
    run = Path(name) if _is_run(Path(name)) else None
    if run is None and step is not None and _is_run(Path(name).parent):
        run = Path(name).parent
    config = configuration.load(
        None if run is None else run / "config.yaml", [*settings, f"model={source}"]
    )
    folder = (run or Path()) / "evaluations" / Path(source).resolve().name
    if any(setting.startswith("output_dir=") for setting in settings):
        folder = Path(config.output_dir)
    check_free(folder, "output_dir")
    rewards = load_rewards(config)
    sampler = load_sampler(config)
    if not sampler.held_out and any(sampler.left_out_held.values()):
        raise ValueError(
            f"eval_prompts: expected held-out prompts to evaluate on, got none but "
            f"{sampler.left_out_held['too_long']} that are too long and "
            f"{sampler.left_out_held['unreadable_gold']} whose gold answer cannot be parsed; raise "
            "max_prompt_length or mend the answers"
        )
    if not sampler.held_out:
        raise ValueError(
            f"eval_prompts: expected held-out prompts to evaluate on, got none in {config.data}; "
            "give eval_prompts=N or eval_data=FILE"
        )
    result = evaluate(
        sampler.engine(),
        sampler.held_out,
        range(len(sampler.held_out)),
        rewards,
        config,
        sampler.step,
    )
    found = estimates(result, config)
    _write_evaluation(folder, sampler, result, found)
    return folder, found, sampler.left_out_held


def _write_evaluation(
    folder: Path, sampler: Sampler, result: Evaluation, found: dict[str, Estimate]
) -> None:
    folder.mkdir(parents=True)
    samples = [*result.greedy, *result.sampled]
    lines = "".join(rollout_to_json(r) + "\n" for r in samples)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8", errors="surrogatepass")
    (folder / "config.yaml").write_text(sampler.config.to_yaml())
    results = {
        "model": sampler.source,
        "step": sampler.step,
        "prompts": len(result.greedy),
        "left_out": sampler.left_out_held,
        "generations": sampler.config.eval_generations,
        "temperature": sampler.config.temperature,
        "truncated_rate": share(samples, lambda r: r.finish == "length"),
        "timeout_rate": share(samples, lambda r: r.failure == "timeout"),
        "error_rate": share(samples, lambda r: r.failure == "error"),
        **{name: asdict(estimate) for name, estimate in found.items()},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def check_free(path: Path, key: str) -> None:
    """Raises ValueError, naming the setting, where something is at `path`."""
    if path.exists():
        raise ValueError(
            f"{key}: expected a new name, got {str(path)!r}, which exists; choose another"
        )


def _scorable(row: Row, where: str) -> Rollout:
    """What a reward function sees of a line of a rollouts file."""
    if not isinstance(row.get("completion"), str):
        raise ValueError(
            f"score: expected text in column completion in {where}, got "
            f"{row.get('completion')!r}; reward functions read text"
        )
    columns = row.get("columns") or {}
    names = Rollout.__dataclass_fields__
    return Rollout(
        group=_group(row),
        prompt=row.get("prompt") or "",
        prompt_ids=tuple(row.get("prompt_ids") or ()),
        completion=row["completion"],
        completion_ids=tuple(row.get("completion_ids") or ()),
        finish=row.get("finish") or "stop",
        reward=None,
        columns={**{k: v for k, v in row.items() if k not in names}, **columns},
    )


def _group(row: Row) -> str:
    return str(row.get("group") or row.get("prompt") or row.get("prompt_ids"))


def _chunks(rows: Sequence[Scorable]) -> Iterator[list[Scorable]]:
    """SCORED_AT_ONCE rows at a time and the rest of the last one's group: a function may compare
    the completions of one prompt."""
    rest = iter(rows)
    held: list[Scorable] = []
    while chunk := held + list(islice(rest, SCORED_AT_ONCE - len(held))):
        held = []
        for row in rest:
            if row[1].group != chunk[-1][1].group:
                held = [row]
                break
            chunk.append(row)
        yield chunk
