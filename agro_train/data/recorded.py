"""Recorded rollouts: read from files, checked, and put into groups.

A log of rollouts is a dataset: what `write_rollouts` writes, `load_recorded` reads.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from agro_train import durable
from agro_train.data import kept_ids
from agro_train.data.chat import ChatOptions, Renderer, spoken, turn_end
from agro_train.data.prompts import gold_of, golds_of, regrouped
from agro_train.data.rows import CSV_SEPARATORS, numbered_rows, read_jsonl, suffix
from agro_train.data.tasks import Row
from agro_train.refusal import Refusal
from agro_train.types import Finish, Rollout, Turn

# What a recorded rollout's columns may hold. Every other column is the reward function's.
TYPES: dict[str, tuple[type, ...]] = {
    "reward": (int, float, type(None)),
    "prompt": (str, list),
    "prompt_ids": (list,),
    "completion": (str,),
    "completion_ids": (list,),
    "group": (str, int),
    "finish": (str,),
    "finish_reason": (str,),
    "step": (int, type(None)),
    "temperature": (int, float, type(None)),
    "ref_logprob": (int, float, type(None)),
    "sampling_logprob": (int, float, type(None)),
    "kept_ids": (str, list, type(None)),
    "columns": (dict,),
}
# Written with every rollout, and without a meaning for the run that reads it.
IGNORED = ("source", "rewards", "failure", "environment_reward")
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


def rollout_to_json(rollout: Rollout) -> str:
    """One line of a rollout log. Without the reference's log-probability: the line does not say
    whose it is, and another run has another reference. Of the sampler's, the sum alone. What JSON
    has no word for (a date or a decimal in a parquet column) is written as text.
    """
    row = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
    row["sampling_logprob"] = sampling_logprob(rollout)
    del row["ref_logprob"], row["sampling_logprobs"]
    for name in ("kept_ids", "turns", "environment_reward"):
        if row[name] is None:
            del row[name]
    return json.dumps(row, ensure_ascii=False, default=str)


def sampling_logprob(rollout: Rollout) -> float | None:
    """Nats, of the whole completion under whoever sampled it; None where that is not known.

    Rounding may put the sum of a completion that is all but certain above 0, where no probability
    is: it is then 0.
    """
    known = rollout.sampling_logprob
    if known is None and rollout.sampling_logprobs is not None:
        known = math.fsum(rollout.sampling_logprobs)
    return min(known, 0.0) if known is not None and math.isfinite(known) else None


def write_rollouts(path: Path, rollouts: Iterable[Rollout]) -> None:
    """A log of rollouts, a line each. The file appears when it is complete."""
    durable.replace(path, "".join(rollout_to_json(rollout) + "\n" for rollout in rollouts))


def read_rollouts(path: Path) -> list[Rollout]:
    """A log that the run itself wrote, as it was."""
    return [rollout_of(row) for row in read_jsonl(path)]


def rollout_of(row: dict[str, Any]) -> Rollout:
    """What `vars` of a rollout was before it went through JSON."""
    lists = ("prompt_ids", "completion_ids", "turns")
    tuples = {name: tuple(row[name]) for name in lists if row.get(name) is not None}
    return Rollout(**{**row, **tuples})


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
    reader = _Reader(Renderer(tokenizer, template, options), vocab_size)
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
                rollout = replace(rollout, kept_ids=_kept_ids(row, rollout, where, vocab_size))
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
        (number, by_our_names(_from_cells(row) if read_cells else row))
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


def by_our_names(row: Row) -> Row:
    """The row under the names of TYPES: `finish_reason`, as OpenAI and vLLM call it, and a
    completion that is one message. Null is what is not given, except for the reward: in a parquet
    file every row has every column.
    """
    row = {name: value for name, value in row.items() if value is not None or name == "reward"}
    completion = row.get("completion")
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        row["completion"] = completion[0].get("content")
    return row


def _from_cells(row: Row) -> Row:
    """A row of CSV, where all is text, with numbers and lists where a rollout has them. What is
    neither stays text, which the check of types refuses."""
    read = dict(row)
    for name, kinds in TYPES.items():
        if isinstance(row.get(name), str) and str not in kinds:
            with suppress(ValueError):
                read[name] = json.loads(row[name])
    return read


@dataclass(frozen=True)
class _Reader:
    """Rows to rollouts, for one model."""

    renderer: Renderer
    vocab_size: int

    @cached_property
    def end(self) -> int | None:
        return turn_end(self.renderer.tokenizer)

    @cached_property
    def ends(self) -> set[int]:
        return {self.end, self.renderer.tokenizer.eos_token_id} - {None}

    def rollout(self, row: Row, where: str) -> Rollout:
        """What a line says. Raises Refusal, which names the line."""
        _check_types(row, where)
        tokenizer = self.renderer.tokenizer
        finish = _finish(row, where)
        if "prompt_ids" in row:
            prompt_ids = row["prompt_ids"]
            prompt = _text_beside(row) or tokenizer.decode(prompt_ids)
        else:
            try:
                rendered = self.renderer(row)
            except Refusal as error:
                raise Refusal(
                    f"recorded: {str(error).removeprefix('data: ')}, in {where}"
                ) from error
            prompt_ids, prompt = list(rendered.ids), rendered.text
        completion_ids = row.get("completion_ids")
        if completion_ids is None:
            completion_ids = self._tokenised(row["completion"], finish, where)
        for name, ids in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids)):
            if not ids or not all(isinstance(i, int) and 0 <= i < self.vocab_size for i in ids):
                raise Refusal(
                    f"recorded: expected {name} of one or more ids in [0, {self.vocab_size}) in "
                    f"{where}, got {str(ids)[:60]}; was it recorded with another tokenizer?"
                )
        known = {*TYPES, *IGNORED, *(["turns"] if has_turns(row) else [])}
        others = {k: v for k, v in row.items() if k not in known}
        return Rollout(
            group=str(row.get("group", prompt)),
            prompt=prompt,
            prompt_ids=tuple(prompt_ids),
            completion=row.get("completion") or tokenizer.decode(completion_ids),
            completion_ids=tuple(completion_ids),
            turns=_turns(row, completion_ids, tokenizer, where),
            finish=finish,
            reward=_finite(row["reward"]),
            step=row.get("step"),
            temperature=row.get("temperature"),
            source="recorded",
            ref_logprob=_finite(row.get("ref_logprob")),
            sampling_logprob=_finite(row.get("sampling_logprob")),
            columns={**others, **row.get("columns", {})},
        )

    def _tokenised(self, text: str, finish: Finish, where: str) -> list[int]:
        """The completion's ids. One that stopped ends with one end token, whether its text holds
        that or not."""
        tokenizer = self.renderer.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        first = next((i for i, token in enumerate(ids) if token in self.ends), None)
        if first is not None:
            behind = tokenizer.decode(ids[first + 1 :], skip_special_tokens=True)
            if behind.strip():
                raise Refusal(
                    f"recorded: expected a completion of one turn in {where}, got "
                    f"{behind.strip()[:40]!r} behind its end token; cut it there"
                )
            return ids[: first + 1]
        if finish == "stop" and self.end is None:
            raise Refusal(
                f"recorded: expected a tokenizer with an end token for {where}, which finished, "
                "got none; set the tokenizer's eos_token"
            )
        return [*ids, self.end] if finish == "stop" and self.end is not None else ids


def has_turns(row: Row) -> bool:
    """Whether the row's column `turns` is a rollout's. Any other is the reward function's."""
    turns = row.get("turns")
    return isinstance(turns, list) and any(isinstance(t, dict) and "tokens" in t for t in turns)


