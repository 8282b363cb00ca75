"""Prompts and recorded rollouts: read right, or refused with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from agro_train import tiny
from agro_train.data import (
    load_prompts,
    load_recorded,
    load_rows,
    prompts_for_step,
    read_jsonl,
    render,
    rollout_to_json,
)
from tests.train.models import SPECIAL, ragged_rollouts, save_llama3_miniature

TOKENIZER = tiny.build_tokenizer()


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_columns_of_math_and_gsm8k_are_understood(tmp_path: Path) -> None:
    math = load_rows(write(tmp_path / "m.jsonl", {"problem": "1+1", "solution": "2"}), "train")
    gsm8k = load_rows(write(tmp_path / "g.jsonl", {"question": "1+1", "answer": "#### 2"}), "train")
    assert math[0]["prompt"] == gsm8k[0]["prompt"] == "1+1"
    assert math[0]["solution"] == "2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data: expected at least one row"),
        ('{"prompt": "1"}\n{"prompt": \n', "line 2"),
        ('{"prompt": "1"}\n[1, 2]\n', "line 2"),
        ('{"prompt": "1", "completions": 2}\n', "expected no column completions in .*, got one"),
        ('{"text": "1"}\n', "expected a column prompt, problem, question .* got text"),
        ('{"prompt": "1"}\n{"prompt": 2}\n', "expected text in column prompt, got 2 in row 2"),
    ],
)
def test_bad_rows_are_refused_with_their_place(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / "d.jsonl", content), "train")


def test_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "1"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="d.jsonl, line 2"):
        read_jsonl(tmp_path / "d.jsonl")


def test_unreachable_hub_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="data: expected .* a hub dataset, got 'no/such-dataset'"):
        load_rows("no/such-dataset", "train")


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.jsonl"):
        read_jsonl(tmp_path / "nowhere.jsonl")


def test_rows_are_held_out_of_a_file_and_long_prompts_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+{i}="} for i in range(20)] + [{"prompt": "1+" * 30}]
    path = write(tmp_path / "d.jsonl", *rows)
    train, held_out, too_long = load_prompts(path, "", 5, TOKENIZER, "{prompt}", 12)
    assert too_long == 1
    assert len(held_out) in (4, 5) and len(train) + len(held_out) == 20
    assert not {p.text for p in train} & {p.text for p in held_out}
    again, _, _ = load_prompts(path, "", 5, TOKENIZER, "{prompt}", 12)
    assert [p.text for p in again] == [p.text for p in train]


def test_limit_that_leaves_no_prompt_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "12+34="}, {"prompt": "11+34="})
    with pytest.raises(ValueError, match="max_prompt_length: .* got 2"):
        load_prompts(path, "", 0, TOKENIZER, "{prompt}", 2)


def test_chat_template_writes_the_only_begin_token(tmp_path: Path) -> None:
    from agro_train.model import load_tokenizer

    tokenizer = load_tokenizer(str(save_llama3_miniature(tmp_path)))
    prompt = render({"prompt": "Hi"}, tokenizer, "Q: {prompt} {x}")
    assert prompt.ids.count(tokenizer.convert_tokens_to_ids(SPECIAL[0])) == 1
    assert "Q: Hi {x}" in prompt.text


def test_every_epoch_visits_every_prompt_once_and_is_a_function_of_the_step() -> None:
    prompts = list(range(10))
    steps = [prompts_for_step(prompts, 4, step, seed=3) for step in range(5)]
    visited = [p for step in steps for p in step]
    assert sorted(visited[:10]) == sorted(visited[10:]) == prompts
    assert visited[:10] != visited[10:] and visited[:10] != prompts
    assert steps[3] == prompts_for_step(prompts, 4, 3, seed=3)
    assert steps[3] != prompts_for_step(prompts, 4, 3, seed=4)


def test_rollout_log_is_a_dataset(tmp_path: Path) -> None:
    rollouts = ragged_rollouts()
    path = write(tmp_path / "r.jsonl", *(rollout_to_json(r) + "\n" for r in rollouts))
    groups = load_recorded([path], TOKENIZER, "{prompt}", 15)
    assert [len(group) for group in groups] == [3, 2, 4]
    flat = [r for group in groups for r in group]
    assert [(r.prompt_ids, r.completion_ids, r.reward, r.group) for r in flat] == [
        (r.prompt_ids, r.completion_ids, r.reward, r.group) for r in rollouts
    ]


def test_recorded_text_is_tokenised_apart_and_ended_only_where_it_stopped(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+2=", "completion": "3", "reward": 1},
        {"prompt": "1+2=", "completion": "44", "reward": None, "finish": "length"},
    ]
    ((stopped, cut),) = load_recorded(
        [write(tmp_path / "r.jsonl", *rows)], TOKENIZER, "{prompt}", 15
    )
    assert stopped.prompt_ids == tuple(TOKENIZER("1+2=")["input_ids"])
    assert stopped.completion_ids == (*TOKENIZER("3")["input_ids"], TOKENIZER.eos_token_id)
    assert cut.completion_ids == tuple(TOKENIZER("44")["input_ids"])
    assert stopped.reward == 1.0 and cut.reward is None


def test_recorded_reward_that_is_not_finite_counts_as_none(tmp_path: Path) -> None:
    lines = ['{"prompt": "1", "completion": "2", "reward": NaN}\n', json.dumps(GOOD1) + "\n"]
    ((nan, good),) = load_recorded([write(tmp_path / "r.jsonl", *lines)], TOKENIZER, "{prompt}", 15)
    assert nan.reward is None and good.reward == 1.0


def test_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="data: expected a prompt of one or more tokens, got ''"):
        render({"prompt": ""}, TOKENIZER, "{prompt}")


def test_tiny_model_refuses_characters_it_cannot_read() -> None:
    tiny.check_prompts([render({"prompt": "1+2="}, TOKENIZER, "{prompt}")])
    with pytest.raises(
        ValueError, match="data: expected prompts of the characters .* got '1 \\+ 2'"
    ):
        tiny.check_prompts([render({"prompt": "1 + 2"}, TOKENIZER, "{prompt}")])


GOOD1 = {"prompt": "1", "completion": "2", "reward": 1.0}
GOOD = {"prompt": "1+2=", "completion": "3", "reward": 1.0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one rollout"),
        ([GOOD], "at least 2 completions a prompt, got 1 for group"),
        ([GOOD, {"prompt": "1+2=", "completion": "3"}], "a column reward in .*line 2"),
        ([GOOD, {"completion": "3", "reward": 1}], "a column prompt_ids or prompt"),
        ([GOOD, {"prompt": "1+2=", "reward": 1}], "a column completion_ids or completion"),
        (
            [GOOD, {**GOOD, "reward": "high"}],
            "or null as reward in .*line 2, got 'high'",
        ),
        ([GOOD, {**GOOD, "completion_ids": [4, 99]}], "ids in \\[0, 15\\).*another tokenizer"),
        ([GOOD, {**GOOD, "finish": "eos"}], "stop or length as finish in .*line 2, got 'eos'"),
        ([GOOD, {**GOOD, "completion": 5}], "str as completion in .*line 2, got 5"),
        ([GOOD, {**GOOD, "group": "1+2=", "prompt": "3"}], "one prompt in group '1\\+2='.*line 2"),
        ([GOOD, {**GOOD, "completion_ids": []}], "one or more ids in"),
    ],
)
def test_bad_recorded_rollout_is_refused_with_its_place(
    rows: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"recorded: expected .*{message}"):
        load_recorded([write(tmp_path / "r.jsonl", *rows)], TOKENIZER, "{prompt}", 15)
