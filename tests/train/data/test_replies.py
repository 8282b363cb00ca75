"""What stands between two turns: as the chat template writes it."""

import pytest

from agro_train.data.replies import check_template, reply_ids
from agro_train.policy import tiny
from agro_train.refusal import Refusal
from tests.train.models import llama3_tokenizer

SAID = [{"role": "user", "content": "What of 5?"}]


def test_the_turn_is_ended_once_and_the_next_one_opened() -> None:
    tokenizer = llama3_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    other = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = f"{header.format('user')}What of 5?<|eot_id|>{header.format('assistant')}"
    assert tokenizer.decode(reply_ids(tokenizer, SAID, end, {})) == expected
    # A turn that a stop string ended, or another end token, is ended by the environment.
    for last in (other, tokenizer("a")["input_ids"][0]):
        assert tokenizer.decode(reply_ids(tokenizer, SAID, last, {})) == f"<|eot_id|>{expected}"
    # Together with the prompt and the turn they are what the template writes.
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = tokenizer.apply_chat_template(turns, tokenize=False)
    whole = tokenizer.apply_chat_template(
        [*turns, *SAID], tokenize=False, add_generation_prompt=True
    )
    assert before + expected == whole


def test_without_a_template_it_is_the_text() -> None:
    tokenizer = tiny.build_tokenizer()
    twice = [{"role": "tool", "content": "15"}, {"role": "user", "content": ","}]
    assert tokenizer.decode(reply_ids(tokenizer, twice, 1, {})) == "15,"


def test_what_cannot_be_written_is_one_sentence() -> None:
    with pytest.raises(Refusal, match="environment: expected text of letters that the .*'a5'"):
        reply_ids(tiny.build_tokenizer(), [{"role": "user", "content": "a5"}], 1, {})
    tokenizer = llama3_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(Refusal, match="takes after an assistant's, got tool: no tools"):
        reply_ids(tokenizer, [{"role": "tool", "content": "5"}], 1, {})


@pytest.mark.parametrize("written", ["m.content | upper", "m.content * 2", "m.role"])
def test_template_that_alters_what_the_model_said_is_refused(written: str) -> None:
    check_template(tiny.build_tokenizer(), {})
    tokenizer = llama3_tokenizer()
    check_template(tokenizer, {})
    text = "{{ " + written + " }}"
    tokenizer.chat_template = f"{{% for m in messages %}}{text}<|eot_id|>{{% endfor %}}"
    message = "expected a chat template that writes an assistant's message as it is"
    with pytest.raises(Refusal, match=f"environment: {message}, once, got .*chat_template=FILE"):
        check_template(tokenizer, {})
    with pytest.raises(Refusal, match=message):
        reply_ids(tokenizer, SAID, 1, {})
