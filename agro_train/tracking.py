"""What a run leaves behind and shows: metrics.jsonl, logs of rollouts, the console."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from agro_train.data import read_jsonl
from agro_train.recorded import rollout_to_json
from agro_train.types import Rollout


class RunFolder:
    """The output folder: config.yaml, metrics.jsonl, rollouts/, samples/, plots/, checkpoint-N/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"

    def check_unused(self) -> None:
        """Raises ValueError if a run is already there.

        What a run leaves that ended before its first step cannot be resumed and is no record of
        anything: such a folder may be used again.
        """
        logs = self.path / "rollouts"  # made by `create`: without it config.yaml is not a run's
        stepped = any(logs.glob("step-*.jsonl")) or any(self.path.glob("checkpoint-*"))
        if (self.config.exists() or self.metrics.exists()) and (stepped or not logs.is_dir()):
            raise ValueError(
                f"output_dir: expected a folder without a run, got {str(self.path)!r}, which has "
                f"one; choose another, or continue it with --resume {self.path}"
            )

    def create(self, config_yaml: str) -> None:
        """Makes the folder, without what a run left there that ended before its first step."""
        for pattern in ("metrics.jsonl", "samples/step-*.jsonl", "plots/*.png"):
            for leftover in self.path.glob(pattern):
                leftover.unlink()
        for folder in (self.path, self.path / "rollouts", self.path / "samples"):
            folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(config_yaml)

    def rewind(self, step: int, config_yaml: str) -> None:
        """Drops what was logged after a step: a resumed run continues the record exactly."""
        self._replace(self.config, config_yaml)
        if self.metrics.exists():
            # A line cut off by a crash has no end; it is of a step that has to be taken again.
            lines = self.metrics.read_text().splitlines(keepends=True)
            rows = [line for line in lines if line.endswith("\n")]
            kept = [line for line in rows if json.loads(line)["step"] <= step]
            self._replace(self.metrics, "".join(kept))
        for log in [*self.path.glob("rollouts/*.jsonl"), *self.path.glob("samples/*.jsonl")]:
            # Other names are not the run's own: `agro score` writes step-N.scored.jsonl here.
            found = re.fullmatch(r"step-(\d+)", log.stem)
            if found and int(found[1]) > step:
                log.unlink()

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        """The whole text or the old file, whatever happens in between."""
        partial = path.with_name(f".partial-{path.name}")
        partial.write_text(text, encoding="utf-8", errors="surrogatepass")
        os.replace(partial, path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row to metrics.jsonl; a number that is not finite becomes null."""
        row = {k: v if math.isfinite(v) else None for k, v in {"step": step, **metrics}.items()}
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def log_rollouts(self, kind: str, step: int, rollouts: Sequence[Rollout]) -> None:
        """Writes rollouts/step-N.jsonl or samples/step-N.jsonl, each a dataset for `recorded`."""
        lines = "".join(rollout_to_json(rollout) + "\n" for rollout in rollouts)
        self._replace(self.path / kind / f"step-{step:06d}.jsonl", lines)

    def read_samples(self, step: int) -> list[dict[str, object]]:
        path = self.path / "samples" / f"step-{step:06d}.jsonl"
        return read_jsonl(path) if path.exists() else []


class Display:
    """A progress bar with reward, KL and tokens/s on a terminal; one line a step elsewhere."""

    def __init__(self, start: int, steps: int, *, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)
        self.steps = steps
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, completed=start)

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        line = (
            f"reward {metrics['reward']:.3f}  kl {metrics['kl']:.3f}  "
            f"entropy {metrics['entropy']:.3f}  {metrics['tokens_per_s']:.0f} tokens/s"
        )
        if metrics["skipped"]:
            line += "  (skipped: no finite gradient)"
        self.progress.update(self.task, completed=step, description=line)
        if not self.console.is_terminal:
            self.say(f"step {step}/{self.steps}  {line}  {metrics['time_s']:.1f} s")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = "  ".join(f"{k.removeprefix('eval_')} {v:.3f}" for k, v in metrics.items())
        self.say(f"held-out after {step} steps: {numbers}")

    def before_and_after(
        self, before: Sequence[Mapping[str, object]], after: Sequence[Rollout], count: int = 6
    ) -> None:
        """A table of held-out prompts with the completion at the start and now."""
        old = {row["group"]: row for row in before if row["temperature"] == 0.0}
        table = Table("held-out prompt", "before", "", "after", "", title="Greedy completions")
        for rollout in [r for r in after if r.group in old][:count]:
            was = old[rollout.group]
            cells = (
                str(rollout.columns.get("prompt", rollout.prompt)),
                str(was["completion"]),
                _mark(was["reward"]),
                rollout.completion,
                _mark(rollout.reward),
            )
            # Text, for [a] is no markup; cut short, for six long answers would fill the screen.
            table.add_row(*(Text(shorten(cell, 160, placeholder=" ...")) for cell in cells))
        if table.row_count:
            self.console.print(table)


def _mark(reward: object) -> str:
    return "-" if reward is None else f"{reward:g}"
