"""TensorBoard, W&B and trackio get what metrics.jsonl says, also of a resumed run."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import accelerate.tracking
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from agro_train import config as configuration
from agro_train.cli import main
from agro_train.data.rows import read_jsonl
from agro_train.run import Run
from agro_train.run_folder import RunFolder
from agro_train.watch import trackers
from tests.train.test_train import train


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
