"""What flows through one training step: Prompt -> Rollout -> TrainBatch -> StepStats. All frozen.

Example. The prompt "2+2=" with ids (5, 9, 5, 11) gets two completions, "4" and "5", each ended by
the end token 1. They are two `Rollout`s of one group:

    prompt="2+2="  prompt_ids=(5, 9, 5, 11)  completion="4"  completion_ids=(7, 1)  reward=1.0
    prompt="2+2="  prompt_ids=(5, 9, 5, 11)  completion="5"  completion_ids=(8, 1)  reward=0.0

Packed into one `MicroBatch` that holds the prompt once, the model reads 6 tokens

    input_ids      5  9  5 11  7  8        position_ids  0  1  2  3  4  4

and the head predicts 4: the token at 3, the prompt's last, predicts both first tokens, the one at 4
the end of "4", and the one at 5 the end of "5":

    predictors     3  4  3  5              targets  7  1  8  1        cu_seqlens  0  2  4
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from agro_train.transfer import upload

Finish = Literal["stop", "length"]
Source = Literal["fresh", "recorded", "replayed", "demonstration"]
Failure = Literal["timeout", "error"]


class Turn(TypedDict):
    """What the model, or the environment that answers it, said at once; as a rollout log has it."""

    by: Literal["model", "environment"]
    tokens: int  # of completion_ids
    text: str  # without special tokens and what the chat template writes around it


@dataclass(frozen=True)
class Prompt:
    """A question as the model reads it."""

    group: str  # its id; the completions that share it form one group
    text: str  # rendered: chat template and all
    ids: tuple[int, ...]
    columns: Mapping[str, Any]  # the dataset's own columns, for the reward function


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt. A JSON line each: a log of rollouts is an offline dataset."""

    group: str
    prompt: str
    prompt_ids: tuple[int, ...]
    completion: str  # of several turns the model's last one
    # What was sampled, end token included where one was sampled; of several turns all of them, the
    # environment's, too.
    completion_ids: tuple[int, ...]
    finish: Finish  # "length": cut off at max_completion_length
    reward: float | None  # None or not finite: dropped from its group, and counted
    step: int | None = None  # the policy that generated it had taken this many steps; None: unknown
    temperature: float | None = None  # of the sampling; None: unknown
    # Sampled in this step, from a recorded file, from an earlier step, or the dataset's own answer.
    source: Source = "fresh"
    rewards: Mapping[str, float | None] = field(default_factory=dict)  # by function, unweighted
    # Of a reward function or the environment; the reward is then 0 (math) or None.
    failure: Failure | None = None
    ref_logprob: float | None = None  # nats, summed over sampled_ids; None: ask the reference
    # Nats, summed over sampled_ids, under whoever sampled them, at that temperature; None: not
    # known.
    sampling_logprob: float | None = None
    # Nats, of each of sampled_ids, from an engine with kernels of its own; None: not known.
    sampling_logprobs: tuple[float, ...] | None = None
    # The ids that each of sampled_ids was drawn from, where top_k, top_p or min_p left some out,
    # as `data.kept_ids` writes them; None: all ids.
    kept_ids: str | None = None
    # The model's turns and the environment's, one after the other; the model has the first and the
    # last one. None: the completion is one turn.
    turns: tuple[Turn, ...] | None = None
    environment_reward: float | None = None  # what the environment gave in all; None: nothing
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sampled(self) -> list[range]:
        """The places in completion_ids of each of the model's turns."""
        if self.turns is None:
            return [range(len(self.completion_ids))]
        found, start = [], 0
        for turn in self.turns:
            if turn["by"] == "model":
                found.append(range(start, start + turn["tokens"]))
            start += turn["tokens"]
        return found

    @property
    def sampled_ids(self) -> tuple[int, ...]:
        """The tokens of the model's turns: those that are scored and trained."""
        if self.turns is None:
            return self.completion_ids
        return tuple(self.completion_ids[i] for places in self.sampled for i in places)

    @property
    def demonstrated(self) -> bool:
        """Whether the dataset gave it, not some policy."""
        return self.source == "demonstration"


