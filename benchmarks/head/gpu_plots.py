"""Charts of the GPU benchmark: time and extra memory against the number of tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agro_train.watch import style
from benchmarks.head.gpu_rows import Row
from benchmarks.head.providers.base import FORM_TITLES
from benchmarks.measure.plots import colour, look


def plot(rows: list[Row], head: str, form: str, title: str, path: Path) -> None:
    """Time (p20 to p80 shaded) and extra memory against N, a line a provider, the floor dashed."""
    chosen = [r for r in rows if (r.head, r.form, r.phase) == (head, form, "whole")]
    style.save(_drawn(chosen, f"{head}, {FORM_TITLES[form]}: {title}"), path)


@style.sheet()
def _drawn(chosen: Sequence[Row], title: str) -> Figure:
    times: dict[str, list[tuple[float, float]]] = {}
    memory: dict[str, list[tuple[float, float]]] = {}
    figure, (above, below) = style.panels(2, columns=1, row=3.4)
    for row in chosen:
        if row.median_ms is not None:
            times.setdefault(row.provider, []).append((row.tokens, row.median_ms))
        if row.extra_mb is not None and row.extra_mb > 0.0:  # a log axis has no place for less
            memory.setdefault(row.provider, []).append((row.tokens, row.extra_mb))
    for name in times:
        band = [(r.tokens, r.p20_ms, r.p80_ms) for r in chosen if r.provider == name and r.n > 0]
        tokens, low, high = zip(*band, strict=True)
        above.fill_between(tokens, low, high, color=colour(name), alpha=style.BAND, linewidth=0)
    lengths = sorted({row.tokens for row in chosen})
    for axes, curves, label in (
        (above, times, "median time, ms"),
        (below, memory, "memory beyond inputs and results, MB"),
    ):
        if not curves:
            axes.set_axis_off()
            continue
        _plot_lines(axes, curves, label)
        axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        axes.xaxis.minorticks_off()
    full: dict[str, int] = {}
    for row in chosen:
        if row.status.startswith("out of memory"):
            full.setdefault(row.provider, row.tokens)
    notes = [f"{name} from N={tokens}" for name, tokens in full.items()]
    figure.suptitle(title, wrap=True)
    style.finish(figure, note=f"out of memory: {', '.join(notes)}" if notes else None)
    return figure


def _plot_lines(
    axes: Axes, curves: Mapping[str, Sequence[tuple[float, float]]], title: str
) -> None:
    """One curve a provider, both axes logarithmic. curves: label -> [(x, y)]."""
    for name, points in curves.items():
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker="o", label=name, **look(name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(title=title, xlabel="tokens N")
