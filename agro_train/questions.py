"""The prompts of a run: loaded, and checked for the model that reads them and the reward that marks
what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agro_train.config import TrainConfig
from agro_train.data.chat import ChatOptions, Renderer
from agro_train.data.prompts import load_prompts
from agro_train.data.replies import check_template
from agro_train.data.rows import check_file
from agro_train.data.sources import check_sources
from agro_train.engines.turns import Dialogue
from agro_train.environments.pool import Environments
from agro_train.policy import tiny
from agro_train.ranks import Ranks
from agro_train.refusal import Refusal
from agro_train.rewards.functions import check_columns, with_readable_gold
from agro_train.types import Prompt

LeftOut = dict[str, int]  # how many prompts, by the reason: too_long, unreadable_gold


@dataclass(frozen=True)
class Questions:
    """Training prompts and held-out ones."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    left_out: LeftOut  # of the training prompts
    left_out_held: LeftOut

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt; 0 where there is none."""
        return max((len(prompt.ids) for prompt in [*self.prompts, *self.held_out]), default=0)


def check_files(config: TrainConfig, *, recorded: bool) -> None:
    """Raises Refusal for files and folders of the settings that are not there, before anything is
    loaded or asked of a hub.

    Args:
        recorded: whether those of the setting `recorded` are wanted, too.
    """
    if config.data:
        check_sources(config.data)
    if config.eval_data:
        check_sources(config.eval_data, "eval_data")
    for path in config.recorded if recorded else ():
        check_file(Path(path), "recorded")
    if config.chat_template and not Path(config.chat_template).is_file():
        raise Refusal(
            f"chat_template: expected a file, got {config.chat_template!r}; there is no such file, "
            "and chat_template='' takes the one that is saved with the tokenizer"
        )


def chat_options(config: TrainConfig, *, resumed: bool = False) -> ChatOptions:
    """How the configuration has prompts rendered, recorded ones, too."""
    return ChatOptions(config.system_prompt, config.chat_template_kwargs, resumed)


def start_dialogue(
    config: TrainConfig,
    environments: Environments | None,
    tokenizer: Any,
    context: int | None,
    questions: Questions,
) -> Dialogue | None:
    """Puts the environment to a first prompt. None where there is no environment. Raises Refusal
    where it does not take the prompt, or the chat template has no place for its replies.

    Args:
        context: tokens that the model can read; None: unknown.
    """
    if environments is None:
        return None
    longest = config.max_prompt_length
    if context is not None:
        longest = min(longest, context - config.max_completion_length)
    options = chat_options(config)
    check_template(tokenizer, options.kwargs)
    renderer = Renderer(tokenizer, config.prompt_template, options)
    dialogue = Dialogue(environments, renderer, config, longest)
    prompts = [*questions.prompts, *questions.held_out]
    if any("turns" in prompt.columns for prompt in prompts):
        raise Refusal(
            "environment: expected no column turns in the dataset, got one; reward functions get "
            "the rollout's turns under that name: rename it"
        )
    if prompts:
        dialogue.check(prompts[0])
    return dialogue


def load_questions(
    config: TrainConfig,
    tokenizer: Any,
    context: int | None,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    *,
    gold_needed: bool,
    resumed: bool = False,
) -> Questions:
    """Prompts that fit the model's context and have what the configured rewards need.

    Every rank gets all of them; the gold answers, which take time to parse, are shared out.

    Args:
        context: tokens that the model can read; None: unknown.
        gold_needed: whether it is refused, and not only counted, that no training prompt or no
            held-out prompt has a gold answer that can be parsed.
        resumed: whether they are of a run that goes on.
    """
    if not (config.data or config.eval_data):
        return Questions([], [], _left_out(0, [], []), _left_out(0, [], []))
    prompts, held_out, too_long = load_prompts(
        config.data or config.eval_data,
        config.eval_data,
        config.eval_prompts,
        tokenizer,
        config.prompt_template,
        config.max_prompt_length,
        chat_options(config, resumed=resumed),
        config.gold_column,
    )
    if not config.data:  # every group is recorded, and the file is to be evaluated on alone
        prompts, too_long = [], (0, too_long[1])
    if config.model == "tiny":
        tiny.check_prompts([*prompts, *held_out])
    for spec in config.reward:
        check_columns(spec, [*prompts, *held_out], config.gold_column)
    check_context(config, [*prompts, *held_out], context)
    good, good_held = (
        readable(part, config, ranks, needed=gold_needed) for part in (prompts, held_out)
    )
    return Questions(
        prompts=good,
        held_out=good_held,
        left_out=_left_out(too_long[0], prompts, good),
        left_out_held=_left_out(too_long[1], held_out, good_held),
    )


def _left_out(too_long: int, prompts: Sequence[Prompt], good: Sequence[Prompt]) -> LeftOut:
    return {"too_long": too_long, "unreadable_gold": len(prompts) - len(good)}


def readable(
    prompts: list[Prompt], config: TrainConfig, ranks: Ranks, *, needed: bool
) -> list[Prompt]:
    """The prompts whose gold answer the rewards can read; each rank looks at a part of them.

    Where some are `needed`, raises Refusal if there are prompts and none of them can be read.
    """
    kept = ranks.gather(with_readable_gold(ranks.block(prompts), config))
    if needed and prompts and not kept:
        raise Refusal(
            f"data: expected gold answers that math-verify can parse, got none in {len(prompts)} "
            f"prompts, the first of which is {prompts[0].text[:40]!r}"
        )
    return kept


def check_context(config: TrainConfig, prompts: Sequence[Prompt], context: int | None) -> None:
    """Raises Refusal where a completion could run out of the model's context."""
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    if context is not None and longest + config.max_completion_length > context:
        raise Refusal(
            f"max_completion_length: expected at most {context - longest}, what the longest prompt "
            f"of {longest} tokens leaves of the model's {context}, got "
            f"{config.max_completion_length}; lower it or max_prompt_length"
        )