@dataclass(frozen=True)
class MicroBatch:
    """Sequences packed end to end for one forward pass. L tokens read, n predicted, S
    completions.
    """

    input_ids: Tensor  # (L,) int64
    position_ids: Tensor  # (L,) int64, each within its own sequence
    segments: Tensor  # (L,) int64: which prompt, or which completion, a token belongs to
    parents: Tensor  # (L,) int64: the segment it may see besides its own, a completion's prompt
    cu_inputs: Tensor  # (sequences + 1,) int32, boundaries in input_ids; for varlen attention
    predictors: Tensor  # (n,) int64: which of the L hidden states predicts targets[i]
    targets: Tensor  # (n,) int64: sampled tokens only
    sampling_logprobs: Tensor  # (n,) float32, nats: of the engine that sampled them; NaN: unknown
    cu_seqlens: Tensor  # (S + 1,) int32: completion boundaries in targets
    rows: Tensor  # (S,) int64: the completion's row in TrainBatch
    longest: int  # tokens of the longest sequence; for varlen attention
    # (n, K) int32, padded with -1: the ids that targets[i] was drawn from, all where a row has
    # none; None: all everywhere.
    kept_ids: Tensor | None = None
    # int64, which of the n were drawn from all ids but the end tokens, being among the first
    # min_new_tokens, and which are the others; None: none was.
    early: Tensor | None = None
    later: Tensor | None = None

    def attends(self, first: Tensor | None = None) -> Tensor:
        """(L, L) bool: may the row's token see the column's; never across sequences.

        Args:
            first: (L,) int64, the least position that each token may see; None: 0.
        """
        related = self.segments[:, None] == self.segments
        related |= self.parents[:, None] == self.segments
        if first is not None:
            related &= self.position_ids >= first[:, None]
        return related.tril()

    def token_rows(self) -> Tensor:
        """(n,) int64: the row in TrainBatch of the completion that each predicted token is in."""
        # Told how many there are, a GPU is not asked.
        return self.rows.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.targets))

    def predicting(self, some: Tensor) -> tuple["MicroBatch", Tensor]:
        """The same tokens read, of which the completions `some`, (S,) bool, alone are predicted;
        and (m,) int64, which of the n targets those are. On the host, which knows their number.
        """
        lengths = self.cu_seqlens.diff()
        stay = some.repeat_interleave(lengths, output_size=len(self.targets))
        places, new = stay.nonzero().squeeze(1), stay.cumsum(0) - 1

        def moved(old: Tensor | None) -> Tensor | None:
            return None if old is None else new[old[stay[old]]]

        part = replace(
            self,
            predictors=self.predictors[places],
            targets=self.targets[places],
            sampling_logprobs=self.sampling_logprobs[places],
            cu_seqlens=nn.functional.pad(lengths[some].cumsum(0, dtype=torch.int32), (1, 0)),
            rows=self.rows[some],
            kept_ids=None if self.kept_ids is None else self.kept_ids[places],
            early=moved(self.early),
            later=moved(self.later),
        )
        return part, places

    def tensors(self) -> dict[str, Tensor]:
        """Those that it has, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> "MicroBatch":
        """The same, from the host to `device`."""
        found = self.tensors()
        moved: dict[str, Any] = dict(zip(found, upload([*found.values()], device), strict=True))
        return replace(self, **moved)


@dataclass(frozen=True)
class TrainBatch:
    """One optimiser step's data on one rank: whole groups, B completions."""

    micro: tuple[MicroBatch, ...]
    rewards: Tensor  # (B,) float64; NaN where there is none
    groups: Tensor  # (B,) int64 ids, the same numbering on all ranks
    on_policy: Tensor  # (B,) bool: sampled from the policy exactly as it is now
    ref_logprobs: Tensor  # (B,) float64, nats: what is known already; NaN: ask the reference
    sampling_logprobs: Tensor  # (B,) float64, nats: under whoever sampled the row; NaN: unknown


@dataclass(frozen=True)
class StepStats:
    """What one update measured, over all ranks; the keys become columns of metrics.jsonl."""

    metrics: Mapping[str, float]
    skipped: bool  # no gradient, or one that is not finite: the weights are untouched
    weights: tuple[float, ...]  # |coefficient| of every rank's completions, one after another
    # Nats, of the same completions under the policy before the update, at its temperature.
    logprobs: tuple[float, ...]
    groups: tuple[int, ...]  # the number of each one's group within the step


@dataclass(frozen=True)
class Scores:
    """What the passes without gradients leave behind, of one rank or of all, one after another."""

    rewards: Tensor  # (B,) float64
    logprobs: Tensor  # (B,) float64: sums over each completion's tokens, under the policy
    ref_logprobs: Tensor  # (B,) float64: the same under the reference
    sampling_logprobs: Tensor  # (B,) float64: under whoever sampled an off-policy row, or whoever
    # stands in; NaN where the policy itself sampled it just now
    lengths: Tensor  # (B,) int64: tokens of each completion
    groups: Tensor  # (B,) int64
    on_policy: Tensor  # (B,) bool
    entropy: Tensor  # 0-d float64, nats: sum over tokens
    num_tokens: Tensor  # 0-d int64
    # (tokens,) float64, nats: how far the policy's log-probability of each token is from that of
    # the engine that sampled it, where the engine told
    mismatch: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
