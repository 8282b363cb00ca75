"""The console: progress, the last step's numbers, and some of its completions."""

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from agro_train.types import Rollout

LONGEST_CELL = 400  # characters of a table's cell, before the terminal's width cuts it


class Display:
    """On a terminal a live view: a bar with the time left and what the last step measured, and
    every `samples_every` steps (0: never) its best and worst completions. Where the output is no
    terminal, one line a step.
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
        # The console's encoding may lack a letter of a completion.
        if isinstance(self.console.file, io.TextIOWrapper):
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
            # The speed is measured over the last hour. By default rich looks at the last 30 s, and
            # a step may take longer.
            speed_estimate_period=3600.0,
        )
        self.task = self.progress.add_task("", total=steps, completed=start)
        self.view = Live(self.progress, console=self.console, refresh_per_second=2)

    def __enter__(self) -> "Display":
        if self.live:
            self.view.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.view.stop()

    def say(self, text: str) -> None:
        # A log file has no width, so its lines are not wrapped.
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
        if "async/wait_s" in metrics:
            numbers.append(f"waited {metrics['async/wait_s']:.1f} s")
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
        self, before: Sequence[Rollout], after: Sequence[Rollout], count: int = 6
    ) -> None:
        """A table of held-out prompts with the greedy completion at the start and now."""
        old = {rollout.group: rollout for rollout in before if rollout.temperature == 0.0}
        table = Table("held-out prompt", "before", "", "after", "", title="Greedy completions")
        for rollout in [r for r in after if r.group in old][:count]:
            was = old[rollout.group]
            self.add_row(
                table,
                str(rollout.columns.get("prompt", rollout.prompt)),
                was.completion,
                reward_text(was.reward),
                rollout.completion,
                reward_text(rollout.reward),
            )
        if table.row_count:
            self.console.print(table)

    def add_row(self, table: Table, *cells: str) -> None:
        """Adds a row of one line: a completion of a thousand words would fill the screen."""
        table.add_row(*(self.plain(cell, one_line=True) for cell in cells))

    def plain(self, text: str, *, one_line: bool = False) -> Text:
        """The text without rich's markup, where [a] means nothing. Characters that would move the
        cursor are replaced.
        """
        words = " ".join(text.split()) if one_line else text
        shown = "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in words
        )
        if not one_line:
            return Text(shown)
        return Text(shown[:LONGEST_CELL], no_wrap=True, overflow="ellipsis")


def best_and_worst(rollouts: Sequence[Rollout], count: int) -> tuple[list[Rollout], list[Rollout]]:
    """Up to `count` rollouts of highest reward, best first, and of lowest, worst first.

    No rollout is in both lists, and one without a finite reward is in neither. Among equal rewards
    different groups come first.
    """
    seen: Counter[tuple[str, float]] = Counter()
    ranked = []  # (reward, how many of its group had that reward before it, place)
    for place, rollout in enumerate(rollouts):
        if rollout.demonstrated:
            continue  # it says nothing of what the policy does
        if rollout.reward is not None and math.isfinite(rollout.reward):
            ranked.append((rollout.reward, seen[rollout.group, rollout.reward], place))
            seen[rollout.group, rollout.reward] += 1
    best = sorted(ranked, key=lambda entry: (-entry[0], *entry[1:]))[: (len(ranked) + 1) // 2]
    worst = sorted(set(ranked) - set(best[:count]))
    return [rollouts[e[2]] for e in best[:count]], [rollouts[e[2]] for e in worst[:count]]


def reward_text(reward: float | None) -> str:
    return "-" if reward is None else f"{reward:g}"