def _turns(
    row: Row, completion_ids: Sequence[int], tokenizer: Any, where: str
) -> tuple[Turn, ...] | None:
    """The row's, once they are seen to be those of its completion. Raises Refusal."""
    if not has_turns(row):
        return None
    given = row["turns"]
    if "completion_ids" not in row:
        raise Refusal(
            f"recorded: expected completion_ids beside turns in {where}, got none; text alone does "
            "not say where a turn ends: record it with them (agro rollout does)"
        )
    turns: list[Turn] = []
    start = 0
    for number, turn in enumerate(given):
        by, tokens = (turn.get("by"), turn.get("tokens")) if isinstance(turn, dict) else (None, 0)
        if by != ("model", "environment")[number % 2] or type(tokens) is not int or tokens < 1:
            break
        ids = completion_ids[start : start + tokens]
        text = turn.get("text") or tokenizer.decode(ids, skip_special_tokens=True)
        turns.append({"by": by, "tokens": tokens, "text": str(text)})
        start += tokens
    if len(turns) < len(given) or len(given) % 2 == 0 or start != len(completion_ids):
        raise Refusal(
            "recorded: expected turns {by, tokens, text}, by model and environment one after the "
            f"other, the model first and last, whose tokens are the {len(completion_ids)} of "
            f"completion_ids, in {where}, got {str(given)[:80]}; record it again"
        )
    return tuple(turns)


