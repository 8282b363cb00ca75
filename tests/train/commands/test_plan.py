"""agro plan: a table, JSON, and one sentence for what is wrong."""

import json

import pytest

from agro_train.cli import main

TINY = ["plan", "model=tiny", "max_prompt_length=8", "max_completion_length=9", "gpus=1"]


def test_plan_prints_a_table_that_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TINY) == 0
    shown = capsys.readouterr().out
    for words in ("predicted GB", "moments", "sampling", "it fits 80.0 GB", "not measurements"):
        assert words in shown


def test_plan_as_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["change"] is None
    sums = {name: sum(parts.values()) for name, parts in found["stages"].items()}
    assert found["peak"] == pytest.approx(max(sums.values()))
    assert sums[found["worst_stage"]] == pytest.approx(found["peak"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("gpus=0", "gpus: expected at least 1, got 0"),
        ("memory=-1", "memory: expected at least 0, got -1.0"),
        ("gpu=h500", "gpu: expected"),
        ("gpus=half", "gpus: expected"),
        ("gpuz=2", "gpuz: expected one of the known keys"),
        ("model=nobody/nothing", "model: expected one whose config.json is on this machine"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    setting: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, setting]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"agro: {words}") and said.count("\n") == 1
