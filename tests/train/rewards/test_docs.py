"""The blocks of docs/rewards.md, run as printed: the functions, the commands, the configuration."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.data.rows import read_jsonl
from agro_train.rewards import functions
from agro_train.rewards.functions import check_columns, load_rewards, score, with_readable_gold
from agro_train.types import Prompt, Rollout
from tests.train.models import SHORT

pytestmark = pytest.mark.usefixtures("no_curves")

PAGE = Path(__file__).parents[3] / "docs" / "rewards.md"
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE.read_text(), flags=re.S)


def blocks(language: str) -> list[str]:
    return [block for name, block in BLOCKS if name == language]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a reader who has saved what the page says to save."""
    monkeypatch.chdir(tmp_path)
    for name, (text, *_) in {
        "my_rewards.py": blocks("python"),
        "rollouts.jsonl": blocks("json"),
        "my.yaml": blocks("yaml"),
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_block_of_the_page_is_run_by_a_test() -> None:
    assert [name for name, _ in BLOCKS] == "python sh json sh yaml sh python".split()


def test_own_function_is_found_by_its_name(
    reader: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _, _ = blocks("sh")
    command = shlex.split(first)
    assert command[0] == "agro" and main([*command[1:], "--dry-run"]) == 0
    config = TrainConfig(reward=yaml.safe_load(capsys.readouterr().out)["reward"])
    (part,) = load_rewards(config)
    assert (part.name, part.weight) == ("right", 1.0)


def test_own_function_scores(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, second, _ = blocks("sh")
    command = shlex.split(second)
    assert command[0] == "agro" and main(command[1:]) == 0
    assert "mean reward 0.500" in capsys.readouterr().out
    assert [row["reward"] for row in read_jsonl(reader / "rollouts.scored.jsonl")] == [1.0, 0.0]


def test_several_functions_train_on_their_weighted_sum(reader: Path) -> None:
    _, _, third = blocks("sh")
    command = shlex.split(third)
    assert command[0] == "agro"
    assert main([*command[1:], *SHORT, "output_dir=run"]) == 0
    (row,) = [row for row in read_jsonl(reader / "run" / "metrics.jsonl") if "reward" in row]
    assert 0.0 < row["rewards/brief/mean"] < 1.0
    total = row["rewards/number/mean"] + 0.1 * row["rewards/brief/mean"]
    assert row["reward"] == pytest.approx(total)


def test_new_built_in_reward_is_a_class_and_a_word_in_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, source = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(source, str(PAGE), "exec"), names)
    monkeypatch.setitem(functions.BUILT_IN, "contains", names["ContainsReward"])
    config = TrainConfig(reward=["contains"])
    (part,) = rewards = load_rewards(config)
    rollouts = [
        Rollout("g", "", (1,), text, (1,), "stop", None, columns={"answer": "95"})
        for text in ("It is 95.", " It is 85.\n")
    ]
    scored = score(rollouts, rewards)
    assert [(r.reward, r.rewards) for r in scored] == [
        (1.0, {"contains": 1.0}),
        (0.0, {"contains": 0.0}),
    ]
    assert part.reward.answers(rollouts) == ["It is 95.", "It is 85."]
    good, bad = (Prompt("p", "1+2", (1,), {"answer": answer}) for answer in ("3", None))
    assert with_readable_gold([good], config) == [good]
    check_columns("contains", [good])
    with pytest.raises(ValueError, match="expected text in column answer for reward=contains, got"):
        check_columns("contains", [good, bad])
    with pytest.raises(
        ValueError, match="expected number, math, environment, contains or module:function"
    ):
        load_rewards(TrainConfig(reward=["best"]))
