"""A run's curves from its metrics.jsonl: reward, KL, entropy and length against steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from agro_train.data import read_jsonl  # noqa: E402

# name of the file, axis label, [(column, legend)]
Panel = tuple[str, str, list[tuple[str, str]]]
PANELS: list[Panel] = [
    (
        "reward",
        "mean reward",
        [
            ("reward", "training samples"),
            ("eval_reward", "held-out, sampled"),
            ("eval_accuracy", "held-out, greedy"),
        ],
    ),
    ("kl", "KL to the reference, nats a completion", [("kl", "training samples")]),
    ("entropy", "entropy, nats a token", [("entropy", "training samples")]),
    (
        "length",
        "completion length, tokens",
        [("completions/mean_length", "training samples"), ("eval_length", "held-out, greedy")],
    ),
]
COLOURS = ("#4269d0", "#ff725c", "#3ca951")


def plot_run(run: Path) -> list[Path]:
    """Draws run/metrics.jsonl into run/plots: one PNG a panel and overview.png with all of them."""
    rows = read_jsonl(run / "metrics.jsonl")
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    written = []
    for panel in PANELS:
        figure = Figure(figsize=(6, 4), layout="constrained")
        _draw(figure.subplots(), panel, rows)
        written.append(folder / f"{panel[0]}.png")
        figure.savefig(written[-1], dpi=120)
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw(axes, panel, rows)
    written.append(folder / "overview.png")
    figure.savefig(written[-1], dpi=120)
    return written


def _draw(axes: Axes, panel: Panel, rows: Sequence[dict[str, Any]]) -> None:
    _, label, curves = panel
    lowest = 0.0
    for colour, (column, legend) in zip(COLOURS, curves, strict=False):
        points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            lowest = min(lowest, *values)
            marker = "o" if column.startswith("eval_") else None
            axes.plot(steps, values, color=colour, marker=marker, markersize=4, label=legend)
    axes.margins(y=0.08)
    axes.set_ylim(bottom=lowest)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1 and axes.lines:  # before the first step, or without rewards, there is none
        axes.legend(frameon=False)