def _text_beside(row: Row) -> str:
    """The prompt's text beside its ids; of messages, what they say."""
    prompt = row.get("prompt") or ""
    if isinstance(prompt, str):
        return prompt
    return spoken(prompt)


def _finish(row: Row, where: str) -> Finish:
    """Raises Refusal for a word that says neither that it stopped nor that it was cut off."""
    given = {name: row[name] for name in ("finish", "finish_reason") if name in row}
    for name, value in given.items():
        if value not in ("stop", "length"):
            raise Refusal(f"recorded: expected stop or length as {name} in {where}, got {value!r}")
    if len(set(given.values())) > 1:
        raise Refusal(
            f"recorded: expected finish and finish_reason to agree in {where}, got "
            f"{given['finish']!r} and {given['finish_reason']!r}"
        )
    finish: Finish = next(iter(given.values()), "stop")
    return finish


def _kept_ids(row: Row, rollout: Rollout, where: str, vocab_size: int) -> str:
    """The row's, as a rollout has them, once they are seen to be sets that its tokens are in."""
    given = row.get("kept_ids")
    if given is None:
        raise Refusal(
            f"recorded: expected kept_ids in {where}, got none; with top_k, top_p or min_p a "
            "completion is scored over the ids that its tokens were drawn from: record it with "
            "them (agro rollout does), or sample without those three"
        )
    try:
        text = given if isinstance(given, str) else kept_ids.encode(given)
        sets = kept_ids.decode(text)
    except (ValueError, TypeError, OverflowError) as error:
        raise Refusal(
            f"recorded: expected kept_ids as a rollout log has them, or a list of ids for each "
            f"token, in {where}, got {str(given)[:60]!r} ({error}); record it again"
        ) from error
    ids = rollout.sampled_ids
    wrong = "" if len(sets) == len(ids) else f"{len(sets)} sets for {len(ids)} tokens"
    for token, kept in zip(ids, sets, strict=False):
        if kept[0] < 0 or kept[-1] >= vocab_size:
            wrong = wrong or f"an id outside [0, {vocab_size})"
        if token not in kept:
            wrong = wrong or f"a set without its token {token}, whose probability is then 0"
    if wrong:
        raise Refusal(
            f"recorded: expected kept_ids to hold a set for each token, the token among them, in "
            f"{where}, got {wrong}; record it again"
        )
    return text


def _check_types(row: Row, where: str) -> None:
    for either in (("reward",), ("prompt_ids", "prompt"), ("completion_ids", "completion")):
        if not any(name in row for name in either):
            raise Refusal(
                f"recorded: expected a column {' or '.join(either)} in {where}, "
                f"got {', '.join(row)}"
            )
    for name, kind in TYPES.items():
        if name in row and not isinstance(row[name], kind):
            allowed = " or ".join(k.__name__ for k in kind).replace("NoneType", "null")
            raise Refusal(f"recorded: expected {allowed} as {name} in {where}, got {row[name]!r}")
    sampled = row.get("sampling_logprob")
    if sampled is not None and (isinstance(sampled, bool) or not -math.inf < sampled <= 0):
        raise Refusal(
            f"recorded: expected a finite number of nats that is not above 0 as sampling_logprob "
            f"in {where}, got {sampled!r}; it is the log of a probability, or null where it is "
            "not known"
        )


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
