"""vLLM in a process beside this one, or as a server: requests of tokens, answers of tokens.

Both are asked in the same way, and both take new weights through vLLM's own weight transfer
interface, with the backend of `vllm_worker`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from agro_train.engines.engine import BrokenEngine
from agro_train.engines.weights import Parcel
from agro_train.settings import MOST_KEPT

BACKEND = "agro"  # of weight transfer
EXTENSION = "agro_train.engines.vllm_worker.WorkerExtension"
# A token, for the ids that top_k kept: twice as many, for vLLM keeps those that tie with the last.
MOST_LOGPROBS = 2 * MOST_KEPT
FORGET_S = 10.0
# Why vLLM ends a completion that is one. Otherwise it says abort, error or repetition: abort also
# when it is told to end, with the tokens that there are by then.
WHOLE = ("stop", "length")


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...]
    parameters: dict[str, Any]  # of vLLM's SamplingParams


@dataclass(frozen=True)
class Answer:
    ids: tuple[int, ...]  # as sampled, the end token included
    logprobs: tuple[float, ...]  # of ids, nats; of the processed logits, so at the temperature
    prompt_logprobs: tuple[float, ...]  # of prompt_ids[1:] at temperature 1, if they were asked for
    # Of each of ids, the likeliest ids there with their log-probabilities, if they were asked for.
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()


class Client(Protocol):
    def ask(self, requests: Sequence[Request]) -> Iterable[tuple[int, Answer]]:
        """The requests' places and their answers, as they come."""

    @property
    def takes_tensors(self) -> bool:
        """Or else files."""

    def load(self, parcels: Iterable[Parcel]) -> None:
        """Takes all the weights, in parcels that are asked for one by one, and forgets what it has
        computed with the old ones."""


def check_whole(finish_reason: str | None, whose: str) -> None:
    """Raises BrokenEngine for a completion that vLLM broke off: it is none of the policy's."""
    if finish_reason not in WHOLE:
        raise BrokenEngine(
            f"vllm: expected whole completions of {whose}, got one that it broke off "
            f"(finish_reason {finish_reason}); its own messages say why, and --resume goes on"
        )


def forget(reset: Callable[[], bool]) -> None:
    """Empties the prefix cache. It cannot be done while a request still holds a part of it, which
    lasts a moment longer than the request."""
    deadline = time.monotonic() + FORGET_S
    while not reset():
        if time.monotonic() > deadline:
            raise BrokenEngine(
                f"vllm: expected it to empty its prefix cache within {FORGET_S:g} s, got requests "
                "that still use it; let nobody else ask the run's server"
            )
        time.sleep(0.05)


def reads_in_parts() -> bool:
    """Whether vLLM may read a prompt in parts, as it does where many come at once.

    After each part it sets a seeded request's random numbers back, which torch has no way to do on
    a CPU: vLLM would end.
    """
    return torch.cuda.is_available()
