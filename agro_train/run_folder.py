"""A run's folder: every file name in it, and the record as a run starts, resumes or fails."""

import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        self.model = path / "model"  # what a sharded run ends with, as transformers loads it
        self.base_model = path / "base_model"  # the tiny model's weights before the first step
        self.lock = path / ".lock"  # while a run writes here
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

    def is_run(self) -> bool:
        """A folder may have a config.yaml of anything's; metrics only a run's has."""
        return self.config.is_file() and self.metrics.is_file()

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
        rows = self._rows()
        durable.replace(self.config, config_yaml)
        self.page.unlink(missing_ok=True)
        if self.metrics.exists():
            kept = [line for line, row in rows if row["step"] <= step]
            durable.replace(self.metrics, "".join(kept))
        for folder in self._logs:
            folder.mkdir(exist_ok=True)  # whoever needed the room may have deleted it
            logs = _steps_of(folder, r"step-(\d+)\.jsonl")
            # `agro score` may be writing a file of another name here, which is not the run's.
            unfinished = _steps_of(folder, re.escape(durable.PARTIAL) + r"step-(\d+)\.jsonl")
            later = [log for at, log in logs.items() if at > step]
            for log in [*later, *unfinished.values()]:
                log.unlink()

    def evaluated(self, step: int) -> bool:
        """Whether the record has the evaluation after a step."""
        return any(row["step"] == step and "eval_accuracy" in row for _, row in self._rows())

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row to metrics.jsonl; a number that is not finite becomes null."""
        row = {k: v if math.isfinite(v) else None for k, v in {"step": step, **metrics}.items()}
        durable.append(self.metrics, json.dumps(row))

    def _rows(self) -> list[tuple[str, dict[str, Any]]]:
        """The lines of metrics.jsonl and what they say. Raises Refusal for one that is none of a
        run's."""
        if not self.metrics.exists():
            return []
        found = []
        # Not splitlines, which also splits at characters that JSON may have within a text.
        for number, line in enumerate(self.metrics.read_bytes().split(b"\n")[:-1], start=1):
            if not line.strip():
                continue
            # What is left out is a line without an end, as a crash can leave one. Its step has to
            # be taken again anyway.
            try:
                row = json.loads(line)
                if not isinstance(row["step"], int | float):
                    raise TypeError
            except (ValueError, TypeError, LookupError):
                raise Refusal(
                    f"metrics.jsonl: expected a row of JSON with its step in {self.metrics}, line "
                    f"{number}, got {line[:60]!r}; delete that line, or put a copy of the file back"
                ) from None
            found.append((line.decode() + "\n", row))
        return found

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
