"""A step's fresh groups: sampled when the step needs them, or ahead of it.

With `max_staleness` k the groups of step t are sampled by the weights after max(0, t - k) updates,
while the updates before t are made. Which weights sample which groups is a function of the step
alone: a run's numbers do not depend on how long anything takes.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeVar, Unpack

from agro_train.config import TrainConfig
from agro_train.data.mix import Mix
from agro_train.data.rollout_log import rollout_of, sampling_logprob
from agro_train.engines.engine import Ask, BrokenEngine, Engine, EngineAhead, Snapshot
from agro_train.ranks import Ranks
from agro_train.refusal import Refusal
from agro_train.rewards.functions import Rewards, score
from agro_train.seeds import derive_seed, shuffled
from agro_train.types import Prompt, Rollout

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """A prompt's scored completions, and its worked answer where the run learns from those."""

    step: int  # that learns from it
    number: int  # of the group in the step
    rollouts: tuple[Rollout, ...]


class FreshGroups(Protocol):
    """Who has the fresh groups made. Every rank calls each of these, in the same order."""

    def take(self, step: int) -> list[Group]:
        """This rank's fresh groups of a step, by number. The policy has taken `step` steps."""

    def advance(self, step: int) -> None:
        """Has everything sampled that the policy of `step` steps is to sample, and returns."""

    def in_flight(self, step: int) -> list[Group]:
        """This rank's groups of steps from `step` on that earlier policies have sampled: what a
        checkpoint after `step` steps has to hold. Waits for those that are not finished."""

    def metrics(self) -> dict[str, float]:
        """Columns of metrics.jsonl, of the step whose groups were taken last."""

    def close(self) -> None:
        """Ends what works beside the run."""


@dataclass(frozen=True)
class Questioner:
    """What is asked in which step, of this rank, and how answers become groups."""

    config: TrainConfig
    prompts: Sequence[Prompt]
    mix: Sequence[Mix]
    ranks: Ranks
    rewards: Rewards
    demonstrations: Mapping[tuple[str, str], Rollout]  # by group and text; empty: none are used

    def numbers(self, step: int) -> list[int]:
        numbers = range(self.config.prompts_per_step)[self.ranks.rank_slice]
        return [number for number in numbers if number < self.mix[step].fresh]

    def asked(self, step: int) -> list[Prompt]:
        mix = self.mix[step]
        prompts = shuffled(self.prompts, mix.first_fresh, mix.fresh, self.config.seed)
        return [prompts[number] for number in self.numbers(step)]

    def seeds(self, step: int) -> list[int]:
        seed = self.config.seed
        return [derive_seed(seed, "generate", step, number) for number in self.numbers(step)]

    def how(self, step: int, weights: int) -> Ask:
        """How an engine is asked for the step's groups, by the weights after so many steps."""
        return {
            "seeds": self.seeds(step),
            "num_generations": self.config.num_generations,
            "temperature": self.config.temperature,
            "step": weights,
        }

    def with_demonstration(self, prompt: Prompt, sampled: Sequence[Rollout]) -> list[Rollout]:
        """A prompt's completions, and its worked answer if the run learns from those."""
        if not self.demonstrations:
            return list(sampled)
        found = self.demonstrations[prompt.group, prompt.columns[self.config.demonstrations]]
        return [*sampled, replace(found, columns=prompt.columns)]


