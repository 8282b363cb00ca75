"""Worked answers as members of fresh groups: which, how they are ended, and what is refused."""

from pathlib import Path

import pytest

from agro_train.cli import main
from agro_train.data.demonstrations import load_demonstrations
from agro_train.data.prompts import render
from agro_train.data.recorded import load_recorded
from agro_train.data.rows import read_jsonl
from agro_train.policy import tiny
from agro_train.refusal import Refusal
from agro_train.types import Prompt

pytestmark = pytest.mark.usefixtures("no_curves")

TOKENIZER = tiny.build_tokenizer()


def prompt(question: str, **columns: object) -> Prompt:
    return render({"prompt": question, **columns}, TOKENIZER, "{prompt}")


def test_worked_answer_is_ended_like_a_completion() -> None:
    asked = prompt("1+2=", solution="1+2=3,3", answer="3")
    (found,) = load_demonstrations([asked], "solution", TOKENIZER, 128).values()
    ended = (*TOKENIZER("1+2=3,3")["input_ids"], TOKENIZER.eos_token_id)
    assert (found.group, found.prompt_ids, found.completion_ids) == (asked.group, asked.ids, ended)
    assert (found.source, found.finish, found.reward) == ("demonstration", "stop", None)
    assert found.sampling_logprob is None and found.columns["answer"] == "3"


def test_rows_that_ask_the_same_keep_answers_of_their_own() -> None:
    asked = [prompt("1+2=", solution=text, answer="3") for text in ("1+2=3", "2+1=3")]
    found = load_demonstrations(asked, "solution", TOKENIZER, 128)
    assert [found[one.group, one.columns["solution"]].completion for one in asked] == [
        "1+2=3",
        "2+1=3",
    ]


def test_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = tiny.build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(Refusal, match="demonstrations: expected a tokenizer with an end token"):
        load_demonstrations([prompt("1+2=", solution="3")], "solution", tokenizer, 128)


@pytest.mark.parametrize("row", [{}, {"solution": None}, {"solution": 3}, {"solution": " "}])
def test_row_without_a_worked_answer_is_refused(row: dict[str, object]) -> None:
    good = prompt("1+2=", solution="3")
    message = "demonstrations: expected text in column 'solution' of every training row, .*'3\\+4='"
    with pytest.raises(Refusal, match=message):
        load_demonstrations([good, prompt("3+4=", **row)], "solution", TOKENIZER, 128)


def test_worked_answer_beyond_the_context_is_refused() -> None:
    asked = [prompt("1+2=", solution="3" * 7)]
    assert load_demonstrations(asked, "solution", TOKENIZER, 12)
    assert load_demonstrations(asked, "solution", TOKENIZER, None)
    with pytest.raises(Refusal, match="at most 11 tokens, the model's context, got 12 in the row"):
        load_demonstrations(asked, "solution", TOKENIZER, 11)


QUICK = """
    data=tiny-arithmetic warm_start_steps=20 max_completion_length=8 steps=2 prompts_per_step=3
    num_generations=2 eval_every=0
""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["train", *QUICK, "reward=number", "demonstrations=solution", f"output_dir={run}"]
    assert main(arguments) == 0
    return run


def test_each_fresh_group_has_its_worked_answer(folder: Path) -> None:
    rows = read_jsonl(folder / "rollouts" / "step-000002.jsonl")
    assert [row["source"] for row in rows] == ["fresh", "fresh", "demonstration"] * 3
    for group in (rows[:3], rows[3:6], rows[6:]):
        assert len({row["group"] for row in group}) == 1
        demonstration = group[-1]
        assert demonstration["completion"] == demonstration["columns"]["solution"]
        assert demonstration["reward"] == 1.0 and demonstration["step"] is None
        assert demonstration["sampling_logprob"] is None
        assert all(row["sampling_logprob"] < 0 for row in group[:2])
    (*_, last) = read_jsonl(folder / "metrics.jsonl")
    assert last["sample/demonstrations"] == pytest.approx(1 / 3)
    assert last["sample/demonstrations_left_out"] == 0.0
    # What the policy made is measured by itself.
    fresh = [row["reward"] for row in rows if row["source"] == "fresh"]
    assert last["reward"] == sum(fresh) / len(fresh)
    assert last["completions/max_length"] <= 8


def test_log_with_worked_answers_is_a_dataset(folder: Path) -> None:
    path = str(folder / "rollouts" / "step-000001.jsonl")
    recorded = load_recorded([path], TOKENIZER, "{prompt}", vocab_size=15, context=128)
    assert recorded.num_without_sampler == 3
    assert sorted(len(group) for group in recorded.groups) == [3, 3, 3]


def test_worked_answer_that_the_reward_calls_wrong_is_left_out(tmp_path: Path) -> None:
    arguments = ["train", *QUICK, "steps=1", "reward=number", "demonstrations=slip"]
    assert main([*arguments, f"output_dir={tmp_path / 'run'}"]) == 0
    rows = read_jsonl(tmp_path / "run" / "rollouts" / "step-000001.jsonl")
    assert [row["source"] for row in rows] == ["fresh"] * 6
    row = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert (row["sample/demonstrations"], row["sample/demonstrations_left_out"]) == (0.0, 3.0)


def test_column_that_is_not_there_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *QUICK, "demonstrations=proof", f"output_dir={tmp_path / 'run'}"]
    assert main(arguments) == 2
    assert "demonstrations: expected text in column 'proof'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
