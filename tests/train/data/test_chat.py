"""Messages and questions as the chat template writes them: the same for all, each token once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.config import load as load_config
from agro_train.data.chat import ChatOptions, turn_end
from agro_train.data.demonstrations import load_demonstrations
from agro_train.data.prompts import render
from agro_train.data.recorded import load_recorded
from agro_train.data.rows import read_jsonl
from agro_train.policy import tiny
from agro_train.policy.load import end_tokens, load_tokenizer
from agro_train.questions import chat_options, load_questions
from agro_train.refusal import Refusal
from tests.train.models import SPECIAL, llama3_tokenizer, save_llama3_miniature, small_run

pytestmark = pytest.mark.usefixtures("no_curves")

BEGIN, END, _, TURN_END, *_ = SPECIAL
SYSTEM = {"role": "system", "content": "You are terse."}
USER = {"role": "user", "content": "What is 6 times 7?"}
ANSWER = {"role": "assistant", "content": "42"}
OPEN = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def turn(role: str, content: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}{TURN_END}"


ASKED = f"{BEGIN}{turn('user', USER['content'])}{OPEN}"
ASKED_TERSE = f"{BEGIN}{turn('system', SYSTEM['content'])}{turn('user', USER['content'])}{OPEN}"
# Thinks unless it is told not to.
THINKING = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}"
)
STRICT = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}"


def adds_begin_token() -> PreTrainedTokenizerFast:
    """As Llama-3's own does, to every text that it is not told is whole."""
    tokenizer = llama3_tokenizer()
    begin = [(BEGIN, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=begin
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


TOKENIZER = adds_begin_token()


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        (USER["content"], {}, ASKED),
        ([USER], {}, ASKED),
        ([SYSTEM, USER], {}, ASKED_TERSE),
        (
            [SYSTEM, USER, ANSWER, {"role": "user", "content": "Why?"}],
            {},
            ASKED_TERSE.removesuffix(OPEN) + turn("assistant", "42") + turn("user", "Why?") + OPEN,
        ),
        # An answer that is begun is gone on with.
        ([USER, {"role": "assistant", "content": "It is"}], {}, ASKED + "It is"),
        # Text in parts, and the null keys of a parquet file.
        (
            [{**USER, "content": [{"type": "text", "text": USER["content"]}], "name": None}],
            {},
            ASKED,
        ),
        (USER["content"], {"system_prompt": "You are terse."}, ASKED_TERSE),
        ([USER], {"system_prompt": "You are terse."}, ASKED_TERSE),
        ([SYSTEM, USER], {"system_prompt": "You are verbose."}, ASKED_TERSE),
        # What holds the template already is taken as it is, begin token and all.
        (ASKED, {}, ASKED),
        (ASKED_TERSE, {}, ASKED_TERSE),
        (ASKED.removeprefix(BEGIN), {}, ASKED),
        ("\n" + ASKED, {}, "\n" + ASKED),
        (ASKED + "<think>\n\n</think>\n\n", {}, ASKED + "<think>\n\n</think>\n\n"),
    ],
)
def test_prompt_is_rendered_by_the_chat_template_with_one_begin_token(
    prompt: Any, options: dict[str, Any], text: str
) -> None:
    found = render({"prompt": prompt}, TOKENIZER, "{prompt}", ChatOptions(**options))
    assert found.text == text
    assert list(found.ids) == TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert found.ids.count(TOKENIZER.bos_token_id) == 1 and found.columns == {"prompt": prompt}


def test_rendered_prompt_in_prompt_template_is_not_rendered_twice() -> None:
    template = f"{BEGIN}{turn('user', '{prompt}')}{OPEN}"
    assert render({"prompt": USER["content"]}, TOKENIZER, template).text == ASKED
    assert render({"prompt": ASKED}, TOKENIZER, "What is {prompt}").text == ASKED


@pytest.mark.parametrize(
    ("name", "template", "system"),
    [
        ("prompt_template", "Q: {prompt}", ""),
        ("prompt_template", "{prompt} Be brief.", ""),
        ("system_prompt", "{prompt}", "You are terse."),
    ],
)
def test_setting_that_a_rendered_prompt_has_no_place_for_is_refused(
    name: str, template: str, system: str
) -> None:
    options = ChatOptions(system_prompt=system)
    with pytest.raises(Refusal, match=f"^{name}: expected none for a prompt that holds the chat"):
        render({"prompt": ASKED}, TOKENIZER, template, options)
    # A run that began before this was refused goes on with the prompts that it had.
    goes_on = replace(options, resumed=True)
    assert render({"prompt": ASKED}, TOKENIZER, template, goes_on).text == ASKED


