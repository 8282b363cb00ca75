"""Charts of the CPU benchmark's CSV: bars a provider, a panel a shape and form."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.head.job import label_of
from benchmarks.head.providers.base import FORM_TITLES
from benchmarks.measure.plots import COLOURS, colour, distinct, without_box
from benchmarks.measure.rows import read_csv

Rows = list[dict[str, str]]


def plot_cpu(path: Path) -> list[Path]:
    """Draws time over the floor's, and memory: a PNG for each dtype, with and without entropy.

    path: the CSV. Returns the PNGs, which lie beside it.
    """
    rows = [row for row in read_csv(path) if row["median_s"]]
    written = []
    for entropy in ("no", "yes"):
        for dtype in distinct(rows, "dtype"):
            chosen = [row for row in rows if (row["dtype"], row["entropy"]) == (dtype, entropy)]
            if not chosen:
                continue
            suffix = f"{dtype}{'_entropy' if entropy == 'yes' else ''}"
            what = f"{dtype}{', with entropy' if entropy == 'yes' else ''}"
            for kind, draw, title in (
                ("time", _draw_time, f"Time over the matmul lower bound, {what}"),
                ("memory", _draw_memory, f"Memory beyond inputs and results, {what}"),
            ):
                drawn = [row for row in chosen if kind == "time" or row["peak_mb"]]
                if drawn:
                    written.append(path.with_name(f"{path.stem}_{kind}_{suffix}.png"))
                    _grid(drawn, draw, title).savefig(written[-1], dpi=110)
    return written


def _grid(rows: Rows, draw: Callable[[Axes, Rows], None], title: str) -> Figure:
    """Shapes down, forms across."""
    shapes = distinct(rows, "shape")
    forms = [form for form in FORM_TITLES if any(row["form"] == form for row in rows)]
    cells = {
        (shape, form): _latest(
            [row for row in rows if (row["shape"], row["form"]) == (shape, form)]
        )
        for shape in shapes
        for form in forms
    }
    heights = [1.0 + 0.28 * max(len(cells[shape, form]) for form in forms) for shape in shapes]
    figure = Figure(figsize=(1.6 + 4.4 * len(forms), 1.2 + sum(heights)), layout="constrained")
    panels = figure.subplots(
        len(shapes), len(forms), squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )
    for line, shape in zip(panels, shapes, strict=True):
        for axes, form in zip(line, forms, strict=True):
            cell = cells[shape, form]
            if not cell:
                axes.set_axis_off()
                continue
            draw(axes, cell)
            # Bars of one thickness, whatever the number of providers; the best at the top.
            slots = max(len(cells[shape, other]) for other in forms)
            axes.set_ylim(len(cell) - slots - 0.5, len(cell) - 0.4)
            one = cell[0]
            sizes = f"{shape}: N {one['tokens']}, D {one['hidden_size']}, V {one['vocabulary']}"
            axes.set_title(f"{FORM_TITLES[form]}\n{sizes}", fontsize=9, loc="left")
    first = rows[0]
    machine = f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}"
    figure.suptitle(f"{title}\n{machine}", fontsize=10)
    figure.supxlabel("hatched: stores the (N, V) logits; * one timed call", fontsize=9)
    return figure


def _latest(rows: Rows) -> Rows:
    """One row a label: that of the turns where there is one, since its rivals ran beside it."""
    chosen: dict[str, dict[str, str]] = {}
    for row in rows:
        if _label(row) not in chosen or row["in_turn_with"]:
            chosen[_label(row)] = row
    return list(chosen.values())


def _draw_time(axes: Axes, rows: Rows) -> None:
    """Bars of the time over the floor's, or of seconds where no floor was measured."""
    column = "relative" if all(row["relative"] for row in rows) else "median_s"
    rows = sorted(rows, key=lambda row: float(row[column]), reverse=True)
    values = [float(row[column]) for row in rows]
    unit = "x" if column == "relative" else "s"
    texts = [
        f"{value:.2f} {unit} ({_seconds(float(row['median_s']))})"
        for row, value in zip(rows, values, strict=True)
    ]
    _bars(axes, rows, values, texts)
    if column == "relative":
        axes.axvline(1.0, color=COLOURS["floor"], linewidth=0.8)


def _draw_memory(axes: Axes, rows: Rows) -> None:
    rows = sorted(rows, key=lambda row: float(row["peak_mb"]), reverse=True)
    values = [max(1.0, float(row["peak_mb"])) for row in rows]  # a bar on a log axis needs a length
    _bars(axes, rows, values, [f"{float(row['peak_mb']):.0f} MB" for row in rows])


def _bars(axes: Axes, rows: Rows, values: Sequence[float], texts: Sequence[str]) -> None:
    names = [_label(row) + ("*" if row["n"] == "1" else "") for row in rows]
    bars = axes.barh(names, values, color=[colour(name.rstrip("*")) for name in names], height=0.7)
    for bar, row in zip(bars, rows, strict=True):
        if row["stores_logits"] == "yes":
            bar.set_hatch("///")
            bar.set_edgecolor("white")
    axes.bar_label(bars, texts, padding=3, fontsize=8)
    axes.set_xscale("log")
    # Shared by all panels, so only ever widened; with room for the texts right of the bars.
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, 0.5 * min(values)), max(right, 20.0 * max(values)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.tick_params(axis="x", labelsize=8)
    without_box(axes)
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if name == "ours" else "normal")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.2g} ms"


def _label(row: Mapping[str, str]) -> str:
    return label_of(row["provider"], row["precision"])
