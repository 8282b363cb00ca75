"""The prompts of a run: rows read, checked, held out, and rendered for the model."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from agro_train.data.chat import ChatOptions, Renderer, question_of
from agro_train.data.rows import as_text, at
from agro_train.data.sources import read_sources
from agro_train.data.tasks import TASKS, Row, Split
from agro_train.refusal import Refusal
from agro_train.types import Prompt

# The question's column as TRL and verl, MATH, GSM8K and OpenAI name it; the first one present
# counts.
PROMPT_COLUMNS = ("prompt", "problem", "question", "messages")
# Where datasets keep the right answer. Rows that ask the same are one question only if these agree.
GOLD_COLUMNS = ("solution", "answer", "ground_truth", "reward_model")


def load_rows(source: str, split: Split, key: str = "data") -> list[Row]:
    """The rows of tasks, files, folders or hub datasets; every row has a column `prompt`, which is
    text or messages.

    Args:
        key: the setting that names the source, for messages.
    """
    found = read_sources(source, split, key)
    if not any(rows for _, rows in found):
        raise Refusal(f"{key}: expected at least one row in {source}, got none")
    return [row for name, rows in found if rows for row in _asked(name, rows, key)]


def _asked(source: str, rows: Sequence[Row], key: str) -> list[Row]:
    column = next((name for name in PROMPT_COLUMNS if name in rows[0]), None)
    if column is None:
        raise Refusal(
            f"{key}: expected a column {', '.join(PROMPT_COLUMNS)} in {source}, "
            f"got {', '.join(rows[0])}; rename the question's column"
        )
    reserved = {"prompts", "completions", "completion_ids"} & set(rows[0])
    if reserved:
        raise Refusal(
            f"{key}: expected no column {', '.join(sorted(reserved))} in {source}, got one; reward "
            "functions get the completions under that name"
        )
    asked = []
    for number, row in enumerate(rows, start=1):
        try:
            asked.append({**with_answer(row), "prompt": question_of(row, column)})
        except Refusal as error:
            raise Refusal(f"{error} in row {number} of {source}") from error
    return asked


def with_answer(row: Mapping[str, Any]) -> Row:
    """The row, and where verl has put the right answer (`reward_model.ground_truth`) a column
    `answer`, too, if there is none."""
    model = row.get("reward_model")
    if isinstance(model, dict) and "ground_truth" in model and row.get("answer") is None:
        return {**row, "answer": model["ground_truth"]}
    return dict(row)


def load_prompts(
    data: str,
    eval_data: str,
    eval_prompts: int,
    tokenizer: Any,
    template: str,
    max_length: int,
    options: ChatOptions = ChatOptions(),  # noqa: B008 (frozen)
    gold_column: str = "",
) -> tuple[list[Prompt], list[Prompt], tuple[int, int]]:
    """Training prompts, held-out prompts, and how many of each were left out for their length.

    Without `eval_data` a task uses its own held-out split; of anything else a fixed pseudo-random
    choice of `eval_prompts` rows (at most half) is held out of training.
    """
    rows = load_rows(data, "train")
    if eval_data:
        held_out = load_rows(eval_data, "eval", "eval_data")
    elif data in TASKS:
        held_out = TASKS[data]("eval")
    else:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        held = set(order[: min(eval_prompts, len(rows) // 2)])
        held_out = [rows[i] for i in sorted(held)]
        rows = [row for i, row in enumerate(rows) if i not in held]
    rendered = Renderer(tokenizer, template, options)
    kept: list[list[Prompt]] = []
    dropped: list[int] = []
    for part in (rows, held_out):
        prompts = [rendered(row) for row in part]
        short = [prompt for prompt in prompts if len(prompt.ids) <= max_length]
        kept.append(_grouped(short, gold_column))
        dropped.append(len(prompts) - len(kept[-1]))
    if not kept[0]:
        raise Refusal(
            f"max_prompt_length: expected a limit that keeps some prompts, got {max_length}; "
            f"all {len(rows)} training prompts are longer"
        )
    order = torch.randperm(len(kept[1]), generator=torch.Generator().manual_seed(1)).tolist()
    return kept[0], [kept[1][i] for i in order[:eval_prompts]], (dropped[0], dropped[1])


def render(
    row: Mapping[str, Any],
    tokenizer: Any,
    template: str,
    options: ChatOptions = ChatOptions(),  # noqa: B008 (frozen)
) -> Prompt:
    """The prompt as the model reads it: template, then the tokenizer's chat template if it has one.

    For many rows make a `Renderer` once.
    """
    return Renderer(tokenizer, template, options)(row)


def golds_of(columns: Mapping[str, Any], gold_column: str = "") -> dict[str, str]:
    """The right answer as each column tells it that does, in one spelling.

    Args:
        gold_column: that setting. It alone tells the answer then; empty: GOLD_COLUMNS do.
    """
    told = {name: at(columns, name) for name in ([gold_column] if gold_column else GOLD_COLUMNS)}
    return {name: as_text(value) for name, value in told.items() if value is not None}


def gold_of(columns: Mapping[str, Any], gold_column: str = "") -> str:
    """The same as one text; empty where no column tells it."""
    golds = golds_of(columns, gold_column)
    return "\n".join(f"{name}: {value}" for name, value in golds.items())


def regrouped(group: str, by: str) -> str:
    """The name of a second group with the same question, which differs in something else (`by`),
    such as the right answer."""
    return f"{group}-{hashlib.sha256(by.encode()).hexdigest()[:8]}"


def _grouped(prompts: Sequence[Prompt], gold_column: str) -> list[Prompt]:
    """The same prompts; where one asks what an earlier one did and has another right answer, its
    group has a name of its own, so that their completions are not compared with each other."""
    golds: dict[str, str] = {}
    grouped = []
    for prompt in prompts:
        gold = gold_of(prompt.columns, gold_column)
        if golds.setdefault(prompt.group, gold) != gold:
            prompt = replace(prompt, group=regrouped(prompt.group, gold))
        grouped.append(prompt)
    return grouped
