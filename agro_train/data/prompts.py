"""Where prompts come from: tasks, JSONL and parquet files, hub datasets."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from agro_train.data.rows import numbered_rows
from agro_train.data.tasks import TASKS, Row, Split
from agro_train.refusal import Refusal
from agro_train.types import Prompt

# The question's column as TRL, MATH and GSM8K name it; the first one present counts.
PROMPT_COLUMNS = ("prompt", "problem", "question")


def load_rows(source: str, split: Split) -> list[Row]:
    """The rows of a task, a file or a hub dataset; every row has a `prompt` column."""
    if source in TASKS:
        return TASKS[source](split)
    if source.endswith((".jsonl", ".json", ".parquet")):
        rows = [row for _, row in numbered_rows(Path(source))]
    else:
        rows = _hub_rows(source, split)
    if not rows:
        raise Refusal(f"data: expected at least one row in {source}, got none")
    column = next((name for name in PROMPT_COLUMNS if name in rows[0]), None)
    if column is None:
        raise Refusal(
            f"data: expected a column {', '.join(PROMPT_COLUMNS)} in {source}, "
            f"got {', '.join(rows[0])}; rename the question's column"
        )
    reserved = {"prompts", "completions", "completion_ids"} & set(rows[0])
    if reserved:
        raise Refusal(
            f"data: expected no column {', '.join(sorted(reserved))} in {source}, got one; reward "
            "functions get the completions under that name"
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(column), str):
            raise Refusal(
                f"data: expected text in column {column}, got {row.get(column)!r} in row {number} "
                f"of {source}"
            )
    return [{**row, "prompt": row[column]} for row in rows]


def _hub_rows(source: str, split: Split) -> list[Row]:
    from datasets import load_dataset  # slow to import, and few runs need it

    try:
        dataset = load_dataset(source, split="train" if split == "train" else "test")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(
            f"data: expected {', '.join(TASKS)}, a .jsonl or .parquet file or a hub dataset, got "
            f"{source!r}: {reason}"
        ) from error
    return [dict(row) for row in dataset]


def load_prompts(
    data: str, eval_data: str, eval_prompts: int, tokenizer: Any, template: str, max_length: int
) -> tuple[list[Prompt], list[Prompt], tuple[int, int]]:
    """Training prompts, held-out prompts, and how many of each were left out for their length.

    Without `eval_data` a task uses its own held-out split; of a file or hub dataset a fixed
    pseudo-random choice of `eval_prompts` rows (at most half) is held out of training.
    """
    rows = load_rows(data, "train")
    if eval_data:
        held_out = load_rows(eval_data, "eval")
    elif data in TASKS:
        held_out = TASKS[data]("eval")
    else:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        held = set(order[: min(eval_prompts, len(rows) // 2)])
        held_out = [rows[i] for i in sorted(held)]
        rows = [row for i, row in enumerate(rows) if i not in held]
    kept: list[list[Prompt]] = []
    dropped: list[int] = []
    for part in (rows, held_out):
        prompts = [render(row, tokenizer, template) for row in part]
        kept.append([prompt for prompt in prompts if len(prompt.ids) <= max_length])
        dropped.append(len(prompts) - len(kept[-1]))
    if not kept[0]:
        raise Refusal(
            f"max_prompt_length: expected a limit that keeps some prompts, got {max_length}; "
            f"all {len(rows)} training prompts are longer"
        )
    order = torch.randperm(len(kept[1]), generator=torch.Generator().manual_seed(1)).tolist()
    return kept[0], [kept[1][i] for i in order[:eval_prompts]], (dropped[0], dropped[1])


def render(row: Mapping[str, Any], tokenizer: Any, template: str) -> Prompt:
    """The prompt as the model reads it: template, then the tokenizer's chat template if it has one.

    A chat template writes its own begin-of-sequence token, so none is added to its text a second
    time.
    """
    text = template.replace("{prompt}", row["prompt"])
    chat = tokenizer.chat_template is not None
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise Refusal(f"data: expected a prompt of one or more tokens, got {text!r}")
    group = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Prompt(group=group, text=text, ids=tuple(ids), columns=dict(row))
