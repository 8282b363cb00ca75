"""The environments of a run's rollouts, asked from here, alive in a process that may be killed.

It is one process a rank, as for a reward function of the user's own. A call that takes too long
costs its rollout alone: the process is killed, another one is started, and the other rollouts'
environments are brought to where they were by the same calls with the same seeds, each of which may
take as long as any other.
"""

import base64
import itertools
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agro_train.config import TrainConfig
from agro_train.environments import worker
from agro_train.environments.environment import Message
from agro_train.rewards.own_code import Failed, OwnCode, one_by_one
from agro_train.rewards.workers import CannotStart
from agro_train.seeds import derive_seed


@dataclass(frozen=True)
class Said:
    messages: list[Message] | None
    reward: float | None


@dataclass(frozen=True)
class Behind:
    """The process has not made all calls that come before the one that it was asked for."""

    made: int  # calls of the rollout


@dataclass
class Episode:
    """A rollout as its environment knows it."""

    key: int
    columns: Mapping[str, Any]  # of the dataset's row
    seed: int  # the prompt's
    number: int  # of the rollout in its group
    texts: list[str] = field(default_factory=list)  # the model's turns
    said: list[Said] = field(default_factory=list)  # of reset, and of each step

    def seeds(self) -> list[int]:
        """Of each call so far. Resets of one prompt have the same, as they say the same."""
        first = derive_seed(self.seed, "environment")
        steps = range(1, len(self.texts) + 1)
        return [first, *(derive_seed(self.seed, "environment", self.number, n) for n in steps)]


class Environments:
    """Those of one class, by its name `module:Class`."""

    def __init__(self, spec: str, timeout_s: float) -> None:
        """Raises Refusal where there is no such class."""
        self.spec = spec
        self.workers = OwnCode(worker.__name__, spec, timeout_s)
        self.keys = itertools.count()

    @classmethod
    def of(cls, config: TrainConfig) -> "Environments | None":
        """The configured ones. Raises Refusal where they cannot be had."""
        return cls(config.environment, config.reward_timeout_s) if config.environment else None

    def episode(self, columns: Mapping[str, Any], seed: int, number: int) -> Episode:
        return Episode(next(self.keys), columns, seed, number)

    def ask(self, episodes: Sequence[Episode]) -> Iterator[Said | Failed]:
        """What each environment says to its rollout's newest turn, or to its reset; `one_by_one`
        says when one is not asked."""
        for episode, found in zip(episodes, one_by_one(self._call, episodes), strict=True):
            if not isinstance(found, Failed):
                episode.said.append(found)
            yield found

    def close(self, episodes: Sequence[Episode]) -> Failed | None:
        """Has those of rollouts that are over forgotten. Returns how that failed, which costs
        nothing."""
        found = self._job({"over": [episode.key for episode in episodes]})
        return found if isinstance(found, Failed) else None

    def _call(self, episode: Episode) -> Said | Failed:
        """The newest call of a rollout, after those before it where the process is a new one."""
        newest = len(episode.texts)
        found = self._nth(episode, newest)
        if not isinstance(found, Behind):
            return found
        # Of a process that ends between two calls, and so is behind once more.
        ended = Failed("error", "ended its process after it had answered")
        for number in range(found.made, newest):
            again = self._nth(episode, number)
            if isinstance(again, Failed):
                return replace(again, again=True)
            if isinstance(again, Behind):
                return ended
            if again != episode.said[number]:
                return Failed(
                    "error",
                    "did not give the same answers to the same turns when a new process took up a "
                    f"rollout: {str(again)[:60]!r}, and before {str(episode.said[number])[:60]!r}",
                )
        found = self._nth(episode, newest)
        return ended if isinstance(found, Behind) else found

    def _nth(self, episode: Episode, number: int) -> Said | Failed | Behind:
        job: dict[str, Any] = {"key": episode.key, "number": number}
        job["seed"] = episode.seeds()[number]
        if number:
            job["text"] = episode.texts[number - 1]
        else:  # a pickle, because columns may hold what JSON has no word for
            job["columns"] = base64.b64encode(pickle.dumps(dict(episode.columns))).decode()
        return self._job(job)

    def _job(self, job: dict[str, Any]) -> Said | Failed | Behind:
        try:
            answer = self.workers.ask(job)
        except CannotStart as error:  # it could at the start of the run, which should not end here
            return Failed("timeout", f"could not be started again: {error}")
        if isinstance(answer, Failed):
            return answer
        if "made" in answer:
            return Behind(answer["made"])
        return Said(answer["messages"], answer["reward"])
