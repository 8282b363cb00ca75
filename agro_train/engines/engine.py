"""What an engine is: prompts in, completions out. Where a new engine starts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, Unpack

from torch import Tensor

from agro_train.config import TrainConfig
from agro_train.data import kept_ids
from agro_train.refusal import Refusal
from agro_train.seeds import derive_seed
from agro_train.types import Prompt, Rollout

# Seconds for a request of tokens. Those of all ranks queue up at the server, and a step's may well
# take an hour. A server that dies closes its connections, and is noticed at once all the same; one
# whose host vanishes is noticed after two minutes, on Linux (keep_alive.py).
TOKENS_S = 6 * 3600.0


class BrokenEngine(Refusal):
    """The engine has stopped answering, or does not have the weights it was sent."""


@dataclass(frozen=True)
class Sampling:
    """What shapes completions besides temperature and length; the settings of the same names."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0

    @staticmethod
    def of(config: TrainConfig) -> "Sampling":
        return Sampling(
            config.top_k, config.top_p, config.min_p, tuple(config.stop), config.min_new_tokens
        )

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def stop_window(self) -> int:
        """How many last tokens hold the longest stop string and more, for a token spells one byte
        or more of it."""
        return max((len(text.encode()) for text in self.stop), default=0) + 8

    def stops(self, ids: Sequence[int], tokenizer: Any) -> bool:
        """Whether the newest of a completion's ids, from the last `stop_window` of them on, brings
        a stop string to its end. What comes after that in the same token does not matter."""
        text, before = (
            tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (ids, ids[:-1])
        )
        # The bytes of a letter that is not complete yet, which decode to one of these each.
        done = len(before.rstrip("\N{REPLACEMENT CHARACTER}"))
        return any((at := text.rfind(stop)) >= 0 and at + len(stop) > done for stop in self.stop)

    def end(self, ids: Sequence[int], tokenizer: Any, end_tokens: set[int]) -> int | None:
        """How many of the ids belong to the completion: up to the first end token, or the token
        that completes a stop string. Both stay: they were sampled, so they are scored. None: it was
        cut off."""
        for count, token in enumerate(ids, start=1):
            if token in end_tokens:
                return count
            if self.stop and count > self.min_new_tokens:
                window = ids[max(0, count - self.stop_window) : count]
                if self.stops(window, tokenizer):
                    return count
        return None


PLAIN = Sampling()  # from the whole softmax until an end token


class Ask(TypedDict):
    """How an engine is asked to complete prompts."""

    seeds: Sequence[int]
    """Of each prompt; equal ones give the same completions of the same prompt."""
    num_generations: int
    """Completions of each prompt."""
    temperature: float
    """0 is greedy decoding; otherwise tokens are drawn from the softmax at that temperature, the
    distribution that the trainer scores: over all ids, or over those that the run's top_k, top_p
    and min_p keep, and the rollout's `kept_ids` says which."""
    step: int | None
    """How many steps the policy's weights have taken. None: they never change."""
    limits: NotRequired[Sequence[int]]
    """Tokens at most of each prompt's completions; absent: max_completion_length."""


class Engine(Protocol):
    """Whatever completes prompts with the policy's weights as they are."""

    def complete(self, prompts: Sequence[Prompt], **ask: Unpack[Ask]) -> list[Rollout]:
        """`num_generations` completions of each prompt, neighbours in the order of the prompts.

        Every rank calls it, each with prompts of its own, of which there is at least one.
        """


@dataclass(frozen=True)
class Snapshot:
    """The policy's weights after `step` steps, on their way to an engine that works beside it."""

    step: int
    files: tuple[Path, ...] = ()  # of safetensors; the engine deletes them once it has read them
    # (n,) float64, nats: what the policy gives the tokens that show whether the weights arrived.
    probe_logprobs: Tensor | None = None


class EngineAhead(Protocol):
    """An engine that samples while the policy is trained. `load` and `sample` are called in one
    thread, in an order that is the same on all ranks; `snapshot` in the trainer's."""

    def snapshot(self, step: int, prompt: Prompt) -> Snapshot:
        """A copy of the policy's weights. Every rank calls it, for sharded ones are gathered.

        Args:
            prompt: any, whose completion may show later whether the weights arrived.
        """

    def load(self, snapshot: Snapshot) -> None:
        """Takes the weights, and makes sure of it. Every rank calls it. Raises BrokenEngine."""

    def sample(
        self, prompts: Sequence[Prompt], **ask: Unpack[Ask]
    ) -> Iterator[tuple[int, list[Rollout]]]:
        """The prompts' places and their completions, as they come; otherwise as
        `Engine.complete`. Each with its log-probabilities under the weights that sampled it."""

    def close(self) -> None:
        """Ends the engine, whatever it is doing, if it is the run's own."""


def completion_seed(prompt_seed: int, number: int) -> int:
    """Of the prompt's completion with that number; the same for every engine."""
    return derive_seed(prompt_seed, number)


def cut(
    prompt: Prompt,
    ids: list[int],
    tokenizer: Any,
    end_tokens: set[int],
    temperature: float,
    step: int | None,
    sampling_logprobs: Sequence[float] | None = None,
    sampling: Sampling = PLAIN,
    kept_sets: Sequence[Any] | None = None,
) -> Rollout:
    """A rollout of the ids without what comes after their end, see `Sampling.end`.

    Args:
        kept_sets: the ids that each of `ids` was drawn from, where some were left out.
    """
    length = sampling.end(ids, tokenizer, end_tokens)
    kept = tuple(ids[:length])
    return Rollout(
        group=prompt.group,
        prompt=prompt.text,
        prompt_ids=prompt.ids,
        completion=tokenizer.decode(kept, skip_special_tokens=True),
        completion_ids=kept,
        finish="length" if length is None else "stop",
        reward=None,
        step=step,
        temperature=temperature,
        sampling_logprobs=None if sampling_logprobs is None else tuple(sampling_logprobs[:length]),
        kept_ids=None if kept_sets is None else kept_ids.encode(kept_sets[: len(kept)]),
        columns=prompt.columns,
    )