def test_rendered_prompt_that_says_what_the_settings_say_is_taken() -> None:
    options = ChatOptions(system_prompt=SYSTEM["content"])
    assert render({"prompt": ASKED_TERSE}, TOKENIZER, "{prompt}", options).text == ASKED_TERSE


@pytest.mark.parametrize("text", [f"{BEGIN}Hi", ASKED + "42" + TURN_END, turn("user", "Hi")])
def test_conversation_that_ends_elsewhere_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="expected a question, or a rendered prompt that ends with"):
        render({"prompt": text}, TOKENIZER, "{prompt}")


def test_template_without_special_tokens_is_recognised_by_its_end() -> None:
    tokenizer = llama3_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    whole = "USER: Hi\nASSISTANT:"
    for prompt in ("Hi", whole):
        assert render({"prompt": prompt}, tokenizer, "{prompt}").text == whole
    asked = "Who says ASSISTANT: here?"
    assert render({"prompt": asked}, tokenizer, "{prompt}").text == f"USER: {asked}\nASSISTANT:"
    assert turn_end(tokenizer) == tokenizer.eos_token_id


def test_begin_token_in_a_base_models_prompt_is_not_added_again() -> None:
    tokenizer = adds_begin_token()
    tokenizer.chat_template = None
    for prompt in ("Hi", f"{BEGIN}Hi"):
        ids = render({"prompt": prompt}, tokenizer, "{prompt}").ids
        assert ids == tuple(tokenizer("Hi")["input_ids"])


@pytest.mark.parametrize(
    ("kwargs", "end"), [({}, ""), ({"enable_thinking": False}, "<think></think>")]
)
def test_variables_reach_the_chat_template(kwargs: dict[str, Any], end: str) -> None:
    tokenizer = llama3_tokenizer()
    tokenizer.chat_template = THINKING
    found = render({"prompt": [USER]}, tokenizer, "{prompt}", ChatOptions(kwargs=kwargs))
    assert found.text.endswith(f"<|start_header_id|>assistant<|end_header_id|>{end}")
    assert render({"prompt": found.text}, tokenizer, "{prompt}").text == found.text


@pytest.mark.parametrize(
    ("chat_template", "options", "template", "row", "message"),
    [
        (None, {}, "{prompt}", [SYSTEM, USER], "expected a model with a chat template for prompts"),
        (
            None,
            {"system_prompt": "x"},
            "{prompt}",
            "1",
            "system_prompt: expected a model with a ch",
        ),
        (
            None,
            {"kwargs": {"a": 1}},
            "{prompt}",
            "1",
            "chat_template_kwargs: expected a model with",
        ),
        (
            THINKING,
            {"kwargs": {"thinking_on": 1}},
            "{prompt}",
            "1",
            "of the model's .*'thinking_on'",
        ),
        (
            THINKING,
            {"kwargs": {"messages": 1}},
            "{prompt}",
            "1",
            "chat_template_kwargs: .*'messages'",
        ),
        (
            THINKING,
            {},
            "Q: {prompt}",
            [USER],
            "prompt_template: expected '{prompt}' for prompts tha",
        ),
        (
            STRICT,
            {},
            "{prompt}",
            [SYSTEM, USER],
            "takes, got system, user in 'You are terse.': Sys",
        ),
        (STRICT, {"system_prompt": "x"}, "{prompt}", "1", "takes, got system, user in 'x': System"),
        (
            "{% bad %}",
            {},
            "{prompt}",
            [USER],
            "expected messages that the model's chat template tak",
        ),
    ],
)
def test_what_the_model_has_no_place_for_is_refused(
    chat_template: str | None, options: dict[str, Any], template: str, row: Any, message: str
) -> None:
    tokenizer = llama3_tokenizer()
    tokenizer.chat_template = chat_template
    with pytest.raises(Refusal, match=message):
        render({"prompt": row}, tokenizer, template, ChatOptions(**options))


def test_lone_question_among_messages_suits_a_base_model() -> None:
    asked = render(
        {"prompt": [{"role": "user", "content": "1+2"}]}, tiny.build_tokenizer(), "{prompt}="
    )
    assert asked == replace(
        render({"prompt": "1+2"}, tiny.build_tokenizer(), "{prompt}="), columns=asked.columns
    )


def test_a_turns_end_is_the_chat_templates() -> None:
    assert turn_end(TOKENIZER) == TOKENIZER.convert_tokens_to_ids(TURN_END)
    base = llama3_tokenizer()
    base.chat_template = None
    assert turn_end(base) == base.convert_tokens_to_ids(END)
    assert turn_end(tiny.build_tokenizer()) == 1