class InStep:
    """Groups of the policy as it is, sampled when a step takes them."""

    def __init__(self, questioner: Questioner, engine: Engine) -> None:
        self.questioner, self.engine = questioner, engine

    def take(self, step: int) -> list[Group]:
        ask = self.questioner
        if not ask.mix[step].fresh:
            return []
        prompts, size = ask.asked(step), ask.config.num_generations
        sampled = self.engine.complete(prompts, **ask.how(step, weights=step))
        groups = [
            ask.with_demonstration(prompt, sampled[place * size : (place + 1) * size])
            for place, prompt in enumerate(prompts)
        ]
        # All of them at once: reward functions are told the whole step's.
        scored = iter(score([rollout for group in groups for rollout in group], ask.rewards))
        return [
            Group(step, number, tuple(next(scored) for _ in group))
            for number, group in zip(ask.numbers(step), groups, strict=True)
        ]

    def advance(self, step: int) -> None:
        """There is nothing to sample before a step asks for it."""

    def in_flight(self, step: int) -> list[Group]:
        del step
        return []

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing works beside the run."""


class Ahead:
    """Groups of earlier policies, sampled beside the updates; also the run's `Engine`, so that what
    evaluations ask waits in the same line.

    The policy's weights are copied in the caller's thread, once an update. One thread has the
    engine take them and sample, in the order of the steps; another scores each group when it
    arrives.

    Args:
        restored: groups that the checkpoint held, of this rank.
        start: steps that the policy has taken.
    """

    def __init__(
        self,
        questioner: Questioner,
        engine: EngineAhead,
        start: int,
        restored: Sequence[Group] = (),
    ) -> None:
        self.questioner, self.engine = questioner, engine
        self.sampling, self.scoring = Lane("sampling"), Lane("scoring")
        self.pending: dict[int, Future[list[Future[Group]]]] = {}
        self.sampled_by: dict[int, int] = {}
        by_step: dict[int, list[Group]] = defaultdict(list)
        for group in restored:
            by_step[group.step].append(group)
        # The first step whose groups nobody has been asked for.
        self.next = max(by_step, default=start - 1) + 1
        for step in range(start, self.next):  # some have no fresh groups
            self.pending[step] = done([done(group) for group in by_step[step]])
            self.sampled_by[step] = -1
        self.snapshot: Snapshot | None = None  # the newest weights that were copied
        self.loaded: int | None = None  # the steps of the weights that the engine has
        self.idle_since = time.perf_counter()
        self.idle_s = 0.0
        self._metrics: dict[str, float] = {}

    def advance(self, step: int) -> None:
        # Kept until now: a step that is interrupted before its update takes them again.
        for taken in [at for at in self.pending if at < step]:
            del self.pending[taken], self.sampled_by[taken]
        config = self.questioner.config
        last = min(step + config.max_staleness, config.steps - 1)
        for asked in range(self.next, last + 1):
            self.sampled_by[asked] = step
            if self.questioner.mix[asked].fresh:
                snapshot = self.weights(step)
                self.pending[asked] = self.sampling.submit(self._sample, asked, snapshot)
            else:
                self.pending[asked] = done([])
        self.next = max(self.next, last + 1)

    def take(self, step: int) -> list[Group]:
        self.advance(step)
        began = time.perf_counter()
        groups = self._together(lambda: results(self.pending[step]))
        ready = [at for at, future in self.pending.items() if at > step and is_ready(future)]
        self._metrics = {
            "async/wait_s": time.perf_counter() - began,
            "async/engine_idle_s": self.idle_s,
            "async/queue": float(len(ready)),
        }
        self.idle_s = 0.0
        return groups

    def in_flight(self, step: int) -> list[Group]:
        found: list[Group] = []
        for at in sorted(self.pending):
            if at < step or self.sampled_by[at] == step:
                continue  # learned from, or the policy of the checkpoint can sample them again
            try:
                found += results(self.pending[at])
            except Refusal:
                break  # the checkpoint that is written when what makes the groups has ended
        return found

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def close(self) -> None:
        self.sampling.close()
        self.scoring.close()
        self.engine.close()

    def complete(self, prompts: Sequence[Prompt], **ask: Unpack[Ask]) -> list[Rollout]:
        """As `Engine.complete`; waits for its turn."""
        assert ask["step"] is not None, "a run knows the steps of its policy"
        snapshot = self.weights(ask["step"])

        def sample() -> list[Rollout]:
            with self._at_work(snapshot):
                groups = dict(self.engine.sample(prompts, **ask))
            return [rollout for place in range(len(prompts)) for rollout in groups[place]]

        future = self.sampling.submit(sample)
        return self._together(future.result)

    def weights(self, step: int) -> Snapshot:
        """A copy of the policy's weights as they are."""
        if self.snapshot is None or self.snapshot.step != step:
            prompt = self.questioner.prompts[0]
            self.snapshot = self._together(lambda: self.engine.snapshot(step, prompt))
        return self.snapshot

    def _sample(self, step: int, snapshot: Snapshot) -> list[Future[Group]]:
        ask = self.questioner
        numbers, prompts = ask.numbers(step), ask.asked(step)
        groups: dict[int, Future[Group]] = {}
        with self._at_work(snapshot):
            for place, sampled in self.engine.sample(prompts, **ask.how(step, snapshot.step)):
                # The sum is all that a row needs which is no longer the policy's own.
                kept = [
                    replace(r, sampling_logprob=sampling_logprob(r), sampling_logprobs=None)
                    for r in sampled
                ]
                group = ask.with_demonstration(prompts[place], kept)
                groups[place] = self.scoring.submit(self._score, step, numbers[place], group)
        return [groups[place] for place in range(len(prompts))]

    def _score(self, step: int, number: int, group: Sequence[Rollout]) -> Group:
        return Group(step, number, tuple(score(group, self.questioner.rewards)))

    @contextmanager
    def _at_work(self, snapshot: Snapshot) -> Iterator[None]:
        """The engine with the weights of a snapshot; notes how long it had nothing to do."""
        self.idle_s += time.perf_counter() - self.idle_since
        if self.loaded != snapshot.step:
            self.engine.load(snapshot)
            self.loaded = snapshot.step
        try:
            yield
        finally:
            self.idle_since = time.perf_counter()

    def _together(self, function: Callable[[], T]) -> T:
        """function() on every rank; where it fails on one it fails on all, in the caller's
        thread."""
        failure: Refusal | None = None
        result: T | None = None
        try:
            result = function()
        except Refusal as error:
            failure = error
        texts = self.questioner.ranks.gather([failure and str(failure)])
        for text in filter(None, texts):
            raise BrokenEngine(text) from failure
        return result  # type: ignore[return-value]


class Lane:
    """A thread that does one thing after another. It does not outlive the main one."""

    def __init__(self, name: str) -> None:
        self.jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.closed = False
        Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # whatever it is, it is raised where it is waited for
                future.set_exception(error)

        self.jobs.put(job)
        return future

    def close(self) -> None:
        """What it does is done to its end; what still waits is not begun."""
        self.closed = True
        self.jobs.put(None)

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None and not self.closed:
            job()


def done(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future


def results(groups: Future[list[Future[Group]]]) -> list[Group]:
    """Waits for a step's groups."""
    return [group.result() for group in groups.result()]


def is_ready(groups: Future[list[Future[Group]]]) -> bool:
    """Whether a step's groups are sampled and scored."""
    return groups.done() and not groups.exception() and all(g.done() for g in groups.result())


# --- In a checkpoint ------------------------------------------------------------------------------


def groups_to_json(groups: Sequence[Group]) -> str:
    """A line a group."""
    return "".join(
        json.dumps(
            {
                "step": group.step,
                "number": group.number,
                "rollouts": [vars(rollout) for rollout in group.rollouts],
            },
            default=str,
        )
        + "\n"
        for group in groups
    )


def groups_of_json(text: str) -> Iterator[Group]:
    for line in text.splitlines():
        row = json.loads(line)
        yield Group(row["step"], row["number"], tuple(map(rollout_of, row["rollouts"])))
