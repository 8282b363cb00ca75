"""What a run leaves behind and shows: metrics.jsonl, logs of rollouts, the console."""

import io
import itertools
import json
import math
import re
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from agro_train import durable
from agro_train.data import read_jsonl
from agro_train.recorded import rollout_to_json
from agro_train.types import Rollout

LONGEST_CELL = 400  # characters of a table's cell, before the terminal's width cuts it


class RunFolder:
    """The output folder: config.yaml, metrics.jsonl, rollouts/, samples/, plots/, checkpoint-N/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"
        self.page = path / "report.html"  # the last thing that a run writes

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


class Display:
    """On a terminal a live view: a bar with the time left and what the last step measured, and
    every `samples_every` steps (0: never) its best and worst completions. One line a step
    elsewhere.
    """

    def __init__(
        self,
        start: int,
        steps: int,
        *,
        samples_every: int = 0,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(quiet=quiet)
        if isinstance(self.console.file, io.TextIOWrapper):  # a terminal may know no such letter
            self.console.file.reconfigure(errors="replace")
        self.steps = steps
        self.samples_every = samples_every
        self.live = self.console.is_terminal and not quiet
        self.held_out: float | None = None  # accuracy, of the last evaluation
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            # From the steps of the last hour: rich forgets after 30 s, and a step may take longer.
            speed_estimate_period=3600.0,
        )
        self.task = self.progress.add_task("", total=steps, completed=start)
        self.view = Live(self.progress, console=self.console, refresh_per_second=2)

    def __enter__(self) -> "Display":
        if self.live:
            self.view.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.view.stop()

    def say(self, text: str) -> None:
        # A log file has no width: a line stays one.
        self.console.print(self.plain(text), soft_wrap=not self.console.is_terminal)

    def step(self, step: int, metrics: Mapping[str, float], rollouts: Sequence[Rollout]) -> None:
        self.progress.update(self.task, completed=step)
        numbers = [
            f"reward {metrics['reward']:.3f}",
            f"kl {metrics['kl']:.3f}",
            f"entropy {metrics['entropy']:.3f}",
            f"length {metrics['completions/mean_length']:.1f}",
            f"cut off {metrics['completions/clipped_ratio']:.0%}",
            f"{metrics['tokens_per_s']:.0f} tokens/s",
            f"{metrics['memory_gb']:.2f} GB",
        ]
        if self.held_out is not None:
            numbers.append(f"held-out {self.held_out:.3f}")
        if metrics["skipped"]:
            numbers.append("(skipped: no finite gradient)")
        if not self.live:
            self.say(f"step {step}/{self.steps}  {'  '.join(numbers)}  {metrics['time_s']:.1f} s")
            return
        panel = Columns([Text(number) for number in numbers], padding=(0, 3))
        self.view.update(Group(self.progress, panel))
        if self.samples_every and step % self.samples_every == 0:
            self.samples(step, rollouts)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.held_out = metrics["eval_accuracy"]
        numbers = "  ".join(f"{k.removeprefix('eval_')} {v:.3f}" for k, v in metrics.items())
        self.say(f"held-out after {step} steps: {numbers}")

    def samples(self, step: int, rollouts: Sequence[Rollout], count: int = 2) -> None:
        """A table of a step's best and worst completions, `count` of each, one line a cell."""
        best, worst = best_and_worst(rollouts, count)
        table = Table("", "reward", "prompt", "completion", title=f"Completions of step {step}")
        for word, chosen in (("best", best), ("worst", worst)):
            for rollout in chosen:
                prompt = str(rollout.columns.get("prompt", rollout.prompt))
                self.add_row(table, word, reward_text(rollout.reward), prompt, rollout.completion)
        if table.row_count:
            self.console.print(table)

    def before_and_after(
        self, before: Sequence[Mapping[str, object]], after: Sequence[Rollout], count: int = 6
    ) -> None:
        """A table of held-out prompts with the completion at the start and now."""
        old = {row["group"]: row for row in before if row["temperature"] == 0.0}
        table = Table("held-out prompt", "before", "", "after", "", title="Greedy completions")
        for rollout in [r for r in after if r.group in old][:count]:
            was = old[rollout.group]
            self.add_row(
                table,
                str(rollout.columns.get("prompt", rollout.prompt)),
                str(was["completion"]),
                reward_text(was["reward"]),
                rollout.completion,
                reward_text(rollout.reward),
            )
        if table.row_count:
            self.console.print(table)

    def add_row(self, table: Table, *cells: str) -> None:
        """One line a cell: an answer of a thousand words would fill the screen."""
        table.add_row(*(self.plain(cell, one_line=True) for cell in cells))

    def plain(self, text: str, *, one_line: bool = False) -> Text:
        """The text as it is: [a] is no markup, and what would move the cursor is replaced."""
        words = " ".join(text.split()) if one_line else text
        shown = "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in words
        )
        if not one_line:
            return Text(shown)
        return Text(shown[:LONGEST_CELL], no_wrap=True, overflow="ellipsis")


def best_and_worst(rollouts: Sequence[Rollout], count: int) -> tuple[list[Rollout], list[Rollout]]:
    """Up to `count` rollouts of highest reward, best first, and of lowest, worst first.

    None is in both, and none without a reward is in either. Of equal ones, those of different
    groups come first.
    """
    seen: Counter[tuple[str, float]] = Counter()
    ranked = []  # (reward, how many of its group had that reward before it, place)
    for place, rollout in enumerate(rollouts):
        if rollout.reward is not None and math.isfinite(rollout.reward):
            ranked.append((rollout.reward, seen[rollout.group, rollout.reward], place))
            seen[rollout.group, rollout.reward] += 1
    best = sorted(ranked, key=lambda entry: (-entry[0], *entry[1:]))[: (len(ranked) + 1) // 2]
    worst = sorted(set(ranked) - set(best[:count]))
    return [rollouts[e[2]] for e in best[:count]], [rollouts[e[2]] for e in worst[:count]]


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held so far, in 1e9 bytes: on a CUDA device what torch
    allocated there, on a CPU the resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reward_text(reward: object) -> str:
    return "-" if reward is None else f"{reward:g}"
