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
from agro_train.watch import style
from agro_train.watch.panels import PANELS, Panel, numbered, points, waiting

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
# Settings that do not shape a curve. Runs that differ only in them are one configuration.
BESIDES = (
    "seed output_dir save_every save_total_limit samples_every report_to project run_name".split()
)
ALONE, ROW = 4.2, 2.9  # inches: the height of a panel alone, and of a row of several
MARGIN = 0.08  # above the highest point, of what a panel shows
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
    written = [
        style.save(_drawn([panel], rows), folder / f"{panel.name}.png")
        for panel in (*PANELS, *waiting(rows))
    ]
    written.append(style.save(_drawn(PANELS, rows), folder / "overview.png"))
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
    written = [
        style.save(_drawn_comparison([panel], curves), folder / f"{panel[0]}.png")
        for panel in panels
    ]
    if panels:
        written.append(style.save(_drawn_comparison(panels, curves), folder / "overview.png"))
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


@style.sheet()
def _drawn(panels: Sequence[Panel], rows: Sequence[dict[str, Any]]) -> Figure:
    alone = len(panels) == 1
    figure, grid = style.panels(len(panels), columns=1 if alone else 2, row=ALONE if alone else ROW)
    for axes, panel in zip(grid, panels, strict=True):
        _draw(axes, panel, rows)
    style.finish(figure, [axes for axes in grid if len(axes.lines) > 1])
    return figure


def _draw(axes: Axes, panel: Panel, rows: Sequence[dict[str, Any]]) -> None:
    lowest = 0.0
    for number, column, label in numbered(panel):
        found = points(rows, column)
        if found:
            steps, values = zip(*found, strict=True)
            lowest = min(lowest, *values)
            marker = "o" if column.startswith("eval_") else None
            axes.plot(steps, values, marker=marker, label=label, **style.curve(number))
    _finish(axes, panel.label, lowest)


@style.sheet()
def _drawn_comparison(panels: Sequence[tuple[str, str, str]], curves: Sequence[Curve]) -> Figure:
    alone = len(panels) == 1
    figure, grid = style.panels(len(panels), columns=1 if alone else 2, row=ALONE if alone else ROW)
    for axes, panel in zip(grid, panels, strict=True):
        _draw_comparison(axes, panel, curves)
    seeds = any(len(curve.runs) > 1 for curve in curves)
    style.finish(figure, note="line: mean over runs, band: lowest to highest" if seeds else None)
    return figure


def _draw_comparison(axes: Axes, panel: tuple[str, str, str], curves: Sequence[Curve]) -> None:
    _, label, column = panel
    lowest = 0.0
    for number, curve in enumerate(curves):
        found = over_seeds(curve.runs, column)
        if not found:
            continue
        steps, means, lows, highs = zip(*found, strict=True)
        lowest = min(lowest, *lows)
        marker = "o" if column.startswith("eval_") or len(steps) == 1 else None
        look = style.curve(number)
        axes.plot(steps, means, marker=marker, label=curve.label, **look)
        if len(curve.runs) > 1:
            axes.fill_between(
                steps, lows, highs, color=look["color"], alpha=style.BAND, linewidth=0
            )
    _finish(axes, label, lowest)


def _finish(axes: Axes, label: str, lowest: float) -> None:
    """What a panel shows is its title: across its top there is room for it, along its side not."""
    highest = axes.dataLim.y1
    axes.set_ylim(bottom=lowest)
    if highest > lowest:  # a margin of what is shown, not of what the data span
        axes.set_ylim(top=highest + MARGIN * (highest - lowest))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.set(title=label, xlabel="step")


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
