"""A run's folder: every file name in it, and the record as a run starts, resumes or fails."""

import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from agro_train import durable
from agro_train.refusal import Refusal


class RunFolder:
    """The output folder of a run. Nothing is read or made before a method is called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.starts = path / "environment.json"  # software and machine, one object a start
        self.metrics = path / "metrics.jsonl"  # a row a step and a row an evaluation
        self.plots = path / "plots"
        self.page = path / "report.html"  # the last file that a run writes
        self.base_model = path / "base_model"  # the tiny model's weights before the first step
        self.latest_checkpoint = path / "latest_checkpoint"  # holds the newest one's name
        self.tensorboard = path / "tensorboard"
        self.evaluations = path / "evaluations"  # what `agro eval` writes, a folder each
        self._logs = (path / "rollouts", path / "samples")

    def rollouts(self, step: int) -> Path:
        """The completions that a step, counted from 1, learned from."""
        return self.path / "rollouts" / f"step-{step:06d}.jsonl"

    def samples(self, step: int) -> Path:
        """The held-out completions of the evaluation after `step` steps."""
        return self.path / "samples" / f"step-{step:06d}.jsonl"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` steps."""
        return self.path / f"checkpoint-{step}"

    def all_rollouts(self) -> dict[int, Path]:
        """The steps whose completions are there, in order, and where."""
        return _steps_of(self.path / "rollouts", r"step-(\d+)\.jsonl")

    def all_samples(self) -> dict[int, Path]:
        """The same for the evaluations."""
        return _steps_of(self.path / "samples", r"step-(\d+)\.jsonl")

    def checkpoints(self) -> dict[int, Path]:
        """The same for the checkpoints, damaged ones too."""
        found = _steps_of(self.path, r"checkpoint-(\d+)")
        return {step: path for step, path in found.items() if path.is_dir()}

    def check_unused(self) -> None:
        """Raises Refusal if a run is already there.

        A run that ended before its first step left nothing to resume or to keep: such a folder
        may be used again.
        """
        # `create` makes rollouts/. Without it config.yaml belongs to something else.
        made_here = (self.path / "rollouts").is_dir()
        stepped = bool(self.all_rollouts() or self.checkpoints())
        if (self.config.exists() or self.metrics.exists()) and (stepped or not made_here):
            raise Refusal(
                f"output_dir: expected a folder without a run, got {str(self.path)!r}, which has "
                f"one; choose another, or continue it with --resume {self.path}"
            )

    def create(self, config_yaml: str) -> None:
        """Makes the folder. The record of a run without a checkpoint is moved to unfinished-N."""
        self._set_aside()
        for drawn in (*self.plots.glob("*.png"), self.page):
            drawn.unlink(missing_ok=True)
        for folder in (self.path, *self._logs):
            folder.mkdir(parents=True, exist_ok=True)
        durable.replace(self.config, config_yaml)

    def rewind(self, step: int, config_yaml: str) -> None:
        """Drops what was logged after a step: a resumed run continues the record exactly."""
        durable.replace(self.config, config_yaml)
        self.page.unlink(missing_ok=True)
        if self.metrics.exists():
            kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
            durable.replace(self.metrics, "".join(kept))
        for folder in self._logs:
            logs = _steps_of(folder, r"step-(\d+)\.jsonl")
            # `agro score` may be writing a file of another name here, which is not the run's.
            unfinished = _steps_of(folder, re.escape(durable.PARTIAL) + r"step-(\d+)\.jsonl")
            later = [log for at, log in logs.items() if at > step]
            for log in [*later, *unfinished.values()]:
                log.unlink()

    def evaluated(self, step: int) -> bool:
        """Whether the record has the evaluation after a step."""
        rows = [json.loads(line) for line in self._lines()] if self.metrics.exists() else []
        return any(row["step"] == step and "eval_accuracy" in row for row in rows)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row to metrics.jsonl; a number that is not finite becomes null."""
        row = {k: v if math.isfinite(v) else None for k, v in {"step": step, **metrics}.items()}
        durable.append(self.metrics, json.dumps(row))

    def _lines(self) -> list[str]:
        # A crash can leave a line without an end. Its step has to be taken again anyway.
        lines = self.metrics.read_text().splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]

    def _set_aside(self) -> None:
        for folder in self._logs:
            for partial in folder.glob(f"{durable.PARTIAL}*"):
                partial.unlink()
        record = [path for path in self._logs if path.is_dir() and any(path.iterdir())]
        record += [self.metrics] if self.metrics.exists() else []
        if record:
            aside = next(
                path
                for number in itertools.count(1)
                if not (path := self.path / f"unfinished-{number}").exists()
            )
            aside.mkdir()
            for path in record:
                path.rename(aside / path.name)


def _steps_of(folder: Path, pattern: str) -> dict[int, Path]:
    """The paths in a folder whose whole name is of a pattern, by the step in it, in order."""
    found = {
        int(match[1]): path
        for path in folder.glob("*")
        if (match := re.fullmatch(pattern, path.name))
    }
    return dict(sorted(found.items()))
