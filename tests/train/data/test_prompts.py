"""Prompts: read right, or refused with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet

from agro_train.data.prompts import load_prompts, load_rows, render
from agro_train.policy import tiny
from agro_train.seeds import shuffled
from tests.train.models import SPECIAL, save_llama3_miniature

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
        ('{"text": "1"}\n', "expected a column prompt, problem, question, messages .* got text"),
        (
            '{"prompt": "1"}\n{"prompt": 2}\n',
            "expected text or messages in column prompt, got 2 in row 2 of .*d.jsonl",
        ),
    ],
)
def test_bad_rows_are_refused_with_their_place(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / "d.jsonl", content), "train")


def test_parquet_is_read_like_jsonl(tmp_path: Path) -> None:
    rows = [{"problem": "1+1", "solution": "2"}, {"problem": "2+2", "solution": None}]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "d.parquet")
    assert load_rows(str(tmp_path / "d.parquet"), "train") == load_rows(
        write(tmp_path / "d.jsonl", *rows), "train"
    )
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="data: expected a parquet file, got .*broken.parquet"):
        load_rows(str(tmp_path / "broken.parquet"), "train")


def test_rows_are_held_out_of_a_file_and_long_prompts_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+{i}="} for i in range(20)] + [{"prompt": "1+" * 30}]
    path = write(tmp_path / "d.jsonl", *rows)
    train, held_out, too_long = load_prompts(path, "", 5, TOKENIZER, "{prompt}", 12)
    assert sum(too_long) == 1
    assert len(held_out) in (4, 5) and len(train) + len(held_out) == 20
    assert not {p.text for p in train} & {p.text for p in held_out}
    again, _, _ = load_prompts(path, "", 5, TOKENIZER, "{prompt}", 12)
    assert [p.text for p in again] == [p.text for p in train]


def test_limit_that_leaves_no_prompt_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "12+34="}, {"prompt": "11+34="})
    with pytest.raises(ValueError, match="max_prompt_length: .* got 2"):
        load_prompts(path, "", 0, TOKENIZER, "{prompt}", 2)


def test_chat_template_writes_the_only_begin_token(tmp_path: Path) -> None:
    from agro_train.policy.load import load_tokenizer

    tokenizer = load_tokenizer(str(save_llama3_miniature(tmp_path)))
    prompt = render({"prompt": "Hi"}, tokenizer, "Q: {prompt} {x}")
    assert prompt.ids.count(tokenizer.convert_tokens_to_ids(SPECIAL[0])) == 1
    assert "Q: Hi {x}" in prompt.text


def test_every_epoch_visits_every_prompt_once_and_is_a_function_of_the_step() -> None:
    prompts = list(range(10))
    steps = [shuffled(prompts, 4 * step, 4, seed=3) for step in range(5)]
    visited = [p for step in steps for p in step]
    assert sorted(visited[:10]) == sorted(visited[10:]) == prompts
    assert visited[:10] != visited[10:] and visited[:10] != prompts
    assert steps[3] == shuffled(prompts, 12, 4, seed=3)
    assert steps[3] != shuffled(prompts, 12, 4, seed=4)


def test_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="data: expected a prompt of one or more tokens, got ''"):
        render({"prompt": ""}, TOKENIZER, "{prompt}")


def test_tiny_model_refuses_characters_it_cannot_read() -> None:
    tiny.check_prompts([render({"prompt": "1+2="}, TOKENIZER, "{prompt}")])
    with pytest.raises(
        ValueError, match="data: expected prompts of the characters .* got '1 \\+ 2'"
    ):
        tiny.check_prompts([render({"prompt": "1 + 2"}, TOKENIZER, "{prompt}")])


ASKED = [{"role": "user", "content": "1+2="}]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": ASKED, "answer": "3"}, ASKED, "3"),
        ({"messages": ASKED, "answer": 3}, ASKED, 3),
        # A worked example: the answer is no part of the question, and stays in its column.
        ({"messages": [*ASKED, {"role": "assistant", "content": "3"}], "answer": "3"}, ASKED, "3"),
        # verl's columns.
        ({"prompt": ASKED, "reward_model": {"style": "rule", "ground_truth": "3"}}, ASKED, "3"),
        (
            {"prompt": "1+2=", "reward_model": {"ground_truth": 3}, "answer": "three"},
            "1+2=",
            "three",
        ),
        ({"problem": "1+2=", "answer": 3.5}, "1+2=", 3.5),
    ],
)
def test_question_and_answer_are_found_in_the_forms_people_have(
    row: dict[str, Any], prompt: object, answer: object, tmp_path: Path
) -> None:
    (found,) = load_rows(write(tmp_path / "d.jsonl", row), "train")
    assert (found["prompt"], found["answer"]) == (prompt, answer)
    assert all(found[name] == value for name, value in row.items() if name != "prompt")


def test_verls_parquet_is_read_with_its_extra_info(tmp_path: Path) -> None:
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": question}],
            "ability": "math",
            "reward_model": {"ground_truth": answer, "style": "rule"},
            "extra_info": {"split": "train", "index": i},
        }
        for i, (question, answer) in enumerate([("1+2=", "3"), ("2+2=", "4")])
    ]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "train.parquet")
    train, held_out, _ = load_prompts(
        str(tmp_path / "train.parquet"), "", 1, TOKENIZER, "{prompt}", 12
    )
    (one,), (other,) = train, held_out
    assert {one.text: one.columns["answer"], other.text: other.columns["answer"]} == {
        "1+2=": "3",
        "2+2=": "4",
    }
    assert one.columns["extra_info"]["split"] == "train"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "expected text or messages in column prompt, got \\[\\] in row 2 of .*d.jsonl"),
        ([{"content": "1"}], "expected messages with role and content, both text, .* in row 2"),
        ([{"role": "user", "content": None}], "expected messages with role and content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "expected messages with role and"),
        (["1"], "expected messages with role and content"),
        (None, "expected text or messages in column prompt, got None in row 2"),
    ],
)
def test_messages_that_are_none_are_refused_with_their_row(
    prompt: object, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "1"}, {"prompt": prompt})
    with pytest.raises(ValueError, match=f"^data: {message}"):
        load_rows(path, "train")


def test_rows_with_one_question_and_several_answers_are_groups_of_their_own(tmp_path: Path) -> None:
    rows = [{"prompt": "1+2=", "answer": answer} for answer in ("3", 3, "4")]
    train, _, _ = load_prompts(
        write(tmp_path / "d.jsonl", *rows, {"prompt": "1+1=", "answer": "2"}),
        "",
        0,
        TOKENIZER,
        "{prompt}",
        12,
    )
    three, same, four, _ = (prompt.group for prompt in train)
    assert three == same == render(rows[0], TOKENIZER, "{prompt}").group
    assert four != three


def test_gold_column_alone_tells_one_questions_answers_apart(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+2=", "answer": "see part 1", "info": {"gold": 3}},
        {"prompt": "1+2=", "answer": "see part 2", "info": {"gold": "3"}},
        {"prompt": "1+2=", "answer": "see part 2", "info": {"gold": "4"}},
    ]
    path = write(tmp_path / "d.jsonl", *rows)
    train, _, _ = load_prompts(path, "", 0, TOKENIZER, "{prompt}", 12, gold_column="info.gold")
    first, same, other = (prompt.group for prompt in train)
    assert first == same != other
    by_answer, _, _ = load_prompts(path, "", 0, TOKENIZER, "{prompt}", 12)
    first, other, same = (prompt.group for prompt in by_answer)
    assert first != other == same
