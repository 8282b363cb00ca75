"""The console, the trackers and the memory column: they say what metrics.jsonl says."""

import io
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import accelerate.tracking
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from rich.cells import cell_len
from rich.console import Console

from agro_train import config as configuration
from agro_train.cli import main
from agro_train.data.rows import read_jsonl
from agro_train.metrics import peak_memory_gb
from agro_train.run import Run
from agro_train.types import Rollout
from agro_train.watch import trackers
from agro_train.watch.display import Display, best_and_worst
from agro_train.watch.environment import read_starts, record_start
from agro_train.watch.run_folder import RunFolder
from tests.train.models import rollout
from tests.train.test_train import train

METRICS = {
    "reward": 0.5314,
    "kl": 0.0121,
    "entropy": 1.203,
    "completions/mean_length": 12.34,
    "completions/clipped_ratio": 0.25,
    "tokens_per_s": 1234.0,
    "memory_gb": 1.5,
    "time_s": 2.5,
    "skipped": 0.0,
}
NASTY = (
    "[/asy] [red]x\x1b[2J\r\ud800 \N{CJK UNIFIED IDEOGRAPH-6F22}"
    + "\N{CJK UNIFIED IDEOGRAPH-5B57}" * 300
)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what rich itself writes to a terminal


def scored(*rewards: float | None, text: str = "") -> list[Rollout]:
    return [
        replace(rollout(f"g{number}", [1], [2], reward), completion=f"{number}{text}")
        for number, reward in enumerate(rewards)
    ]


