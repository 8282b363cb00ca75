"""Curves from metrics.jsonl: one run's, and several runs' against each other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agro_train.config import TrainConfig
from agro_train.data.rows import read_jsonl
from agro_train.refusal import Refusal
from agro_train.run_folder import RunFolder
from agro_train.watch.panels import PANELS, Panel, points, waiting

REWARD, KL, ENTROPY, LENGTH = PANELS
# name of the file, axis label, column; in a comparison a curve is a configuration
COMPARED = [
    ("reward", f"{REWARD.label}, training samples", "reward"),
    ("accuracy", f"{REWARD.label}, held-out, greedy", "eval_accuracy"),
    ("eval_reward", f"{REWARD.label}, held-out, sampled", "eval_reward"),
    ("kl", KL.label, "kl"),
    ("entropy", ENTROPY.label, "entropy"),
    ("length", LENGTH.label, "completions/mean_length"),
]
# Okabe and Ito's colours, which colour-blind readers can tell apart. More curves than colours use
# them again with another stroke.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STROKES = ("-", "--", ":", "-.")
# Settings that do not shape a curve. Runs that differ only in them are one configuration.
BESIDES = (
    "seed output_dir save_every save_total_limit samples_every report_to project run_name".split()
)
MOST_NAMED = 3  # settings in a label; where more differ, the folder's name is the label


@dataclass(frozen=True)
class Curve:
    """A configuration in a comparison: its runs, one a seed."""

    label: str
    runs: list[list[dict[str, Any]]]  # rows of metrics.jsonl


def plot_run(run: Path) -> list[Path]:
    """Draws run/metrics.jsonl into run/plots: one PNG a panel, of a run that samples ahead also
    where the time went, and overview.png with the four panels that all runs have."""
    rows = read_jsonl(RunFolder(run).metrics)
    folder = RunFolder(run).plots
    folder.mkdir(exist_ok=True)
    written = []
    for panel in (*PANELS, *waiting(rows)):
        figure = Figure(figsize=(6, 4), layout="constrained")
        _draw(figure.subplots(), panel, rows)
        written.append(_save(figure, folder / f"{panel.name}.png"))
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw(axes, panel, rows)
    written.append(_save(figure, folder / "overview.png"))
    return written


def plot_comparison(runs: Sequence[Path], folder: Path) -> list[Path]:
    """Draws several runs against each other into `folder`: one PNG a panel that any of them has
    numbers for, and overview.png with all of them. Files of those names are replaced.

    Runs whose configurations differ at most in BESIDES are one curve: their mean, with a band from
    the lowest to the highest.
    """
    curves = compare(runs)
    panels = [p for p in COMPARED if any(points(rows, p[2]) for c in curves for rows in c.runs)]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for panel in panels:
        figure = Figure(figsize=(7, 5), layout="constrained")
        _draw_comparison(figure.subplots(), panel, curves)
        _add_legend(figure, curves)
        written.append(_save(figure, folder / f"{panel[0]}.png"))
    if panels:
        figure = Figure(figsize=(13, 8), layout="constrained")
        grid = figure.subplots(2, -(-len(panels) // 2), squeeze=False).flat
        for axes, panel in zip(grid, panels, strict=False):
            _draw_comparison(axes, panel, curves)
        for axes in list(grid)[len(panels) :]:
            axes.set_visible(False)
        _add_legend(figure, curves)
        written.append(_save(figure, folder / "overview.png"))
    return written


def compare(runs: Sequence[Path]) -> list[Curve]:
    """The runs as curves, in the order given, each labelled by the settings in which the
    configurations differ.
    """
    found: dict[str, list[Path]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in runs:
        config = read_settings(run)
        # A folder without a configuration is a curve of its own.
        key = repr(sorted(config.items())) if config else str(run)
        found.setdefault(key, []).append(run)
        settings[key] = config
    keys = {name: None for config in settings.values() for name in config}
    differing = [
        name for name in keys if len({repr(c.get(name)) for c in settings.values() if c}) > 1
    ]
    labels = {}
    for key, folders in found.items():
        labels[key] = ", ".join(f"{n}={_show(settings[key].get(n))}" for n in differing)
        if not settings[key] or not differing or len(differing) > MOST_NAMED:
            labels[key] = folders[0].resolve().name
    times = Counter(labels.values())
    for key, folders in found.items():
        if times[labels[key]] > 1:  # folders of one name in two places
            labels[key] = str(folders[0])
    counts = {key: f" ({len(each)} runs)" if len(each) > 1 else "" for key, each in found.items()}
    return [
        Curve(labels[key] + counts[key], [read_jsonl(RunFolder(run).metrics) for run in folders])
        for key, folders in found.items()
    ]


def read_settings(run: Path) -> dict[str, Any]:
    """The settings that may shape a run's curve: all but BESIDES. A setting that its config.yaml
    does not name has today's default. Empty where there is no such file.
    """
    given = read_yaml(run)
    settings = {**asdict(TrainConfig()), **given} if given else {}
    return {key: value for key, value in settings.items() if key not in BESIDES}


def read_yaml(run: Path) -> dict[str, Any]:
    """A run's config.yaml, whatever version wrote it; empty where there is none."""
    path = RunFolder(run).config
    if not path.is_file():
        return {}
    try:
        given = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise Refusal(f"config: expected a YAML file, got {path}: {problem}") from error
    if not isinstance(given, dict):
        raise Refusal(f"config: expected keys and values in {path}, got {given!r}")
    defaults = asdict(TrainConfig())
    for key, value in given.items():  # a list's only item may stand without its brackets
        if isinstance(defaults.get(key), list) and not isinstance(value, list):
            given[key] = [value]
    return given