def test_template_from_a_file_is_the_models_and_its_turns_end_ends_completions(
    tmp_path: Path,
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    tokenizer = load_tokenizer("tiny", str(path))
    assert tokenizer.chat_template == path.read_text()
    model = tiny.build_model(len(tokenizer), seed=0)
    tokenizer = llama3_tokenizer()
    assert end_tokens(model, tokenizer) == {
        1,
        tokenizer.convert_tokens_to_ids(END),
        tokenizer.convert_tokens_to_ids(TURN_END),
    }


def test_worked_answer_ends_as_a_turn_does() -> None:
    asked = render({"prompt": [USER], "solution": "42"}, TOKENIZER, "{prompt}")
    (found,) = load_demonstrations([asked], "solution", TOKENIZER, None).values()
    assert found.completion_ids[-1] == turn_end(TOKENIZER)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("chat_template_kwargs={enable_thinking: false}", {"enable_thinking": False}),
        ('chat_template_kwargs={"enable_thinking": false}', {"enable_thinking": False}),
        ("chat_template_kwargs.enable_thinking=false", {"enable_thinking": False}),
        ("chat_template_kwargs={}", {}),
    ],
)
def test_variables_are_set_as_yaml_or_json(setting: str, expected: dict[str, Any]) -> None:
    config = load_config(None, [setting])
    assert config.chat_template_kwargs == expected


@pytest.mark.parametrize("value", ["", "[1]", "fast"])
def test_variables_that_are_none_are_refused(value: str) -> None:
    with pytest.raises(
        Refusal, match="chat_template_kwargs: expected names and values, {name: val"
    ):
        load_config(None, [f"chat_template_kwargs={value}"])


def test_dataset_and_recorded_data_are_rendered_alike(tmp_path: Path) -> None:
    """Training, `agro rollout` and `agro eval` take their prompts from load_questions."""
    tokenizer = llama3_tokenizer()
    tokenizer.chat_template = THINKING
    rows = [{"prompt": prompt, "answer": 42} for prompt in (USER["content"], [SYSTEM, USER])]
    data, recorded = tmp_path / "d.jsonl", tmp_path / "r.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        model="chat",
        data=str(data),
        eval_data=str(data),
        system_prompt="Be kind.",
        chat_template_kwargs={"enable_thinking": False},
    )
    questions = load_questions(config, tokenizer, None, gold_needed=True)
    assert "Be kind." in questions.prompts[0].text and "Be kind." not in questions.prompts[1].text
    assert {p.ids for p in questions.held_out} == {p.ids for p in questions.prompts}
    completions = [{**row, "completion": c, "reward": 1} for row in rows for c in ("42", "43")]
    recorded.write_text("".join(json.dumps(row) + "\n" for row in completions))
    groups = load_recorded(
        [str(recorded)],
        tokenizer,
        config.prompt_template,
        vocab_size=len(tokenizer),
        context=None,
        options=chat_options(config),
    ).groups
    assert [group[0].prompt_ids for group in groups] == [p.ids for p in questions.prompts]


def test_run_trains_on_a_dataset_of_messages(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{a}+1="}],
            "reward_model": {"style": "rule", "ground_truth": a + 1},
            "extra_info": {"index": a},
        }
        for a in range(8)
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    small = ["steps=1", "prompts_per_step=2", "num_generations=2", "max_completion_length=4"]
    settings = [f"data={tmp_path / 'd.json'}", "warm_start_steps=2", "eval_prompts=2", *small]
    assert main(["train", *settings, f"output_dir={tmp_path / 'run'}"]) == 0


def test_run_that_began_with_a_setting_without_effect_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": ASKED.replace("6", str(a)), "answer": 7 * a} for a in range(8)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    data = [f"data={tmp_path / 'd.json'}", "eval_every=0", "save_every=1", "steps=1"]
    settings = small_run(save_llama3_miniature(tmp_path), tmp_path / "run", *data)
    assert main(settings) == 0
    config = tmp_path / "run" / "config.yaml"  # as it was written when nobody refused it
    without = config.read_text()
    config.write_text(without.replace("system_prompt: ''", "system_prompt: You are terse."))
    assert config.read_text() != without
    assert main(["train", "--resume", str(tmp_path / "run"), "steps=2"]) == 0
    before, after = (
        read_jsonl(tmp_path / "run" / "rollouts" / f"step-{step:06d}.jsonl") for step in (1, 2)
    )
    asked = {row["prompt"] for row in rows}
    assert {row["prompt"] for row in before} | {row["prompt"] for row in after} <= asked
    capsys.readouterr()
    begins = [*settings, f"output_dir={tmp_path / 'new'}", "system_prompt=You are terse."]
    assert main(begins) == 2
    assert "system_prompt: expected none for a prompt that holds" in capsys.readouterr().err
