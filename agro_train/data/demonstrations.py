"""The dataset's own worked answers, each one more member of its prompt's fresh group.

AGRO learns from any generation, so a group may hold one that no policy made. Nobody knows how
probable it was to its author; the reference's log-probability stands in, as for any row without a
`sampling_logprob`.
"""

from collections.abc import Sequence
from typing import Any

from agro_train.data.chat import turn_end
from agro_train.refusal import Refusal
from agro_train.types import Prompt, Rollout


def load_demonstrations(
    prompts: Sequence[Prompt], column: str, tokenizer: Any, context: int | None
) -> dict[tuple[str, str], Rollout]:
    """The prompts' worked answers, ended as a completion is, by group and text: two rows may ask
    the same with answers of their own.

    Args:
        column: of the dataset, with text in every row.
        context: tokens the model can read. None: unknown.
    """
    end = turn_end(tokenizer)
    if end is None:
        raise Refusal(
            "demonstrations: expected a tokenizer with an end token, got none; a worked answer "
            "cannot be ended without: set the tokenizer's eos_token"
        )
    found = {}
    for prompt in prompts:
        text = prompt.columns.get(column)
        question = f"the row of {prompt.text[:40]!r}"
        if not isinstance(text, str) or not text.strip():
            raise Refusal(
                f"demonstrations: expected text in column {column!r} of every training row, got "
                f"{text!r} in {question}, which has {', '.join(prompt.columns)}; name the column "
                "of worked answers"
            )
        ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], end)
        length = len(prompt.ids) + len(ids)
        if context is not None and length > context:
            raise Refusal(
                f"demonstrations: expected prompt and worked answer of at most {context} tokens, "
                f"the model's context, got {length} in {question}; leave the row out"
            )
        found[prompt.group, text] = Rollout(
            group=prompt.group,
            prompt=prompt.text,
            prompt_ids=prompt.ids,
            completion=text,
            completion_ids=ids,
            finish="stop",
            reward=None,
            source="demonstration",
            columns=prompt.columns,
        )
    return found
