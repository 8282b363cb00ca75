"""One recorded rollout: the row of a file, what its columns may hold, and what it says."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from agro_train.data import kept_ids
from agro_train.data.chat import Renderer, spoken, turn_end
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


def from_cells(row: Row) -> Row:
    """A row of CSV, where all is text, with numbers and lists where a rollout has them. What is
    neither stays text, which the check of types refuses."""
    read = dict(row)
    for name, kinds in TYPES.items():
        if isinstance(row.get(name), str) and str not in kinds:
            with suppress(ValueError):
                read[name] = json.loads(row[name])
    return read


@dataclass(frozen=True)
class Reader:
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


def kept_ids_of(row: Row, rollout: Rollout, where: str, vocab_size: int) -> str:
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
