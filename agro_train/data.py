"""Where prompts and recorded rollouts come from: tasks, JSONL files, hub datasets."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from agro_train.tasks import TASKS, Row, Split
from agro_train.types import Finish, Prompt, Rollout

# The question's column as TRL, MATH and GSM8K name it; the first one present counts.
PROMPT_COLUMNS = ("prompt", "problem", "question")
# What a recorded rollout's columns may hold.
RECORDED_TYPES: dict[str, tuple[type, ...]] = {
    "reward": (int, float, type(None)),
    "prompt": (str,),
    "prompt_ids": (list,),
    "completion": (str,),
    "completion_ids": (list,),
    "step": (int, type(None)),
    "temperature": (int, float, type(None)),
    "columns": (dict,),
}


def load_rows(source: str, split: Split) -> list[Row]:
    """The rows of a task, a JSONL file or a hub dataset; every row has a `prompt` column."""
    if source in TASKS:
        return TASKS[source](split)
    if source.endswith((".jsonl", ".json")):
        rows = read_jsonl(Path(source))
    else:
        rows = _hub_rows(source, split)
    if not rows:
        raise ValueError(f"data: expected at least one row in {source}, got none")
    column = next((name for name in PROMPT_COLUMNS if name in rows[0]), None)
    if column is None:
        raise ValueError(
            f"data: expected a column {', '.join(PROMPT_COLUMNS)} in {source}, "
            f"got {', '.join(rows[0])}; rename the question's column"
        )
    reserved = {"prompts", "completions", "completion_ids"} & set(rows[0])
    if reserved:
        raise ValueError(
            f"data: expected no column {', '.join(sorted(reserved))} in {source}, got one; reward "
            "functions get the completions under that name"
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"data: expected text in column {column}, got {row.get(column)!r} in row {number} "
                f"of {source}"
            )
    return [{**row, "prompt": row[column]} for row in rows]


def read_jsonl(path: Path) -> list[Row]:
    """One JSON object a line; blank lines are skipped. Errors name file and line."""
    return [row for _, row in _numbered_rows(path)]


def _numbered_rows(path: Path) -> list[tuple[int, Row]]:
    if not path.is_file():
        raise ValueError(f"data: expected a JSONL file, got {str(path)!r}; there is no such file")
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(
                    f"data: expected a JSON object in {path}, line {number}, got {line[:60]!r}"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"data: expected a JSON object in {path}, line {number}, got {line[:60]!r}"
                )
            rows.append((number, row))
    return rows


def _hub_rows(source: str, split: Split) -> list[Row]:
    from datasets import load_dataset  # slow to import, and few runs need it

    try:
        dataset = load_dataset(source, split="train" if split == "train" else "test")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"data: expected {', '.join(TASKS)}, a .jsonl file or a hub dataset, got {source!r}: "
            f"{reason}"
        ) from error
    return [dict(row) for row in dataset]


def load_prompts(
    data: str, eval_data: str, eval_prompts: int, tokenizer: Any, template: str, max_length: int
) -> tuple[list[Prompt], list[Prompt], int]:
    """Training prompts, held-out prompts, and how many were left out for their length.

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
    dropped = 0
    for part in (rows, held_out):
        prompts = [render(row, tokenizer, template) for row in part]
        kept.append([prompt for prompt in prompts if len(prompt.ids) <= max_length])
        dropped += len(prompts) - len(kept[-1])
    if not kept[0]:
        raise ValueError(
            f"max_prompt_length: expected a limit that keeps some prompts, got {max_length}; "
            f"all {len(rows)} training prompts are longer"
        )
    order = torch.randperm(len(kept[1]), generator=torch.Generator().manual_seed(1)).tolist()
    return kept[0], [kept[1][i] for i in order[:eval_prompts]], dropped


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
        raise ValueError(f"data: expected a prompt of one or more tokens, got {text!r}")
    group = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Prompt(group=group, text=text, ids=tuple(ids), columns=dict(row))


