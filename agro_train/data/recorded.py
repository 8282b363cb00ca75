"""Recorded rollouts: read from JSONL or parquet files, checked, and put into groups.

A log of rollouts is a dataset: what `write_rollouts` writes, `load_recorded` reads.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agro_train import durable
from agro_train.data import kept_ids
from agro_train.data.prompts import render
from agro_train.data.rows import numbered_rows, read_jsonl
from agro_train.data.tasks import Row
from agro_train.refusal import Refusal
from agro_train.types import Finish, Rollout

# What a recorded rollout's columns may hold. Every other column is the reward function's.
TYPES: dict[str, tuple[type, ...]] = {
    "reward": (int, float, type(None)),
    "prompt": (str,),
    "prompt_ids": (list,),
    "completion": (str,),
    "completion_ids": (list,),
    "group": (str, int),
    "finish": (str,),
    "step": (int, type(None)),
    "temperature": (int, float, type(None)),
    "ref_logprob": (int, float, type(None)),
    "sampling_logprob": (int, float, type(None)),
    "kept_ids": (str, list, type(None)),
    "columns": (dict,),
}
# Written with every rollout, and without a meaning for the run that reads it.
IGNORED = ("source", "rewards", "failure")
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
    if rollout.kept_ids is None:
        del row["kept_ids"]
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
    ids = {name: tuple(row[name]) for name in ("prompt_ids", "completion_ids")}
    return Rollout(**{**row, **ids})


def load_recorded(
    paths: Sequence[str],
    tokenizer: Any,
    template: str,
    *,
    vocab_size: int,
    context: int | None,
    truncated: bool = False,
) -> Recorded:
    """Reads the files and groups their rollouts.

    A line needs `reward` (a number or null), `prompt_ids` or `prompt`, and `completion_ids` or
    `completion`; lines with the same `group` (else the same prompt) belong together, however many
    they are. A prompt given as text is rendered like a dataset's; a completion's text is tokenised
    apart from it, and an end token is appended only where `finish` says "stop". `ref_logprob` is
    the log-probability of the completion under the run's reference at the run's temperature, nats,
    the sum over its tokens; where it is absent the reference is asked. `sampling_logprob` is the
    same under whoever sampled it, at the temperature of the sampling. `kept_ids` says which ids
    each token was drawn from.

    Args:
        vocab_size: of the model: larger ids are refused.
        context: tokens the model can read: longer rollouts are refused. None: unknown.
        truncated: whether the run scores over `kept_ids`, which every rollout then needs; a run
            that samples from all ids scores over all, whatever the sampler left out.
    """
    files: list[RecordedFile] = []
    groups: dict[str, list[Rollout]] = {}
    for path in map(Path, paths):
        rows = numbered_rows(path)
        if not rows:
            raise Refusal(f"recorded: expected at least one rollout in {path}, got none")
        rollouts = []
        for number, row in rows:
            where = f"{path}, line {number}"
            rollout = _recorded_rollout(row, where, tokenizer, template, vocab_size)
            if truncated:
                rollout = replace(rollout, kept_ids=_kept_ids(row, rollout, where, vocab_size))
            length = len(rollout.prompt_ids) + len(rollout.completion_ids)
            if context is not None and length > context:
                raise Refusal(
                    f"recorded: expected prompt and completion of at most {context} tokens, the "
                    f"model's context, in {where}, got {length}; leave the rollout out"
                )
            group = groups.setdefault(rollout.group, [])
            if group and group[0].prompt_ids != rollout.prompt_ids:
                raise Refusal(
                    f"recorded: expected one prompt in group {rollout.group!r}, got another in "
                    f"{where}; give each prompt a group of its own over all files"
                )
            group.append(rollout)
            rollouts.append(rollout)
        _check_spelling(path, rows, tokenizer)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append(RecordedFile(path, digest, tuple(rollouts)))
    _check_groups(groups, files)
    return Recorded(tuple(files), tuple(tuple(group) for group in groups.values()))


def _check_groups(groups: dict[str, list[Rollout]], files: Sequence[RecordedFile]) -> None:
    for name, rollouts in groups.items():
        if len(rollouts) < 2:
            single = sum(len(group) < 2 for group in groups.values())
            raise Refusal(
                f"recorded: expected at least 2 completions a prompt, got 1 for group {name!r} "
                f"({rollouts[0].prompt[:40]!r}), one of {single} such in {len(groups)} groups; "
                "a group of one has no variance to learn from"
            )
    rewarded = [sum(r.reward is not None for r in group) for group in groups.values()]
    if groups and max(rewarded) < 2:
        raise Refusal(
            f"recorded: expected rewards, got no group with two in "
            f"{', '.join(str(file.path) for file in files)}; agro score FILE reward=... writes them"
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


def _recorded_rollout(
    row: Row, where: str, tokenizer: Any, template: str, vocab_size: int
) -> Rollout:
    # In a parquet file every row has every column; null stands for one that is not given.
    row = {k: v for k, v in row.items() if v is not None or k == "reward"}
    _check_types(row, where)
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
            raise Refusal(
                f"recorded: expected {name} of one or more ids in [0, {vocab_size}) in {where}, "
                f"got {str(ids)[:60]}; was it recorded with another tokenizer?"
            )
    others = {k: v for k, v in row.items() if k not in TYPES and k not in IGNORED}
    return Rollout(
        group=str(row.get("group", prompt)),
        prompt=prompt,
        prompt_ids=tuple(prompt_ids),
        completion=row.get("completion") or tokenizer.decode(completion_ids),
        completion_ids=tuple(completion_ids),
        finish=finish,
        reward=_finite(row["reward"]),
        step=row.get("step"),
        temperature=row.get("temperature"),
        source="recorded",
        ref_logprob=_finite(row.get("ref_logprob")),
        sampling_logprob=_finite(row.get("sampling_logprob")),
        columns={**others, **row.get("columns", {})},
    )


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
    ids = rollout.completion_ids
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
    if row.get("finish", "stop") not in ("stop", "length"):
        raise Refusal(
            f"recorded: expected stop or length as finish in {where}, got {row['finish']!r}"
        )


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
