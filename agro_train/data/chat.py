"""From a dataset's question, text or messages, to the text and tokens that the model reads, and the
token that ends its answer.

Training, rollouts, evaluation and recorded data all come through here. What the chat template
writes is read as it is: where it writes a begin token, the tokenizer adds none.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from agro_train.data.tasks import Row
from agro_train.refusal import Refusal
from agro_train.types import Prompt

Message = dict[str, Any]

SENTINEL = "agro-7f3a"  # stands for a message's text where only what is around it is wanted
# What `apply_chat_template` is told here, so no setting may say it again.
RESERVED = (
    "conversation",
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
)


@dataclass(frozen=True)
class ChatOptions:
    """What the configuration says about rendering besides prompt_template."""

    system_prompt: str = ""  # before every prompt that has no system message
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # variables of the chat template
    # Whether a run goes on. It may have begun when settings without effect were not refused, and
    # they have none now.
    resumed: bool = False


@dataclass(frozen=True)
class Renderer:
    """Rows to prompts.

    Args:
        template: the setting prompt_template.
    """

    tokenizer: Any
    template: str = "{prompt}"
    options: ChatOptions = ChatOptions()

    def __post_init__(self) -> None:
        """Raises Refusal for options that the tokenizer's chat template has no place for."""
        without = self.tokenizer.chat_template is None
        if without and (self.options.system_prompt or self.options.kwargs):
            given = "system_prompt" if self.options.system_prompt else "chat_template_kwargs"
            raise Refusal(
                f"{given}: expected a model with a chat template, got one without; write it into "
                "prompt_template, or give chat_template=FILE"
            )
        for name in self.options.kwargs:
            if name in RESERVED or name not in self.tokenizer.get_chat_template():
                raise Refusal(
                    f"chat_template_kwargs: expected variables of the model's chat template, got "
                    f"{name!r}; look into the template for their names"
                )

    def __call__(self, row: Mapping[str, Any]) -> Prompt:
        """The prompt of a row, whose column `prompt` is text or messages."""
        question = row["prompt"]
        if isinstance(question, str):
            text, whole = self._of_text(question)
        else:
            text, whole = self._of_messages(checked_messages(question, "prompt"))
        # A begin token in the text counts; the tokenizer would add a second one.
        begin = self.tokenizer.bos_token
        whole = whole or bool(begin and text.startswith(begin))
        ids = self.tokenizer(text, add_special_tokens=not whole)["input_ids"]
        if not ids:
            raise Refusal(f"data: expected a prompt of one or more tokens, got {text!r}")
        group = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Prompt(group=group, text=text, ids=tuple(ids), columns=dict(row))

    def _of_text(self, question: str) -> tuple[str, bool]:
        """The text that the model reads, and whether it is whole, so that nothing is added."""
        text = self.template.replace("{prompt}", question)
        if self.tokenizer.chat_template is None:
            return text, False
        for given in (question, text):
            if self._rendered_before(given):
                if not self.options.resumed:
                    self._check_spoken(given)
                begin = self.tokenizer.bos_token
                begins = not begin or given.lstrip().startswith(begin)
                return given if begins or not self._frame.begins(begin) else begin + given, True
        return self._render([{"role": "user", "content": text}]), True

    def _of_messages(self, messages: list[Message]) -> tuple[str, bool]:
        if self.tokenizer.chat_template is None:
            if [message["role"] for message in messages] != ["user"]:
                raise Refusal(
                    "data: expected a model with a chat template for prompts that are messages, "
                    f"got one without, and {', '.join(m['role'] for m in messages)} in "
                    f"{str(messages[0]['content'])[:40]!r}; take a chat model, or give "
                    "chat_template=FILE"
                )
            return self.template.replace("{prompt}", messages[0]["content"]), False
        if self.template != "{prompt}":
            raise Refusal(
                "prompt_template: expected '{prompt}' for prompts that are messages, which are "
                f"rendered as they are, got {self.template!r}; set system_prompt in its place"
            )
        return self._render(messages), True

    def _render(self, messages: Sequence[Message]) -> str:
        system = self.options.system_prompt
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        # An answer that is begun is gone on with, as in TRL.
        begun = messages[-1]["role"] == "assistant"
        return apply_template(
            self.tokenizer,
            messages,
            add_generation_prompt=not begun,
            continue_final_message=begun,
            **self.options.kwargs,
        )

    def _check_spoken(self, rendered: str) -> None:
        """Raises Refusal where a setting would say something and a rendered prompt does not."""
        before, _, after = self.template.partition("{prompt}")
        for name, words in (
            ("prompt_template", before),
            ("prompt_template", after),
            ("system_prompt", self.options.system_prompt),
        ):
            if words.strip() not in rendered:
                raise Refusal(
                    f"{name}: expected none for a prompt that holds the chat template, and is read "
                    f"as it is, got {words.strip()[:40]!r} and {rendered[:40]!r}; leave it out, "
                    "or give the messages themselves"
                )

    @cached_property
    def _frame(self) -> "_Frame":
        return _Frame.of(self.tokenizer, self.options.kwargs)

    def _rendered_before(self, text: str) -> bool:
        """Whether the chat template has been applied to it, up to where the answer begins.

        Raises Refusal for a conversation that ends anywhere else.
        """
        if self._frame.awaits_answer(text):
            return True
        if self._frame.starts_turn(text):
            raise Refusal(
                f"data: expected a question, or a rendered prompt that ends with "
                f"{self._frame.suffix!r}, got {text[:40]!r} ... {text[-20:]!r}, which holds the "
                "chat template and ends elsewhere; give the messages themselves"
            )
        return False