def shown(
    width: int, terminal: bool, action: Callable[[Display], None], encoding: str = "utf-8"
) -> str:
    """What a display writes to a console of `width` columns."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    with Display(0, 20, samples_every=2, console=console) as display:
        action(display)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_line_a_step_where_output_is_no_terminal() -> None:
    def steps(display: Display) -> None:
        display.evaluation(1, {"eval_accuracy": 0.75})
        for step in (1, 2):
            display.step(step, METRICS, scored(0.0, 1.0))

    lines = shown(60, False, steps).splitlines()  # a log file's width is nobody's
    assert lines[0] == "held-out after 1 steps: accuracy 0.750"
    assert lines[1:] == [
        f"step {step}/20  reward 0.531  kl 0.012  entropy 1.203  length 12.3  cut off 25%  "
        "1234 tokens/s  1.50 GB  held-out 0.750  2.5 s"
        for step in (1, 2)
    ]


def test_terminal_shows_progress_numbers_and_completions() -> None:
    def steps(display: Display) -> None:
        display.evaluation(0, {"eval_accuracy": 0.75})
        for step in (1, 2):
            text = f" of {step}" + " and so on" * 50
            display.step(step, METRICS, scored(0.0, 1.0, 0.25, text=text))

    printed = CONTROL.sub("", shown(100, True, steps))
    for number in ("2/20", "left", "reward 0.531", "kl 0.012", "cut off 25%", "held-out 0.750"):
        assert number in printed
    assert "Completions of step 2" in printed and "Completions of step 1" not in printed
    rows = re.findall(r"(best|worst)\s*\S\s*(\S+)\s*\S+\s*\S\s*(\d) of 2", printed)
    assert rows == [("best", "1", "1"), ("best", "0.25", "2"), ("worst", "0", "0")]
    table = [
        line for line in printed.splitlines() if line.startswith("\N{BOX DRAWINGS LIGHT VERTICAL}")
    ]
    assert len(table) == len(rows)  # one line each, however long the text


def test_time_left_is_known_where_a_step_takes_minutes() -> None:
    now = [0.0]
    display = Display(0, 10)
    display.progress.get_time = lambda: now[0]
    for step in (1, 2, 3):
        now[0] += 120.0
        display.progress.update(display.task, completed=step)
    assert display.progress.tasks[0].time_remaining == pytest.approx(7 * 120.0)


@pytest.mark.parametrize("width", [20, 60, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_completion_breaks_the_console(width: int, encoding: str) -> None:
    """Markup is text, nothing moves the cursor or clears the screen, nothing is wider than the
    terminal, and what it has no letter for is replaced.
    """
    nasty = scored(0.0, 1.0, text=NASTY)
    old = {"group": "g0", "temperature": 0.0, "completion": NASTY, "reward": None}

    def everything(display: Display) -> None:
        display.say(f"summary {NASTY[:30]}")
        display.step(2, {**METRICS, "reward": math.nan, "skipped": 1.0}, nasty)
        display.before_and_after([old], nasty)

    terminal = shown(width, True, everything, encoding)
    assert "\x1b[2J" not in terminal
    plain = CONTROL.sub("", terminal)
    assert all(cell_len(line) <= width for part in plain.split("\n") for line in part.split("\r"))
    if width == 200:
        assert "[/asy] [red]x" in plain and "reward nan" in plain


@pytest.mark.parametrize("text", ["", '[{"run_id": "a', "{}", "[1]", "\udcff"])
def test_environment_that_cannot_be_read_is_written_anew(text: str, tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    path.write_text(text, errors="surrogateescape")
    assert read_starts(tmp_path) == []
    run_id = record_start(tmp_path, 3, Accelerator(cpu=True), resumed=True)
    (start,) = read_starts(tmp_path)
    assert start["run_id"] == run_id and start["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


def test_best_and_worst_are_different_and_have_rewards() -> None:
    best, worst = best_and_worst(scored(0.5, None, 1.0, math.nan, 0.0), 2)
    assert ([r.reward for r in best], [r.reward for r in worst]) == ([1.0, 0.5], [0.0])
    assert best_and_worst(scored(None), 2) == ([], [])
    same = [rollout(group, [1], [2], 1.0) for group in "aab"]
    best, worst = best_and_worst(same, 2)
    assert [r.group for r in best] == ["a", "b"] and [r.group for r in worst] == ["a"]


def test_peak_memory_is_what_the_kernel_says() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    high_water = int(status["VmHWM"].split()[0]) * 1024 / 1e9
    assert 0.99 * high_water <= peak_memory_gb(torch.device("cpu")) <= 1.5 * high_water


def test_trackers_get_finite_numbers_only(tmp_path: Path) -> None:
    folder, told = RunFolder(tmp_path), []
    accelerator = SimpleNamespace(log=lambda values, step: told.append((step, values)))
    run = SimpleNamespace(main=True, folder=folder, accelerator=accelerator)
    Run.log(cast(Run, run), 3, {"reward": math.nan, "kl": 0.5, "loss": math.inf})
    assert told == [(3, {"kl": 0.5})]
    assert read_jsonl(folder.metrics) == [{"step": 3, "reward": None, "kl": 0.5, "loss": None}]


def test_unknown_trackers_and_projects_are_refused() -> None:
    for setting, message in (
        ("report_to=[tensorbord]", "report_to: expected tensorboard, wandb, trackio"),
        ("report_to=[wandb,wandb]", "each at most once"),
        ("project=a/b", "project: expected a name without slashes"),
    ):
        with pytest.raises(ValueError, match=message):
            configuration.load(None, [setting])
    assert configuration.load(None, ["report_to=wandb"]).report_to == ["wandb"]


def test_missing_tracker_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    assert train(tmp_path / "run", "report_to=[tensorboard,trackio]") == 2
    assert "got trackio, whose package is not there; pip install trackio" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's own reading of the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


class FakeTracker(GeneralTracker):
    """Keeps what accelerate hands to W&B or trackio."""

    requires_logging_directory = False
    name = "wandb"
    made: ClassVar[list["FakeTracker"]] = []

    def __init__(self, run_name: str, **settings: Any) -> None:
        super().__init__()
        self.project, self.settings = run_name, settings
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.finished = False
        self.made.append(self)

    def start(self) -> None: ...

    @property
    def tracker(self) -> "FakeTracker":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        if "config" not in values:  # TensorBoard's page of text
            self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


Row = tuple[int, dict[str, float]]


@dataclass(frozen=True)
class Tracked:
    """A run that died after step 3, was resumed from step 2, and went on to step 4."""

    folder: Path
    before: list[Row]  # the finite numbers of metrics.jsonl when it died
    after: list[Row]  # at its end


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """Reports to the real TensorBoard, and to accelerate's interface of the others, for which W&B
    needs an account."""
    folder = tmp_path_factory.mktemp("runs") / "my-run"

    def rows() -> list[Row]:
        found = [(row.pop("step"), row) for row in read_jsonl(folder / "metrics.jsonl")]
        return [(step, {k: v for k, v in row.items() if v is not None}) for step, row in found]

    FakeTracker.made.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        all_three = [LoggerType.TENSORBOARD, LoggerType.WANDB, LoggerType.TRACKIO]
        patch.setattr(accelerate.tracking, "_available_trackers", all_three)
        for name in ("wandb", "trackio"):
            patch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, FakeTracker)
        patch.setattr("agro_train.train.plot_run", lambda folder: [])  # longer than the steps
        quick = "steps=3 prompts_per_step=2 eval_prompts=2 warm_start_steps=0 save_every=2".split()
        trackers = "report_to=[tensorboard,wandb,trackio] project=mine run_name=first".split()
        assert train(folder, *quick, "max_completion_length=4", *trackers) == 0
        before = rows()
        shutil.rmtree(folder / "checkpoint-3")
        assert main(["train", "--resume", str(folder), "steps=4"]) == 0
    return Tracked(folder, before, rows())


def test_tensorboard_has_the_record_also_of_a_resumed_run(tracked: Tracked) -> None:
    """In the float32 that it keeps."""
    expected: dict[str, list[tuple[int, float]]] = {}
    for step, row in tracked.after:
        for name, value in row.items():
            expected.setdefault(name, []).append((step, float(np.float32(value))))
    assert curves(tracked.folder / "tensorboard" / "mine") == expected
    assert [step for step, _ in expected["reward"]] == [1, 2, 3, 4] and "memory_gb" in expected


def test_wandb_and_trackio_get_the_record_and_keep_their_run(tracked: Tracked) -> None:
    wandb, trackio, *again = FakeTracker.made
    assert wandb.rows == trackio.rows == tracked.before
    assert again[0].rows == again[1].rows == [row for row in tracked.after if row[0] > 2]
    assert {tracker.project for tracker in FakeTracker.made} == {"mine"}
    assert {tracker.settings["name"] for tracker in FakeTracker.made} == {"first"}
    assert wandb.settings["config"]["prompts_per_step"] == 2
    assert wandb.settings["id"] == again[0].settings["id"] and len(wandb.settings["id"]) == 32
    # W&B finds its run by the id, trackio by the name, which another folder's run may have, too.
    assert [t.settings["resume"] for t in FakeTracker.made] == ["allow", "never", "allow", "allow"]
    assert all(tracker.finished for tracker in FakeTracker.made)
