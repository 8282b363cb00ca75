"""What stands between two turns of the model: what answered it, as the chat template writes it."""

from collections.abc import Mapping, Sequence
from typing import Any

from agro_train.data.chat import SENTINEL, Message, apply_template, turn_end
from agro_train.refusal import Refusal

ANSWER = f"{SENTINEL}-answer"  # stands for the model's turn


def reply_ids(
    tokenizer: Any,
    messages: Sequence[Message],
    last: int,
    kwargs: Mapping[str, Any],
) -> list[int]:
    """The tokens from the end of the model's turn to where its next one begins.

    With a chat template they are what it writes behind an assistant's message, the messages, and
    the opening of another one; the model's own end token is not said twice. Without one they are
    the messages' texts. Raises Refusal for what the template or the tokenizer does not take.

    Args:
        last: the turn's last token.
        kwargs: the template's variables.
    """
    if tokenizer.chat_template is None:
        text = "".join(message["content"] for message in messages)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        _check_spelled(tokenizer, text, ids)
        return ids
    behind = _behind_answer(tokenizer, messages, kwargs)
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    if last == turn_end(tokenizer) and last in ids:
        ids = ids[ids.index(last) + 1 :]
    return ids


def check_template(tokenizer: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises Refusal for a chat template by which no reply could be found."""
    if tokenizer.chat_template is not None:
        _behind_answer(tokenizer, [{"role": "user", "content": SENTINEL}], kwargs)


def _behind_answer(tokenizer: Any, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> str:
    """What the chat template writes from the end of an assistant's text on."""
    turns = [{"role": "user", "content": SENTINEL}, {"role": "assistant", "content": ANSWER}]
    try:
        whole = apply_template(tokenizer, [*turns, *messages], add_generation_prompt=True, **kwargs)
    except Refusal as error:
        raise Refusal(
            "environment: expected messages that the model's chat template takes after an "
            f"assistant's, got {', '.join(m['role'] for m in messages)}: {error.__cause__}"
        ) from error
    if whole.count(ANSWER) != 1:
        raise Refusal(
            "environment: expected a chat template that writes an assistant's message as it is, "
            f"once, got {whole[:160]!r} for {ANSWER!r}; give one that does, as chat_template=FILE"
        )
    return whole.partition(ANSWER)[2]


def _check_spelled(tokenizer: Any, text: str, ids: Sequence[int]) -> None:
    """A tokenizer of few letters writes a special token for one that it does not know."""
    special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    if any(token in ids and spelled not in text for token, spelled in special):
        raise Refusal(
            f"environment: expected text of letters that the model's tokenizer knows, got "
            f"{text[:40]!r}; say it in others"
        )