def prompts_for_step(prompts: Sequence[Any], count: int, step: int, seed: int) -> list[Any]:
    """The `count` items of one step: epochs of fresh permutations, a pure function of (step, seed).

    Nothing has to be saved to continue where a run stopped.
    """
    picked = []
    orders: dict[int, list[int]] = {}
    for index in range(step * count, (step + 1) * count):
        epoch, position = divmod(index, len(prompts))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
            orders[epoch] = torch.randperm(len(prompts), generator=generator).tolist()
        picked.append(prompts[orders[epoch][position]])
    return picked


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from a run's seed, a purpose and counters; the same everywhere, always."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def rollout_to_json(rollout: Rollout) -> str:
    """One line of a rollout log."""
    row = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
    return json.dumps(row, ensure_ascii=False)


def load_recorded(
    paths: Sequence[str], tokenizer: Any, template: str, vocab_size: int
) -> list[list[Rollout]]:
    """Recorded groups, in the order of their first line.

    A line needs `reward` (a number or null), `prompt_ids` or `prompt`, and `completion_ids` or
    `completion`; lines with the same `group` (else the same prompt) belong together. A prompt
    given as text is rendered like a dataset's; a completion's text is tokenised apart from it, and
    an end token is appended only where `finish` says "stop".
    """
    groups: dict[str, list[Rollout]] = {}
    for path in paths:
        rows = _numbered_rows(Path(path))
        if not rows:
            raise ValueError(f"recorded: expected at least one rollout in {path}, got none")
        for number, row in rows:
            where = f"{path}, line {number}"
            rollout = _recorded_rollout(row, where, tokenizer, template, vocab_size)
            group = groups.setdefault(rollout.group, [])
            if group and group[0].prompt_ids != rollout.prompt_ids:
                raise ValueError(
                    f"recorded: expected one prompt in group {rollout.group!r}, got another in "
                    f"{where}; give each prompt a group of its own over all files"
                )
            group.append(rollout)
    for name, rollouts in groups.items():
        if len(rollouts) < 2:
            raise ValueError(
                f"recorded: expected at least 2 completions a prompt, got 1 for group {name!r} "
                f"({rollouts[0].prompt[:40]!r}); a group of one has no variance to learn from"
            )
    return list(groups.values())


def _recorded_rollout(
    row: Row, where: str, tokenizer: Any, template: str, vocab_size: int
) -> Rollout:
    for either in (("reward",), ("prompt_ids", "prompt"), ("completion_ids", "completion")):
        if not any(name in row for name in either):
            raise ValueError(
                f"recorded: expected a column {' or '.join(either)} in {where}, "
                f"got {', '.join(row)}"
            )
    for name, kind in RECORDED_TYPES.items():
        if name in row and not isinstance(row[name], kind):
            allowed = " or ".join(k.__name__ for k in kind).replace("NoneType", "null")
            raise ValueError(
                f"recorded: expected {allowed} as {name} in {where}, got {row[name]!r}"
            )
    if row.get("finish", "stop") not in ("stop", "length"):
        raise ValueError(
            f"recorded: expected stop or length as finish in {where}, got {row['finish']!r}"
        )
    finish: Finish = row.get("finish", "stop")
    if "prompt_ids" in row:
        prompt_ids = row["prompt_ids"]
        prompt = row.get("prompt") or tokenizer.decode(prompt_ids)
    else:
        rendered = render(row, tokenizer, template)
        prompt_ids, prompt = list(rendered.ids), rendered.text
    completion_ids = row.get("completion_ids")
    if completion_ids is None:
        completion_ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        completion_ids += [tokenizer.eos_token_id] if finish == "stop" else []
    for name, ids in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids)):
        if not ids or not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
            raise ValueError(
                f"recorded: expected {name} of one or more ids in [0, {vocab_size}) in {where}, "
                f"got {str(ids)[:60]}; was it recorded with another tokenizer?"
            )
    reward = row["reward"]
    return Rollout(
        group=str(row.get("group", prompt)),
        prompt=prompt,
        prompt_ids=tuple(prompt_ids),
        completion=row.get("completion") or tokenizer.decode(completion_ids),
        completion_ids=tuple(completion_ids),
        finish=finish,
        reward=float(reward) if reward is not None and math.isfinite(reward) else None,
        step=row.get("step"),
        temperature=row.get("temperature"),
        columns=row.get("columns", {}),
    )
