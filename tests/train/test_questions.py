"""Prompts are checked for the model that reads them and the rewards that mark them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from agro_train.config import TrainConfig
from agro_train.policy.load import load_tokenizer
from agro_train.questions import check_context, load_questions, readable
from agro_train.ranks import Ranks
from agro_train.types import Prompt

PROMPTS = [Prompt("a", "1+2=", (3, 4, 5), {"answer": "3"}), Prompt("b", "1", (3,), {"answer": "1"})]


def test_completions_must_fit_the_context() -> None:
    config = TrainConfig(max_completion_length=20)
    check_context(config, PROMPTS, 23)
    check_context(config, PROMPTS, None)
    with pytest.raises(ValueError, match="max_completion_length: expected at most 19, .* got 20"):
        check_context(config, PROMPTS, 22)


def test_gold_answers_of_which_none_can_be_read_are_refused() -> None:
    hopeless = [Prompt("a", "why?", (3,), {"answer": "no answer here"})]
    config = TrainConfig(reward=["math"])
    assert readable(PROMPTS, config, Ranks(), needed=True) == PROMPTS
    with pytest.raises(ValueError, match="data: expected gold answers .* got none in 1 prompts"):
        readable(hopeless, config, Ranks(), needed=True)
    assert readable(hopeless, config, Ranks(), needed=False) == []


def test_prompts_left_out_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [("1+2=", "3"), ("1+3=", "no answer here"), ("1+2+3+4=", "10"), ("2+2=", "4")]
    data, eval_data = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    for path, part in ((data, rows), (eval_data, rows[1:])):
        path.write_text(
            "".join(json.dumps({"prompt": p, "answer": answer}) + "\n" for p, answer in part)
        )
    config = TrainConfig(
        data=str(data), eval_data=str(eval_data), reward=["math"], max_prompt_length=5
    )
    found = load_questions(config, load_tokenizer("tiny"), None, gold_needed=True)
    assert [prompt.text for prompt in found.prompts] == ["1+2=", "2+2="]
    assert [prompt.text for prompt in found.held_out] == ["2+2="]
    assert found.left_out == found.left_out_held == {"too_long": 1, "unreadable_gold": 1}
    assert found.longest == 4


def test_recorded_groups_alone_need_no_prompts(tmp_path: Path) -> None:
    """Without data there is nothing to be evaluated on, unless eval_data says what."""
    tokenizer = load_tokenizer("tiny")
    config = TrainConfig(data="", recorded=["a.jsonl"])
    nothing = {"too_long": 0, "unreadable_gold": 0}
    found = load_questions(config, tokenizer, None, gold_needed=True)
    assert (found.prompts, found.held_out, found.longest) == ([], [], 0)
    assert found.left_out == found.left_out_held == nothing
    (tmp_path / "e.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n')
    config = replace(config, eval_data=str(tmp_path / "e.jsonl"))
    found = load_questions(config, tokenizer, None, gold_needed=True)
    assert found.prompts == [] and [prompt.text for prompt in found.held_out] == ["1+2="]
    assert found.left_out == found.left_out_held == nothing
