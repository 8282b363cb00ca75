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
from agro_train.rollout import generate
from agro_train.run import check_context, load_base
from agro_train.tasks import Row
from agro_train.types import Prompt, Rollout

SCORE_KEYS = ("reward", "reward_weights", "reward_timeout_s", "math_timeout_s")
SCORED_AT_ONCE = 256  # rows, and the rest of the last one's group


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


def load_sampler(config: TrainConfig) -> Sampler:
    """Loads `config.model`, which may also be a run's folder, for its newest checkpoint."""
    source, step = find_model(config.model)
    set_matmul_precision(config.matmul_precision)
    if source == "tiny":
        tokenizer, model, _ = load_base(config, None)
    else:
        tokenizer, model = load_tokenizer(source), load_model(source, config)
    prompts, held_out, _ = load_prompts(
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
    return Sampler(
        config=config,
        source=source,
        model=model.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer=tokenizer,
        step=step,
        prompts=with_readable_gold(prompts, config),
        held_out=with_readable_gold(held_out, config),
    )


def find_model(name: str) -> tuple[str, int | None]:
    """What to load for `name`, and the steps it has taken if it is a run or its checkpoint."""
    path = Path(name)
    if (path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file():
        if not checkpoint.checkpoints(path):
            raise ValueError(
                f"model: expected a run with a checkpoint, got {name!r}; there is none in it "
                "(save_every sets how often one is written)"
            )
        path = checkpoint.checkpoints(path)[-1]
    if (path / checkpoint.STATE).is_file():
        return str(path), checkpoint.read_state(path).step
    return name, None


def record(config: TrainConfig, output: Path, count: int | None) -> int:
    """Writes num_generations scored completions of `count` (None: all) training prompts to
    `output`, lines that `recorded=` takes. Returns how many.

    The file appears when it is complete.
    """
    check_free(output)
    rewards = load_rewards(config)
    sampler = load_sampler(config)
    prompts = sampler.prompts[:count]
    partial = output.with_name(f".partial-{output.name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with partial.open("w") as file:
        for start in range(0, len(prompts), config.prompts_per_step):
            rollouts = generate(
                sampler.model,
                sampler.tokenizer,
                prompts[start : start + config.prompts_per_step],
                num_generations=config.num_generations,
                temperature=config.temperature,
                max_completion_length=config.max_completion_length,
                batch_size=config.generation_batch_size,
                end_tokens=end_tokens(sampler.model, sampler.tokenizer),
                seed=derive_seed(config.seed, "record", start),
                step=sampler.step,
            )
            for rollout in score(rollouts, rewards):
                file.write(rollout_to_json(rollout) + "\n")
                written += 1
    os.replace(partial, output)
    return written


def score_file(source: Path, config: TrainConfig, output: Path) -> dict[str, float]:
    """Copies a file of rollouts with new rewards; all its other columns stay. Returns the number of
    rows, their mean reward and how many have none.
    """
    check_free(output)
    rewards = load_rewards(config)
    rows = numbered_rows(source)
    partial = output.with_name(f".partial-{output.name}")
    values: list[float | None] = []
    with partial.open("w") as file:
        for chunk in _chunks(rows):
            rollouts = [_scorable(row, f"{source}, line {number}") for number, row in chunk]
            for spec in config.reward:
                check_columns(spec, [Prompt(r.group, r.prompt, (), r.columns) for r in rollouts])
            for (_, row), scored in zip(chunk, score(rollouts, rewards), strict=True):
                new = {"reward": scored.reward, "rewards": dict(scored.rewards)}
                file.write(json.dumps({**row, **new}, ensure_ascii=False) + "\n")
                values.append(scored.reward)
    os.replace(partial, output)
    there = [value for value in values if value is not None]
    return {
        "rows": len(values),
        "mean": sum(there) / len(there) if there else float("nan"),
        "without": len(values) - len(there),
    }


def evaluate_model(name: str, settings: Sequence[str]) -> tuple[Path, dict[str, Estimate]]:
    """Evaluates a run's newest checkpoint, one of its checkpoints, or any model, on the held-out
    prompts of its configuration with `settings` over it.

    Writes results.json, samples.jsonl (every completion) and config.yaml to the folder it returns:
    `output_dir` where it is among the settings, else RUN/evaluations/CHECKPOINT for a run.
    """
    source, _ = find_model(name)
    run = next((p for p in (Path(name), Path(name).parent) if (p / "config.yaml").is_file()), None)
    config = configuration.load(
        None if run is None else run / "config.yaml", [*settings, f"model={source}"]
    )
    folder = Path(config.output_dir)
    if run is not None and not any(s.startswith("output_dir=") for s in settings):
        folder = run / "evaluations" / Path(source).name
    check_free(folder)
    rewards = load_rewards(config)
    sampler = load_sampler(config)
    if not sampler.held_out:
        raise ValueError(
            f"eval_prompts: expected held-out prompts to evaluate on, got none in {config.data}; "
            "give eval_prompts=N or eval_data=FILE"
        )
    result = evaluate(
        sampler.model,
        sampler.tokenizer,
        sampler.held_out,
        rewards,
        config,
        end_tokens(sampler.model, sampler.tokenizer),
        sampler.step,
    )
    found = estimates(result, config)
    _write_evaluation(folder, sampler, result, found)
    return folder, found


def _write_evaluation(
    folder: Path, sampler: Sampler, result: Evaluation, found: dict[str, Estimate]
) -> None:
    folder.mkdir(parents=True)
    samples = [*result.greedy, *result.sampled]
    (folder / "samples.jsonl").write_text("".join(rollout_to_json(r) + "\n" for r in samples))
    (folder / "config.yaml").write_text(sampler.config.to_yaml())
    results = {
        "model": sampler.source,
        "step": sampler.step,
        "prompts": len(result.greedy),
        "generations": sampler.config.eval_generations,
        "temperature": sampler.config.temperature,
        "truncated_rate": share(samples, lambda r: r.finish == "length"),
        "timeout_rate": share(samples, lambda r: r.failure == "timeout"),
        **{name: asdict(estimate) for name, estimate in found.items()},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def check_free(path: Path) -> None:
    if path.exists():
        raise ValueError(
            f"output: expected a new name, got {str(path)!r}, which exists; choose another"
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


def _chunks(rows: Sequence[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    """SCORED_AT_ONCE rows at a time and the rest of the last one's group: a function may compare
    the completions of one prompt."""
    rest = iter(rows)
    held: list[tuple[int, Row]] = []
    while chunk := held + list(islice(rest, SCORED_AT_ONCE - len(held))):
        held = []
        for numbered in rest:
            if _group(numbered[1]) != _group(chunk[-1][1]):
                held = [numbered]
                break
            chunk.append(numbered)
        yield chunk