@dataclass(frozen=True)
class _Frame:
    """What the chat template writes around a lone question."""

    prefix: str
    suffix: str  # from the question's end to where the answer begins
    opening: str  # the part of the suffix that opens the answer's turn
    marks: tuple[str, ...]  # special tokens in it

    @classmethod
    def of(cls, tokenizer: Any, kwargs: Mapping[str, Any]) -> "_Frame":
        messages = [{"role": "user", "content": SENTINEL}]
        whole = apply_template(tokenizer, messages, add_generation_prompt=True, **kwargs)
        closed = apply_template(tokenizer, messages, add_generation_prompt=False, **kwargs)
        prefix, _, suffix = whole.partition(SENTINEL)
        opening = whole.removeprefix(closed) if whole.startswith(closed) else ""
        special = {str(token) for token in _special_tokens(tokenizer).values()}
        return cls(
            prefix=prefix,
            suffix=suffix,
            opening=(opening.strip() or suffix.strip()),
            marks=tuple(sorted(token for token in special if token in prefix + suffix)),
        )

    def begins(self, token: str) -> bool:
        return self.prefix.startswith(token)

    def awaits_answer(self, text: str) -> bool:
        if not self.opening:
            return False
        if not any(mark in self.opening for mark in self.marks):  # words, which a question may have
            return text.rstrip().endswith(self.suffix.strip())
        _, found, after = text.rpartition(self.opening)
        return bool(found) and not any(mark in after for mark in self.marks)

    def starts_turn(self, text: str) -> bool:
        return text.lstrip().startswith(self.marks)


def apply_template(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    """The text of a conversation. Raises Refusal where the template does not take it."""
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise Refusal(
            f"data: expected messages that the model's chat template takes, got {roles} in "
            f"{str(messages[0]['content'])[:40]!r}: {error}"
        ) from error
    return text


def turn_end(tokenizer: Any) -> int | None:
    """The token that ends a completion: what the chat template writes behind an assistant's
    message, where that is a token of its own (Llama-3: <|eot_id|>), else the tokenizer's end token.
    None where there is neither.
    """
    end: int | None = tokenizer.eos_token_id
    if tokenizer.chat_template is None:
        return end
    turns = [{"role": "user", "content": SENTINEL}, {"role": "assistant", "content": SENTINEL}]
    _, _, behind = apply_template(tokenizer, turns).rpartition(SENTINEL)
    ids = tokenizer(behind.strip(), add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in _special_tokens(tokenizer) else end


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """By id; the model's tokens for what is no text, the turns of a conversation among them."""
    added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return {
        **added,
        **dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)),
    }


def checked_messages(value: Any, column: str) -> list[Message]:
    """Messages with a role and text each. Null keys, which parquet gives to every message that
    lacks what another has, are dropped; a content of text parts becomes one text.

    Raises Refusal, which ends where its caller says in which row.
    """
    if not isinstance(value, list) or not value:
        raise Refusal(f"data: expected text or messages in column {column}, got {value!r}")
    return [_checked_message(message, column) for message in value]


def _checked_message(given: Any, column: str) -> Message:
    message = {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else {}
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    elif content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise Refusal(
            f"data: expected messages with role and content, both text, in column {column}, got "
            f"{str(given)[:80]}"
        )
    return {**message, "content": content}


def spoken(messages: Any) -> str:
    """What messages say, without who says it."""
    return "\n\n".join(one["content"] for one in checked_messages(messages, "prompt"))


def question_of(row: Row, column: str) -> str | list[Message]:
    """The question in a row's column: text, or messages up to the turn that is to be answered.

    A conversation in column `messages` that ends with an answer is an example of one: the answer
    is not part of the question.
    """
    value = row.get(column)
    if isinstance(value, str):
        return value
    messages = checked_messages(value, column)
    if column == "messages" and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise Refusal(f"data: expected a question in column {column}, got an answer alone")
    return messages
