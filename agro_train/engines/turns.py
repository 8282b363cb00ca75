"""Rollouts of several turns: the model's, by whatever engine samples one, and the environment's.

All rollouts that are asked for together have their first turn, then their environments' answers,
then their second turn, and so on, until none is left.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Unpack

from agro_train.config import TrainConfig
from agro_train.data import kept_ids
from agro_train.data.chat import Renderer
from agro_train.data.prompts import regrouped
from agro_train.data.replies import reply_ids
from agro_train.engines.engine import Ask
from agro_train.environments.environment import Message
from agro_train.environments.pool import Environments, Episode, Said
from agro_train.refusal import Refusal
from agro_train.rewards.environment import EnvironmentReward
from agro_train.rewards.own_code import Failed
from agro_train.seeds import derive_seed
from agro_train.types import Prompt, Rollout, Turn

logger = logging.getLogger(__name__)

Group = tuple[int, list[Rollout]]  # a prompt's place, and its completions
Groups = Iterable[Group]


class OneTurn(Protocol):
    """As `EngineAhead.sample`: completes prompts, without an environment."""

    def __call__(self, prompts: Sequence[Prompt], **ask: Unpack[Ask]) -> Groups: ...


@dataclass
class _Growing:
    """A rollout that is not over yet."""

    prompt: Prompt
    episode: Episode
    ids: tuple[int, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    # As the engine has them.
    model_turns: list[Rollout] = field(default_factory=list)
    cut_off: bool = False
    failed: Failed | None = None
    done: bool = False  # by the environment's word

    def add(self, turn: Rollout) -> None:
        self.model_turns.append(turn)
        self.cut_off = turn.finish == "length"
        self.ids += turn.completion_ids
        said: Turn = {
            "by": "model",
            "tokens": len(turn.completion_ids),
            "text": turn.completion,
        }
        self.turns.append(said)
        self.episode.texts.append(turn.completion)

    def answer(self, ids: Sequence[int], messages: Sequence[Message]) -> None:
        self.ids += tuple(ids)
        text = "\n\n".join(message["content"] for message in messages)
        self.turns.append({"by": "environment", "tokens": len(ids), "text": text})

    def next_prompt(self) -> Prompt:
        return replace(self.prompt, ids=self.prompt.ids + self.ids)


@dataclass(frozen=True)
class Dialogue:
    """How the run's rollouts come to have several turns.

    Args:
        longest_prompt: tokens of the longest that `reset` may give.
    """

    environments: Environments
    renderer: Renderer
    config: TrainConfig
    longest_prompt: int

    def check(self, prompt: Prompt) -> None:
        """Raises Refusal if the environment does not take a prompt's row."""
        (found,) = self._reset([prompt], [0], 1)
        self.environments.close([found.episode])
        if found.failed is not None:
            logger.warning("environment: %s", found.failed.trace or found.failed.why)
            raise Refusal(
                f"environment: expected {self.environments.spec} to begin a rollout of "
                f"{prompt.text[:40]!r}, got one that {found.failed.why}"
            )

    def sample(
        self, one_turn: OneTurn, prompts: Sequence[Prompt], **ask: Unpack[Ask]
    ) -> Iterator[Group]:
        """As `EngineAhead.sample`; all groups come at the end."""
        size = ask["num_generations"]
        rollouts = self._reset(prompts, ask["seeds"], size)
        firsts = [rollouts[place * size].prompt for place in range(len(prompts))]
        for place, group in one_turn(firsts, **ask):
            for number, found in enumerate(group):
                rollouts[place * size + number].add(found)
        turn = 1
        live = self._after_turn([one for one in rollouts if one.failed is None], turn)
        while live:
            more: Ask = {
                "seeds": [
                    derive_seed(one.episode.seed, "turn", one.episode.number, turn) for one in live
                ],
                "num_generations": 1,
                "temperature": ask["temperature"],
                "step": ask["step"],
                "limits": [self._room(one) for one in live],
            }
            for place, (found,) in one_turn([one.next_prompt() for one in live], **more):
                live[place].add(found)
            turn += 1
            live = self._after_turn(live, turn)
        self._end(rollouts)
        whole = [self._rollout(one) for one in rollouts]
        for place in range(len(prompts)):
            yield place, whole[place * size : (place + 1) * size]

    def _reset(self, prompts: Sequence[Prompt], seeds: Sequence[int], size: int) -> list[_Growing]:
        """The rollouts of the prompts, neighbours, before their first turn.

        Where the environment has prompts of its own, those of a group are one; a rollout that would
        have another one has failed, and so has the whole group if it is too long.
        """
        rollouts = [
            _Growing(prompt, self.environments.episode(prompt.columns, seed, number))
            for prompt, seed in zip(prompts, seeds, strict=True)
            for number in range(size)
        ]
        answers = list(self.environments.ask([one.episode for one in rollouts]))
        for place, prompt in enumerate(prompts):
            span = slice(place * size, (place + 1) * size)
            self._begin(prompt, rollouts[span], answers[span])
        return rollouts

    def _begin(
        self, prompt: Prompt, group: Sequence[_Growing], answers: Sequence[Said | Failed]
    ) -> None:
        said = [answer for answer in answers if isinstance(answer, Said)]
        begun: Prompt | Failed = prompt
        if said and said[0].messages is not None:
            begun = self._rendered(prompt, said[0].messages)
        for one, answer in zip(group, answers, strict=True):
            if isinstance(answer, Failed):
                one.failed = answer
            elif answer.messages != said[0].messages:
                one.failed = Failed("error", "gave rollouts of one row different prompts")
            elif isinstance(begun, Failed):
                one.failed = begun
            if isinstance(begun, Prompt):
                one.prompt = begun

    def _rendered(self, prompt: Prompt, messages: Sequence[Message]) -> Prompt | Failed:
        try:
            found = self.renderer({"prompt": list(messages)})
        except Refusal as error:
            return Failed("error", f"gave a prompt that cannot be rendered: {error}")
        if len(found.ids) > self.longest_prompt:
            return Failed(
                "error",
                f"gave a prompt of {len(found.ids)} tokens, more than the {self.longest_prompt} "
                "that max_prompt_length and the model's context leave",
            )
        group = prompt.group
        if found.ids != prompt.ids:
            # A reset may draw another prompt for the same row in a later step. Rows that are no
            # group stay apart where their environments say the same.
            group = regrouped(found.group, prompt.group)
        return replace(prompt, group=group, text=found.text, ids=found.ids)

    def _after_turn(self, live: Sequence[_Growing], turn: int) -> list[_Growing]:
        """Those rollouts that have another turn, once their environments have answered this one.

        Args:
            turn: how many they have had.
        """
        goes_on = []
        answers = self.environments.ask([one.episode for one in live])
        for one, answer in zip(live, answers, strict=True):
            if isinstance(answer, Failed):
                one.failed = answer
            elif answer.messages is None:
                one.done = True
            elif not one.cut_off and turn < self.config.max_turns:
                self._reply(one, answer.messages)
                if not (one.cut_off or one.failed):
                    goes_on.append(one)
        return goes_on

    def _reply(self, one: _Growing, messages: Sequence[Message]) -> None:
        """Adds what the environment said, if that leaves room for a token of the model's."""
        tokenizer, kwargs = self.renderer.tokenizer, self.renderer.options.kwargs
        try:
            ids = reply_ids(tokenizer, messages, one.ids[-1], kwargs)
        except Refusal as error:
            one.failed = Failed("error", f"said what cannot be rendered: {error}")
            return
        if not ids:
            one.failed = Failed("error", "said a text of no tokens")
        elif self._room(one) <= len(ids):
            one.cut_off = True
        else:
            one.answer(ids, messages)

    def _room(self, one: _Growing) -> int:
        return self.config.max_completion_length - len(one.ids)

    def _end(self, rollouts: Sequence[_Growing]) -> None:
        failures = [one.failed for one in rollouts if one.failed is not None]
        if failures:
            logger.warning(
                "environment: %s failed in %d of %d rollouts, which have no reward; in the first "
                "it %s\n%s",
                self.environments.spec,
                len(failures),
                len(rollouts),
                failures[0].why,
                failures[0].trace,
            )
        not_closed = self.environments.close([one.episode for one in rollouts])
        if not_closed is not None:
            logger.warning(
                "environment: close of %s %s\n%s",
                self.environments.spec,
                not_closed.why,
                not_closed.trace,
            )

    def _rollout(self, one: _Growing) -> Rollout:
        last = one.model_turns[-1]
        kept = [turn.kept_ids for turn in one.model_turns if turn.kept_ids is not None]
        logprobs = [turn.sampling_logprobs for turn in one.model_turns]
        return replace(
            last,
            prompt=one.prompt.text,
            prompt_ids=one.prompt.ids,
            completion_ids=one.ids,
            finish="length" if one.cut_off else "stop",
            failure=None if one.failed is None else one.failed.failure,
            sampling_logprobs=None
            if any(part is None for part in logprobs)
            else tuple(value for part in logprobs for value in part or ()),
            kept_ids=kept_ids.encode([s for text in kept for s in kept_ids.decode(text)])
            if kept
            else None,
            turns=tuple(one.turns),
            environment_reward=self._reward(one),
        )

    def _reward(self, one: _Growing) -> float | None:
        """The sum of the numbers that the steps gave. Where there is none, a rollout that came to a
        bound has earned nothing, and of one that is done nothing is known."""
        numbers = [said.reward for said in one.episode.said if said.reward is not None]
        if numbers:
            return sum(numbers)
        asked = EnvironmentReward.name in self.config.reward
        return 0.0 if asked and not one.done and one.failed is None else None


def sampled(
    dialogue: Dialogue | None, one_turn: OneTurn, prompts: Sequence[Prompt], **ask: Unpack[Ask]
) -> Groups:
    """Whole rollouts of the prompts: of one turn, where there is no environment."""
    if dialogue is None:
        return one_turn(prompts, **ask)
    return dialogue.sample(one_turn, prompts, **ask)