def over_seeds(
    runs: Sequence[Sequence[Mapping[str, Any]]], column: str
) -> list[tuple[int, float, float, float]]:
    """(step, mean, lowest, highest) at the steps that all runs with such a column have reached.

    Beyond them the mean would be over fewer runs, and would jump where one ends.
    """
    each = [dict(found) for run in runs if (found := points(run, column))]
    steps = set.intersection(*(set(values) for values in each)) if each else set()
    columns = [(step, [values[step] for values in each]) for step in sorted(steps)]
    return [(step, fmean(values), min(values), max(values)) for step, values in columns]


def _draw(axes: Axes, panel: Panel, rows: Sequence[dict[str, Any]]) -> None:
    lowest = 0.0
    for colour, (column, legend) in zip(COLOURS, panel.curves, strict=False):
        found = points(rows, column)
        if found:
            steps, values = zip(*found, strict=True)
            lowest = min(lowest, *values)
            marker = "o" if column.startswith("eval_") else None
            axes.plot(steps, values, color=colour, marker=marker, markersize=4, label=legend)
    _finish(axes, panel.label, lowest)
    # Before the first step, or without rewards, there is no line to name.
    if len(panel.curves) > 1 and axes.lines:
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def _draw_comparison(axes: Axes, panel: tuple[str, str, str], curves: Sequence[Curve]) -> None:
    _, label, column = panel
    lowest = 0.0
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        stroke = STROKES[number // len(COLOURS) % len(STROKES)]
        found = over_seeds(curve.runs, column)
        if not found:
            continue
        steps, means, lows, highs = zip(*found, strict=True)
        lowest = min(lowest, *lows)
        marker = "o" if column.startswith("eval_") or len(steps) == 1 else None
        axes.plot(
            steps, means, stroke, color=colour, marker=marker, markersize=4, label=curve.label
        )
        if len(curve.runs) > 1:
            axes.fill_between(steps, lows, highs, color=colour, alpha=0.18, linewidth=0)
    _finish(axes, label, lowest)


def _add_legend(figure: Figure, curves: Sequence[Curve]) -> None:
    """Below all axes: each curve once, whichever panels it is in."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, line)
    seeds = any(len(curve.runs) > 1 for curve in curves)
    longest = max(map(len, handles), default=1)
    fitting = max(1, int(figure.get_figwidth() * 11) // (longest + 6))  # labels side by side
    rows = -(-len(handles) // fitting)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=-(-len(handles) // max(1, rows)),
        frameon=False,
        title="line: mean over runs, band: lowest to highest" if seeds else None,
    )


def _finish(axes: Axes, label: str, lowest: float) -> None:
    axes.margins(y=0.08)
    axes.set_ylim(bottom=lowest)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
