"""Rollouts -> TrainBatch: pack sequences into micro-batches. The only place that shifts targets.

A micro-batch is one row of tokens, sequences end to end, so nothing is computed for padding. Where
the attention kernel takes a mask, a prompt is packed once and all its completions attend to it:
with eight completions of a long prompt that is most of the work. Which sequences share a
micro-batch changes the speed, never the gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agro_train.data import kept_ids
from agro_train.types import MicroBatch, Rollout, TrainBatch


def build_batch(
    rollouts: Sequence[Rollout],
    groups: Sequence[int],
    on_policy: Sequence[bool],
    *,
    token_budget: int,
    share_prompts: bool,
    min_new_tokens: int = 0,
    mask_truncated: bool = False,
) -> TrainBatch:
    """Packs whole groups into micro-batches of at most token_budget tokens.

    Rollouts of one prompt must be neighbours for it to be shared. A sequence longer than the
    budget gets a micro-batch of its own.

    Args:
        min_new_tokens: so many first tokens of a completion, or of each of its turns, cannot be
            end tokens.
        mask_truncated: whether those that were cut off count as without a reward, so that their
            group goes without them.
    """
    unknown = float("nan")
    rewards = [
        unknown if r.reward is None or (mask_truncated and r.finish == "length") else r.reward
        for r in rollouts
    ]
    ref_logprobs = [unknown if r.ref_logprob is None else r.ref_logprob for r in rollouts]
    sampling = [unknown if r.sampling_logprob is None else r.sampling_logprob for r in rollouts]
    return TrainBatch(
        micro=pack(
            rollouts,
            token_budget=token_budget,
            share_prompts=share_prompts,
            min_new_tokens=min_new_tokens,
        ),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        groups=torch.tensor(list(groups)),
        on_policy=torch.tensor(list(on_policy), dtype=torch.bool),
        ref_logprobs=torch.tensor(ref_logprobs, dtype=torch.float64),
        sampling_logprobs=torch.tensor(sampling, dtype=torch.float64),
    )


def pack(
    rollouts: Sequence[Rollout], *, token_budget: int, share_prompts: bool, min_new_tokens: int = 0
) -> tuple[MicroBatch, ...]:
    """Greedy, in order: a sequence that does not fit opens a new micro-batch."""
    done: list[MicroBatch] = []
    packing = _Packing(min_new_tokens)
    for row, rollout in enumerate(rollouts):
        shared = share_prompts and rollout.prompt_ids == packing.prompt_ids
        cost = len(rollout.completion_ids) - 1 + (0 if shared else len(rollout.prompt_ids))
        if packing.rows and len(packing.input_ids) + cost > token_budget:
            done.append(packing.close())
            packing, shared = _Packing(min_new_tokens), False
        if not shared:
            packing.add_prompt(rollout.prompt_ids)
        packing.add_completion(row, rollout)
    if packing.rows:
        done.append(packing.close())
    return tuple(done)


@dataclass
class _Packing:
    """A micro-batch being filled.

    A segment is a prompt, or a completion's tokens; `parents` names the prompt's segment, which a
    completion's token may attend to as well. Segments rise, and a parent is one of them: flex
    attention's block mask counts on both.
    """

    min_new_tokens: int
    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    predictors: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    kept: list[Sequence[int]] = field(default_factory=list)  # for each target; empty: all ids
    early: list[int] = field(default_factory=list)
    later: list[int] = field(default_factory=list)
    cu_inputs: list[int] = field(default_factory=list)
    cu_seqlens: list[int] = field(default_factory=lambda: [0])
    rows: list[int] = field(default_factory=list)
    prompt_ids: tuple[int, ...] = ()
    prompt_segment: int = -1
    last_prompt_token: int = -1

    def add_prompt(self, ids: tuple[int, ...]) -> None:
        self.cu_inputs.append(len(self.input_ids))
        self.prompt_ids = ids
        self.prompt_segment = self._add_segment(ids, first_position=0, parent=None)
        self.last_prompt_token = len(self.input_ids) - 1

    def add_completion(self, row: int, rollout: Rollout) -> None:
        """The shift: the prompt's last token predicts ids[0], ids[j] predicts ids[j + 1], and
        ids[-1] is predicted but never read. What an environment said is read and not predicted.
        """
        ids, start = rollout.completion_ids, len(self.input_ids)
        self._add_segment(ids[:-1], first_position=len(self.prompt_ids), parent=self.prompt_segment)
        predictors = [self.last_prompt_token, *range(start, len(self.input_ids))]
        count = 0
        for places in rollout.sampled:
            first = len(self.targets)
            self.predictors += predictors[places.start : places.stop]
            self.targets += ids[places.start : places.stop]
            # What was kept at an early token has no end token in it anyway.
            barred = 0 if rollout.kept_ids else min(self.min_new_tokens, len(places))
            self.early += range(first, first + barred)
            self.later += range(first + barred, first + len(places))
            count += len(places)
        self.sampling_logprobs += rollout.sampling_logprobs or [float("nan")] * count
        self.kept += kept_ids.decode(rollout.kept_ids) if rollout.kept_ids else [()] * count
        self.cu_seqlens.append(len(self.targets))
        self.rows.append(row)

    def _add_segment(self, ids: tuple[int, ...], *, first_position: int, parent: int | None) -> int:
        segment = len(self.rows) * 2 + (parent is not None)
        self.input_ids += ids
        self.position_ids += range(first_position, first_position + len(ids))
        self.segments += [segment] * len(ids)
        self.parents += [segment if parent is None else parent] * len(ids)
        return segment

    def close(self) -> MicroBatch:
        return MicroBatch(
            input_ids=torch.tensor(self.input_ids),
            position_ids=torch.tensor(self.position_ids),
            segments=torch.tensor(self.segments),
            parents=torch.tensor(self.parents),
            cu_inputs=torch.tensor([*self.cu_inputs, len(self.input_ids)], dtype=torch.int32),
            predictors=torch.tensor(self.predictors),
            targets=torch.tensor(self.targets),
            sampling_logprobs=torch.tensor(self.sampling_logprobs),
            cu_seqlens=torch.tensor(self.cu_seqlens, dtype=torch.int32),
            rows=torch.tensor(self.rows),
            longest=max(self.position_ids) + 1,
            kept_ids=self._kept_ids(),
            early=torch.tensor(self.early) if self.early else None,
            later=torch.tensor(self.later, dtype=torch.int64) if self.early else None,
        )

    def _kept_ids(self) -> Tensor | None:
        most = max(map(len, self.kept))
        if not most:
            return None
        padded = torch.full((len(self.kept), most), -1, dtype=torch.int32)
        for row, ids in zip(padded, self.kept, strict=True):
            row[: len(ids)] = torch.as_tensor(ids)
        return padded
