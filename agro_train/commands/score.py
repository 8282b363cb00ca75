"""`agro score`: new rewards for a file of rollouts."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from agro_train import config as configuration
from agro_train import durable
from agro_train.commands.sampler import check_free
from agro_train.config import TrainConfig
from agro_train.data.chat import spoken
from agro_train.data.prompts import with_answer
from agro_train.data.recorded_row import by_our_names, has_turns
from agro_train.data.rows import numbered_rows
from agro_train.data.tasks import Row
from agro_train.refusal import Refusal
from agro_train.rewards.functions import check_columns, load_rewards, score
from agro_train.types import Prompt, Rollout

DESCRIPTION = "Score a file's completions: reward=NAME or reward=[NAME,...], reward_weights=[...]."

SCORE_KEYS = ("reward", "reward_weights", "gold_column", "reward_timeout_s", "math_timeout_s")


SCORED_AT_ONCE = 256  # rows, and the rest of the last one's group


Scorable = tuple[tuple[int, Row], Rollout]  # a line's number, the line, and what a reward sees


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", help="rollouts, in any kind of file that data= takes")
    parser.add_argument("settings", nargs="+", metavar="reward=...")
    parser.add_argument("--output", help="default: FILE with .scored.jsonl at its end")


def run(options: Namespace) -> int:
    for setting in options.settings:
        if setting.partition("=")[0] not in SCORE_KEYS:
            raise Refusal(f"arguments: expected {', '.join(SCORE_KEYS)}, got {setting!r}")
    if not any(setting.startswith("reward=") for setting in options.settings):
        raise Refusal("reward: expected reward=FUNCTION, got none; which shall score them?")
    source = Path(options.file)
    path = source.parent / f"{source.stem}.scored.jsonl"
    path = Path(options.output) if options.output else path
    found = score_file(source, configuration.load(None, options.settings), path)
    print(
        f"{path}: {found['rows']:.0f} completions, mean reward {found['mean']:.3f}, "
        f"{found['without']:.0f} without one"
    )
    return 0


def score_file(source: Path, config: TrainConfig, output: Path) -> dict[str, float]:
    """Copies a file of rollouts with new rewards and failures; all its other columns stay. Returns
    the number of rows, their mean reward and how many have none.

    Every row is checked before the first is scored, and the file appears when it is complete.
    """
    check_free(output, "output")
    rewards = load_rewards(config)
    rows = numbered_rows(source, "score")
    rollouts = [_scorable(row, f"{source}, line {number}") for number, row in rows]
    for spec in config.reward:
        prompts = [Prompt(r.group, r.prompt, (), r.columns) for r in rollouts]
        check_columns(spec, prompts, config.gold_column)
    output.parent.mkdir(parents=True, exist_ok=True)
    values: list[float | None] = []
    with durable.writing(output) as file:
        for chunk in _chunks(list(zip(rows, rollouts, strict=True))):
            results = score([rollout for _, rollout in chunk], rewards)
            for ((_, row), _), scored in zip(chunk, results, strict=True):
                file.write(_scored_line(row, scored) + "\n")
                values.append(scored.reward)
    there = [value for value in values if value is not None]
    return {
        "rows": len(values),
        "mean": sum(there) / len(there) if there else float("nan"),
        "without": len(values) - len(there),
    }


def _scored_line(row: Row, scored: Rollout) -> str:
    new = {"reward": scored.reward, "rewards": dict(scored.rewards), "failure": scored.failure}
    return json.dumps({**row, **new}, ensure_ascii=False, default=str)


def _scorable(row: Row, where: str) -> Rollout:
    """What a reward function sees of a line of a rollouts file."""
    row = by_our_names(row)
    if not isinstance(row.get("completion"), str):
        raise Refusal(
            f"score: expected text in column completion in {where}, got "
            f"{row.get('completion')!r}; reward functions read text"
        )
    columns = row.get("columns") or {}
    prompt = row.get("prompt") or ""
    for name, kind in (("columns", dict), ("prompt_ids", list), ("completion_ids", list)):
        if not isinstance(row.get(name) or kind(), kind):
            raise Refusal(
                f"score: expected {kind.__name__} as {name} in {where}, got {row[name]!r}; "
                "reward functions get it"
            )
    names = set(Rollout.__dataclass_fields__)
    if not has_turns(row):
        names.remove("turns")
    return Rollout(
        group=_group(row),
        prompt=prompt if isinstance(prompt, str) else spoken(prompt),
        prompt_ids=tuple(row.get("prompt_ids") or ()),
        completion=row["completion"],
        completion_ids=tuple(row.get("completion_ids") or ()),
        finish=row.get("finish") or row.get("finish_reason") or "stop",
        reward=None,
        turns=tuple(row["turns"]) if has_turns(row) else None,
        columns=with_answer({**{k: v for k, v in row.items() if k not in names}, **columns}),
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
