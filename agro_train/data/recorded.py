"""Recorded rollouts: read from files, checked, and put into groups.

What a row says is in `recorded_row.py`; the logs of `rollout_log.py` are such files, too.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agro_train.data.chat import ChatOptions, Renderer
from agro_train.data.prompts import gold_of, golds_of, regrouped
from agro_train.data.recorded_row import Reader, by_our_names, from_cells, kept_ids_of
from agro_train.data.rows import CSV_SEPARATORS, numbered_rows, suffix
from agro_train.data.tasks import Row
from agro_train.refusal import Refusal
from agro_train.types import Rollout

SPELLED = 100  # rollouts of a file whose ids are compared with the text beside them


@dataclass(frozen=True)
class RecordedFile:
    path: Path
    sha256: str  # of its bytes
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Recorded:
    files: tuple[RecordedFile, ...] = ()
    groups: tuple[tuple[Rollout, ...], ...] = ()  # in the order of their first line
    num_tokenised: int = 0  # rollouts in them whose completion is text, without ids
    # How many groups were left out, by the reason: alone, too_long.
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_unrewarded(self) -> int:
        """Rollouts whose reward is null or not finite: dropped from their groups."""
        return sum(r.reward is None for group in self.groups for r in group)

    @property
    def num_without_sampler(self) -> int:
        """Rollouts that do not say how probable they were when they were sampled."""
        return sum(r.sampling_logprob is None for group in self.groups for r in group)


def load_recorded(
    paths: Sequence[str],
    tokenizer: Any,
    template: str,
    *,
    vocab_size: int,
    context: int | None,
    truncated: bool = False,
    options: ChatOptions = ChatOptions(),  # noqa: B008 (frozen)
    gold_column: str = "",
) -> Recorded:
    """Reads the files and groups their rollouts.

    A line needs `reward` (a number or null), `prompt_ids` or `prompt`, and `completion_ids` or
    `completion`; lines with the same `group` (else the same prompt) belong together, however many
    they are. A prompt given as text or messages is rendered like a dataset's; a completion's text
    is tokenised apart from it, and where `finish` (or `finish_reason`) says "stop" it ends with one
    end token, the chat template's. `ref_logprob` is the log-probability of the completion under the
    run's reference at the run's temperature, nats, the sum over its tokens; where it is absent the
    reference is asked. `sampling_logprob` is the same under whoever sampled it, at the temperature
    of the sampling. `kept_ids` says which ids each token was drawn from, and `turns` which tokens
    an environment said, that nobody drew.

    A group of one, and a group with a rollout longer than the context, is left out and counted.

    Args:
        vocab_size: of the model: larger ids are refused.
        context: tokens the model can read. None: unknown.
        truncated: whether the run scores over `kept_ids`, which every rollout then needs; a run
            that samples from all ids scores over all, whatever the sampler left out.
        gold_column: the setting, for rows of one question with two right answers.
    """
    reader = Reader(Renderer(tokenizer, template, options), vocab_size)
    groups = _Groups(gold_column)
    tokenised: set[int] = set()
    read: list[tuple[Path, list[Rollout]]] = []
    for path in map(Path, paths):
        rows = _rows(path)
        rollouts = []
        for number, row in rows:
            where = f"{path}, line {number}"
            rollout = reader.rollout(row, where)
            if truncated:
                rollout = replace(rollout, kept_ids=kept_ids_of(row, rollout, where, vocab_size))
            rollout = groups.add(rollout, row, where)
            rollouts.append(rollout)
            if "completion_ids" not in row:
                tokenised.add(id(rollout))
        _check_spelling(path, rows, tokenizer)
        read.append((path, rollouts))
    kept, left_out = _usable(groups.found, context)
    _check_rewards(kept, paths)
    usable = {id(rollout) for group in kept for rollout in group}
    return Recorded(
        files=tuple(
            RecordedFile(
                path,
                hashlib.sha256(path.read_bytes()).hexdigest(),
                tuple(rollout for rollout in rollouts if id(rollout) in usable),
            )
            for path, rollouts in read
        ),
        groups=tuple(tuple(group) for group in kept),
        num_tokenised=len(tokenised & usable),
        left_out=left_out,
    )


def _rows(path: Path) -> list[tuple[int, Row]]:
    """A file's rows under our names, each with its number."""
    read_cells = suffix(path) in CSV_SEPARATORS
    rows = [
        (number, by_our_names(from_cells(row) if read_cells else row))
        for number, row in numbered_rows(path, "recorded")
    ]
    if not rows:
        raise Refusal(f"recorded: expected at least one rollout in {path}, got none")
    return rows


