"""Charts of the GPU benchmark: time and extra memory against the number of tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.head.gpu_rows import Row
from benchmarks.head.providers.base import FORM_TITLES
from benchmarks.measure.plots import colour, without_box


def plot(rows: list[Row], head: str, form: str, title: str, path: Path) -> None:
    """Time (p20 to p80 shaded) and extra memory against N, a line a provider, the floor dashed."""
    chosen = [r for r in rows if (r.head, r.form, r.phase) == (head, form, "whole")]
    times: dict[str, list[tuple[float, float]]] = {}
    memory: dict[str, list[tuple[float, float]]] = {}
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in chosen:
        if row.median_ms is not None:
            times.setdefault(row.provider, []).append((row.tokens, row.median_ms))
        if row.extra_mb is not None and row.extra_mb > 0.0:  # a log axis has no place for less
            memory.setdefault(row.provider, []).append((row.tokens, row.extra_mb))
    for name in times:
        band = [(r.tokens, r.p20_ms, r.p80_ms) for r in chosen if r.provider == name and r.n > 0]
        left.fill_between(*zip(*band, strict=True), color=colour(name), alpha=0.15, linewidth=0)
    lengths = sorted({row.tokens for row in chosen})
    for axes, curves, label in (
        (left, times, "median time, ms"),
        (right, memory, "extra memory, MB"),
    ):
        if not curves:
            axes.set_axis_off()
            continue
        _plot_lines(axes, curves, xlabel="tokens N", ylabel=label, title=label)
        axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        axes.xaxis.minorticks_off()
    full: dict[str, int] = {}
    for row in chosen:
        if row.status.startswith("out of memory"):
            full.setdefault(row.provider, row.tokens)
    notes = [f"{name} from N={tokens}" for name, tokens in full.items()]
    figure.suptitle(f"{head}, {FORM_TITLES[form]}: {title}", fontsize=10)
    if notes:
        figure.supxlabel(f"out of memory: {', '.join(notes)}", fontsize=8)
    figure.savefig(path, dpi=110)


def _plot_lines(
    axes: Axes,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """One curve a provider, both axes logarithmic. curves: label -> [(x, y)]; empty: not drawn."""
    for name, points in curves.items():
        if points:
            x, y = zip(*sorted(points), strict=True)
            style = "--" if name == "floor" else "-"
            width = 2.2 if name == "ours" else 1.2
            axes.plot(x, y, style, marker="o", markersize=3, linewidth=width, color=colour(name),
                      label=name)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    without_box(axes)
    axes.legend(frameon=False, fontsize=8)
