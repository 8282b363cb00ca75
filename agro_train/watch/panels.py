"""What is drawn of a run: columns of metrics.jsonl, put together in panels.

Both the plots and the report draw PANELS; the report has room for ALSO_ON_THE_PAGE.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What earlier versions called a column.
OLD_NAMES = {"completions/mean_length": "length", "completions/clipped_ratio": "truncated"}


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes."""

    name: str  # of its file
    title: str
    unit: str  # "" where the title says it
    curves: tuple[tuple[str, str], ...]  # (column, legend)

    @property
    def label(self) -> str:
        """What the vertical axis shows."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


PANELS = (
    Panel(
        "reward",
        "mean reward",
        "",
        (
            ("reward", "training samples"),
            ("eval_reward", "held-out, sampled"),
            ("eval_accuracy", "held-out, greedy"),
        ),
    ),
    Panel("kl", "KL to the reference", "nats a completion", (("kl", "training samples"),)),
    Panel("entropy", "entropy", "nats a token", (("entropy", "training samples"),)),
    Panel(
        "length",
        "completion length",
        "tokens",
        (("completions/mean_length", "training samples"), ("eval_length", "held-out, greedy")),
    ),
)
ALSO_ON_THE_PAGE = (
    Panel(
        "cut_off",
        "cut off at max_completion_length",
        "share",
        (
            ("completions/clipped_ratio", "training samples"),
            ("eval_truncated_rate", "held-out, greedy"),
        ),
    ),
    Panel("grad_norm", "gradient norm before clipping", "", (("grad_norm", "training samples"),)),
)

WAITING = Panel(
    "waiting",
    "time of a step",
    "seconds",
    (
        ("time_s", "step"),
        ("async/wait_s", "trainer waited"),
        ("async/engine_idle_s", "engine idle"),
    ),
)


def waiting(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The panel of a run that samples ahead (`max_staleness`), if it is one."""
    return [WAITING] if points(rows, "async/wait_s") else []


def numbered(panel: Panel) -> list[tuple[int, str, str]]:
    """(number of its colour, column, legend) of a panel's curves: what the reward's panel shows
    as well has the same colour there and here."""
    known = {legend: number for number, (_, legend) in enumerate(PANELS[0].curves)}
    return [
        (known.get(legend, number), column, legend)
        for number, (column, legend) in enumerate(panel.curves)
    ]


def points(rows: Sequence[Mapping[str, Any]], column: str) -> list[tuple[int, float]]:
    """(step, value) where the column, or what it was called before, has a number."""
    old = OLD_NAMES.get(column, column)
    values = [(row["step"], row.get(column, row.get(old))) for row in rows]
    return [(step, value) for step, value in values if value is not None]