class _Groups:
    """Rollouts put together by their group's name, over all files."""

    def __init__(self, gold_column: str) -> None:
        self._gold_column = gold_column
        self._by_name: dict[str, list[Rollout]] = {}
        self._logged: dict[str, str] = {}  # by name, the gold answer of a log's own columns
        self._told: dict[str, dict[str, str]] = {}  # by name, that of columns beside the others

    @property
    def found(self) -> list[list[Rollout]]:
        return list(self._by_name.values())

    def add(self, rollout: Rollout, row: Row, where: str) -> Rollout:
        """The rollout as it is kept. Raises Refusal where its group has another prompt or gold
        answer."""
        # A log's own columns are the dataset's, which may ask one question with two answers.
        gold = gold_of(row.get("columns") or {}, self._gold_column)
        if gold and self._logged.setdefault(rollout.group, gold) != gold:
            rollout = replace(rollout, group=regrouped(rollout.group, gold))
        group = self._by_name.setdefault(rollout.group, [])
        if group and group[0].prompt_ids != rollout.prompt_ids:
            raise Refusal(
                f"recorded: expected one prompt in group {rollout.group!r}, got another in "
                f"{where}; give each prompt a group of its own over all files"
            )
        told = self._told.setdefault(rollout.group, {})
        for column, answer in golds_of(row, self._gold_column).items():
            if told.setdefault(column, answer) != answer:
                raise Refusal(
                    f"recorded: expected one gold answer in group {rollout.group[:40]!r}, got "
                    f"{told[column][:40]!r} and {answer[:40]!r} in column {column} in {where}; "
                    "give the rows of each answer a group of their own, or rename a column that "
                    "is not the gold answer"
                )
        group.append(rollout)
        return rollout


def _usable(
    groups: Sequence[list[Rollout]], context: int | None
) -> tuple[list[list[Rollout]], dict[str, int]]:
    """The groups to learn from, and how many are none, by the reason. Raises Refusal where there
    are groups and none of them will do."""
    kept: list[list[Rollout]] = []
    alone: list[list[Rollout]] = []
    too_long: list[list[Rollout]] = []
    for group in groups:
        if len(group) < 2:
            alone.append(group)
        elif context is not None and _longest(group) > context:
            too_long.append(group)
        else:
            kept.append(group)
    if alone and not kept:
        raise Refusal(
            f"recorded: expected at least 2 completions a prompt, got 1 for group "
            f"{alone[0][0].group[:40]!r}, and no group to learn from among {len(groups)}; a group "
            "of one has no variance to learn from: completions of one prompt share prompt or group"
        )
    if too_long and not kept:
        raise Refusal(
            f"recorded: expected prompt and completion of at most {context} tokens, the model's "
            f"context, got {_longest(too_long[0])} in group {too_long[0][0].group[:40]!r}, and no "
            f"group to learn from among {len(groups)}; leave long rollouts out"
        )
    return kept, {"alone": len(alone), "too_long": len(too_long)}


def _longest(group: Sequence[Rollout]) -> int:
    return max(len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in group)


def _check_rewards(groups: Sequence[list[Rollout]], paths: Sequence[str]) -> None:
    rewarded = [sum(r.reward is not None for r in group) for group in groups]
    if groups and max(rewarded) < 2:
        raise Refusal(
            f"recorded: expected rewards, got no group with two in {', '.join(paths)}; "
            "agro score FILE reward=... writes them"
        )


def _check_spelling(path: Path, rows: Sequence[tuple[int, Row]], tokenizer: Any) -> None:
    """Refuses a file whose ids another tokenizer made: they do not spell the text beside them.

    A few may differ (text is trimmed, or cut at a stop string), so the majority decides.
    """
    both = [(n, row) for n, row in rows if row.get("completion") and row.get("completion_ids")]
    wrong = []
    for number, row in both[:SPELLED]:
        ids, text = row["completion_ids"], row["completion"].strip()
        spelt = tokenizer.decode(ids, skip_special_tokens=True)
        if text not in spelt and text not in tokenizer.decode(ids):
            wrong.append((number, text, spelt))
    if 2 * len(wrong) > min(SPELLED, len(both)):
        number, text, spelt = wrong[0]
        raise Refusal(
            f"recorded: expected completion_ids that spell {text[:40]!r} in {path}, line {number}, "
            f"got {spelt[:40]!r}; they were recorded with another tokenizer: leave completion_ids "
            "out and the text is tokenised"
        )
