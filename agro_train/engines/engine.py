"""What an engine is: prompts in, completions out. Where a new engine starts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from agro_train.refusal import Refusal
from agro_train.seeds import derive_seed
from agro_train.types import Prompt, Rollout


class BrokenEngine(Refusal):
    """The engine has stopped answering, or does not have the weights it was sent."""


class Engine(Protocol):
    """Whatever completes prompts with the policy's weights as they are."""

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        seeds: Sequence[int],
        num_generations: int,
        temperature: float,
        step: int | None,
    ) -> list[Rollout]:
        """`num_generations` completions of each prompt, neighbours in the order of the prompts.

        Every rank calls it, each with prompts of its own, of which there is at least one.

        Args:
            seeds: of each prompt; equal ones give the same completions of the same prompt.
            temperature: 0 is greedy decoding; otherwise tokens are drawn from the full softmax at
                that temperature (no top-k, no top-p), the distribution that the trainer scores.
            step: how many steps the policy's weights have taken. None: they never change.
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
        self,
        prompts: Sequence[Prompt],
        *,
        seeds: Sequence[int],
        num_generations: int,
        temperature: float,
        step: int | None,
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
) -> Rollout:
    """Cuts the padding off by the first end token, which stays: it was sampled, so it is scored."""
    length = next((i + 1 for i, token in enumerate(ids) if token in end_tokens), None)
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
        columns=prompt.columns,
    )
