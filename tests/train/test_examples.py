"""The scripts of examples/, run as a user runs them, with few steps: each does what it says."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from agro_train.policy import tiny
from tests.train.integrations import OLD_NAMES
from tests.train.models import SHORT

pytestmark = pytest.mark.usefixtures("no_curves")

EXAMPLES = Path(__file__).parents[2] / "examples"
HERE = [*SHORT, "output_dir=run"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of examples/, the current folder."""
    copy = tmp_path / "examples"
    shutil.copytree(EXAMPLES, copy, ignore=shutil.ignore_patterns("runs", "__pycache__", "*.jsonl"))
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(copy)  # what `python SCRIPT` does
    return copy


def run(script: Path, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")


def trained(script: Path, *settings: str) -> dict[str, Any]:
    """The row of metrics of one step."""
    with pytest.raises(SystemExit) as ended:
        run(script, *HERE, *settings)
    assert not ended.value.code
    lines = (script.parent / "run" / "metrics.jsonl").read_text().splitlines()
    (row,) = [row for row in map(json.loads, lines) if "reward" in row]
    return dict(row)


def test_readme_names_every_script() -> None:
    named = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \|", (EXAMPLES / "README.md").read_text(), re.M)
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"small_model.py"}
    assert sorted(named) == sorted(scripts)


@pytest.mark.parametrize(
    ("name", "steps", "first", "change"),
    [
        ("plain_loop", 8, 6.24, -1.0),  # ln 512
        ("topk_distillation", 8, 4.55, -1.0),
        ("dpo", 8, 0.693, -0.005),  # ln 2
        ("agro_loop", 12, 0.5, 0.08),
    ],
)
def test_number_that_is_printed_moves_as_it_should(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    steps: int,
    first: float,
    change: float,
) -> None:
    """The last number of each line, from its first value on, by more than `change`."""
    run(folder / f"{name}.py", "--steps", str(steps))
    lines = capsys.readouterr().out.splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("step ")]
    assert len(values) == steps
    assert values[0] == pytest.approx(first, abs=0.05)
    moved = values[-1] - values[0]
    assert moved / change > 1.0, values


def test_offline_trains_on_the_file_that_it_writes(folder: Path) -> None:
    row = trained(folder / "offline.py")
    assert row["reward"] == 0.5  # of each prompt's two completions one is right
    rows = [json.loads(line) for line in (folder / "sums.jsonl").read_text().splitlines()]
    assert {"prompt": "37+58=", "completion": "7+8=15,3+5+0=8,85", "reward": 0.0} in rows
    assert sum(row["reward"] for row in rows) == len(rows) / 2


def test_own_reward_is_added_with_its_weight(folder: Path) -> None:
    row = trained(folder / "own_reward.py")
    total = row["rewards/number/mean"] + 0.1 * row["rewards/brief/mean"]
    assert row["reward"] == pytest.approx(total)
    assert row["rewards/brief/mean"] > 0.0


def test_environment_answers(folder: Path) -> None:
    names = runpy.run_path(str(folder / "environment_with_a_tool.py"))
    calculator = names["Calculator"]()
    assert calculator.reset(answer="95") is None
    assert calculator.step("7+8=") == ("15", None)
    assert calculator.step(",95") == (None, 1.0)
    row = trained(folder / "environment_with_a_tool.py")
    assert row["environment/turns"] >= 1.0


@pytest.mark.trl
@pytest.mark.filterwarnings(*[mark.args[0] for mark in OLD_NAMES])
def test_trl_script_trains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    tokenizer = tiny.build_tokenizer()
    tiny.build_model(len(tokenizer), seed=0).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    run(folder / "trl_agro.py", "--model", "tiny", "--learning-rate", "3e-3")
    said = re.search(r"^reward ([\d.]+) at first, ([\d.]+) at last$", capsys.readouterr().out, re.M)
    assert said is not None
    assert float(said[2]) > float(said[1]) + 0.2
