"""A run's folder: every file name of it, and what is kept when a run starts, resumes or fails."""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from agro_train import durable
from agro_train.data.recorded import rollout_to_json
from agro_train.data.rows import read_jsonl
from agro_train.refusal import Refusal
from agro_train.types import Rollout


class RunFolder:
    """The output folder: config.yaml, metrics.jsonl, rollouts/, samples/, plots/, checkpoint-N/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"
        self.page = path / "report.html"  # the last thing that a run writes

    def check_unused(self) -> None:
        """Raises Refusal if a run is already there.

        What a run leaves that ended before its first step cannot be resumed and is no record of
        anything: such a folder may be used again.
        """
        logs = self.path / "rollouts"  # made by `create`: without it config.yaml is not a run's
        stepped = any(logs.glob("step-*.jsonl")) or any(self.path.glob("checkpoint-*"))
        if (self.config.exists() or self.metrics.exists()) and (stepped or not logs.is_dir()):
            raise Refusal(
                f"output_dir: expected a folder without a run, got {str(self.path)!r}, which has "
                f"one; choose another, or continue it with --resume {self.path}"
            )

    def create(self, config_yaml: str) -> None:
        """Makes the folder. The record of a run that came to no checkpoint goes to unfinished-N."""
        self._set_aside()
        for drawn in (*self.path.glob("plots/*.png"), self.page):
            drawn.unlink(missing_ok=True)
        for folder in (self.path, self.path / "rollouts", self.path / "samples"):
            folder.mkdir(parents=True, exist_ok=True)
        durable.replace(self.config, config_yaml)

    def rewind(self, step: int, config_yaml: str) -> None:
        """Drops what was logged after a step: a resumed run continues the record exactly."""
        durable.replace(self.config, config_yaml)
        self.page.unlink(missing_ok=True)
        if self.metrics.exists():
            kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
            durable.replace(self.metrics, "".join(kept))
        for log in [*self.path.glob("rollouts/*.jsonl"), *self.path.glob("samples/*.jsonl")]:
            # Other names are not the run's own: `agro score` writes step-N.scored.jsonl here.
            found = re.fullmatch(r"(\.partial-)?step-(\d+)", log.stem)
            if found and (found[1] or int(found[2]) > step):
                log.unlink()

    def evaluated(self, step: int) -> bool:
        """Whether the record has the evaluation after a step."""
        rows = [json.loads(line) for line in self._lines()] if self.metrics.exists() else []
        return any(row["step"] == step and "eval_accuracy" in row for row in rows)

    def _lines(self) -> list[str]:
        # A line cut off by a crash has no end; it is of a step that has to be taken again.
        lines = self.metrics.read_text().splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]

    def _set_aside(self) -> None:
        logs = [self.path / "rollouts", self.path / "samples"]
        for log in logs:
            for partial in log.glob(".partial-*"):
                partial.unlink()
        record = [path for path in logs if path.is_dir() and any(path.iterdir())]
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

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row to metrics.jsonl; a number that is not finite becomes null."""
        row = {k: v if math.isfinite(v) else None for k, v in {"step": step, **metrics}.items()}
        durable.append(self.metrics, json.dumps(row))

    def log_rollouts(self, kind: str, step: int, rollouts: Sequence[Rollout]) -> None:
        """Writes rollouts/step-N.jsonl or samples/step-N.jsonl, each a dataset for `recorded`."""
        lines = "".join(rollout_to_json(rollout) + "\n" for rollout in rollouts)
        durable.replace(self.path / kind / f"step-{step:06d}.jsonl", lines)

    def read_samples(self, step: int) -> list[dict[str, object]]:
        path = self.path / "samples" / f"step-{step:06d}.jsonl"
        return read_jsonl(path) if path.exists() else []
