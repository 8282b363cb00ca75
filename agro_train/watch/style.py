"""How every picture of the project looks: one sheet, one order of colours, curves named at their
ends.

Pages show a picture some 420 pixels wide as often as at full width, on a light theme or a dark one.
So each is WIDTH inches wide, with at most two panels side by side and print that can still be read;
and it brings its own light background, on which its colours were chosen, in place of a second
picture for dark pages.

    @style.sheet()
    def draw(...) -> Figure:
        figure, (left, right) = style.panels(2)
        left.plot(steps, values, label="agro", **style.curve(0))
        style.finish(figure)
        return figure

    style.save(draw(...), path)
"""

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image

SHEET = Path(__file__).with_name("agro.mplstyle")
_SETTINGS = matplotlib.rc_params_from_file(SHEET, use_default_template=False)

COLOURS: tuple[str, ...] = tuple(map(to_hex, _SETTINGS["axes.prop_cycle"].by_key()["color"]))
BLUE, VERMILLION, GREEN, SKY, ORANGE, PURPLE, BLACK = COLOURS
OURS = BLUE  # in every picture: AGRO among algorithms, this project among its peers
PAPER: str = to_hex(_SETTINGS["figure.facecolor"])
INK: str = to_hex(_SETTINGS["text.color"])
GREY: str = to_hex(_SETTINGS["axes.edgecolor"])  # of what is no curve: bounds, marks
# The first curves of COLOURS on the dark variant of a page that has one.
ON_DARK = (SKY, "#f0924c", "#2fc79b")
# Curves beyond the last colour use the colours again with another stroke.
STROKES = ("-", "--", ":", "-.")

Box = Sequence[float]  # left, bottom, right, top, in pixels
FAR = 0.5  # of a panel's width: a curve that ends before is named where it ends
WIDTH = 7.0  # inches
ROW = 2.7  # of a row of panels, inches
BAND = 0.16  # how opaque what lies between a curve's lowest and highest is
TEXT_CONTRAST = 4.5  # what WCAG asks of text on its background
# Where a point's name may stand, the best place first: points to its right, above it, its side.
AROUND = (
    (11, 0, "left"),
    (-11, 0, "right"),
    (0, 13, "center"),
    (0, -13, "center"),
    (7, 10, "left"),
    (7, -10, "left"),
    (-7, 10, "right"),
    (-7, -10, "right"),
)
SIDES = {"left": 0.0, "center": 0.5, "right": 1.0}  # the share of a text before its place
CHARACTER = 0.56  # width of one, on average, over the size of the print


@contextmanager
def sheet() -> Iterator[None]:
    """While a picture is drawn: the sheet alone, whatever the user's own matplotlibrc says. Also a
    decorator."""
    with matplotlib.style.context(["default", SHEET]):
        yield


def panels(
    count: int, columns: int = 2, row: float = ROW, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, `columns` side by side, rows of `row` inches.

    options: of Figure.subplots. Cells that would be left over belong to the last panel.
    """
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, row * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    every = list(grid.flat)
    if rows * columns > count:
        cells = every[-1].get_gridspec()
        for axes in every[count - 1 :]:
            axes.remove()
        every[count - 1 :] = [figure.add_subplot(cells[rows - 1, (count - 1) % columns :])]
    return figure, every


def curve(number: int) -> dict[str, Any]:
    """Colour and stroke of the curve of that number, as keywords of Axes.plot."""
    again, which = divmod(number, len(COLOURS))
    return {"color": COLOURS[which], "linestyle": STROKES[again % len(STROKES)]}


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours, from 1 to 21."""

    def luminance(colour: str) -> float:
        channels = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        )
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def ink(colour: str) -> str:
    """The colour for text, which is thinner than a curve: darkened until it can be read."""
    shade = 1.0
    while contrast(to_hex([shade * c for c in to_rgb(colour)]), PAPER) < TEXT_CONTRAST:
        shade -= 0.02
    return str(to_hex([shade * c for c in to_rgb(colour)]))


def finish(figure: Figure, among: Sequence[Axes] | None = None, note: str | None = None) -> None:
    """The last step of a drawing: breaks titles that are wider than their panel, and writes each
    curve's label at the panel's side, or beside its end if that is far from there. Where one panel
    has no room for its labels, a legend below all panels names the curves in their place.

    among: the panels whose curves are named; None: all. note: what stands below all panels.
    """
    for axes in figure.axes:
        axes.set_title(_broken(axes.get_title(loc="left"), int(0.86 * _characters(axes))))
    figure.draw_without_rendering()  # only now it is known how high a panel is
    among = list(figure.axes if among is None else among)
    if all(_has_room(axes) for axes in among):
        for axes in among:
            _name_ends(figure, axes)
        if note:
            figure.supxlabel(note, color=GREY)
    else:
        legend(figure, note)


def name_points(
    figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float, str]]
) -> None:
    """Writes a name beside each point where it covers no other point and no other name: to its
    right if there is room, else around it. After `finish`.

    points: (name, x, y, colour).
    """
    figure.draw_without_rendering()  # where the points are
    unit = figure.dpi / 72  # pixels of a point of print
    width, height = CHARACTER * _SETTINGS["font.size"] * unit, 1.15 * _SETTINGS["font.size"] * unit
    places = [axes.transData.transform((x, y)) for _, x, y, _ in points]
    taken = [(x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for x, y in places]
    for (name, x, y, colour), (left, middle) in zip(points, places, strict=True):
        boxes = {}
        for across, up, side in AROUND:
            start = left + across * unit - SIDES[side] * width * len(name)
            low = middle + up * unit - height / 2
            boxes[across, up, side] = (start, low, start + width * len(name), low + height)
        (across, up, side), box = min(
            boxes.items(), key=lambda item: _covered(item[1], taken, axes.bbox.extents)
        )
        taken.append(box)
        axes.annotate(
            name,
            (x, y),
            (across, up),
            textcoords="offset points",
            ha=side,
            va="center",
            color=ink(colour),
            path_effects=[withStroke(linewidth=3, foreground=PAPER)],  # over lines
        )


def legend(figure: Figure, title: str | None = None) -> None:
    """Below all panels: each label once, whichever panels it is in."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    longest = max(map(len, handles), default=1) + 6  # with the stroke before it
    size = _SETTINGS["legend.fontsize"]
    fitting = max(1, int(72 * figure.get_figwidth() / (CHARACTER * size * longest)))
    rows = -(-len(handles) // fitting)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=-(-len(handles) // max(1, rows)),
        title=title,
    )


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG of 256 colours. Returns its path."""
    drawn, small = io.BytesIO(), io.BytesIO()
    with sheet():  # ticks are made only now
        figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    path.write_bytes(small.getvalue())
    return path


def spread(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Middles, between 0 and 1, of labels of these heights that do not overlap, as near as can be
    to those wanted, in their order. What is wanted ascends, and there is room for all.

    >>> spread([0.5, 0.5], [0.25, 0.25])
    [0.375, 0.625]
    """
    below = [sum(heights[:number]) + heights[number] / 2 for number in range(len(heights))]
    # Less what lies below it, a place may only not be below the one before it: pools of such as
    # would be, at their mean.
    pools: list[list[float]] = []
    for place, under in zip(wanted, below, strict=True):
        pools.append([place - under])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    level = [fmean(pool) for pool in pools for _ in pool]
    highest = 1.0 - sum(heights)
    return [
        min(max(place, 0.0), highest) + under for place, under in zip(level, below, strict=True)
    ]


def _covered(box: Box, taken: Sequence[Box], inside: Box) -> float:
    """How much of a box others cover, in pixels squared; what is outside counts fully."""

    def common(one: Box, other: Box) -> float:
        across = min(one[2], other[2]) - max(one[0], other[0])
        up = min(one[3], other[3]) - max(one[1], other[1])
        return max(across, 0.0) * max(up, 0.0)

    return sum(common(box, other) for other in taken) + common(box, box) - common(box, inside)


def _ends(axes: Axes) -> list[tuple[str, Line2D, tuple[float, float]]]:
    """(label, line, last point inside the axes) of each labelled curve."""
    (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    found = []
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        line = handle[0] if isinstance(handle, Container) else handle
        if isinstance(line, Line2D):
            points = np.asarray(line.get_xydata(), dtype=float)
            inside = ((left, bottom) <= points) & (points <= (right, top))
            points = points[inside.all(1)]
            if len(points):
                found.append((label, line, (float(points[-1, 0]), float(points[-1, 1]))))
    return found


def _broken(text: str, width: int) -> str:
    """In lines of at most `width` characters, at a comma if that is enough."""
    if len(text) <= width or "\n" in text:
        return text
    head, comma, tail = text.rpartition(", ")
    if comma and max(len(head) + 1, len(tail)) <= width:
        return f"{head},\n{tail}"
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _characters(axes: Axes) -> float:
    """How many go side by side in a panel, its ticks included."""
    place = axes.get_subplotspec()
    assert place is not None, "a panel is one of a grid"
    share = len(place.colspan) / place.get_gridspec().ncols
    return float(72 * WIDTH * share / (CHARACTER * _SETTINGS["font.size"]))


def _labels(axes: Axes) -> list[str]:
    """Of its curves, in lines of at most a third of the panel."""
    return [_broken(label, int(_characters(axes) / 3)) for label, *_ in _ends(axes)]


def _heights(axes: Axes) -> list[float]:
    """Of the labels, in heights of the axes."""
    line = 1.2 * _SETTINGS["font.size"] / 72 * axes.figure.dpi / axes.bbox.height
    return [line * (1 + label.count("\n")) for label in _labels(axes)]


def _has_room(axes: Axes) -> bool:
    """For the labels below each other."""
    return sum(_heights(axes)) <= 1.0


def _name_ends(figure: Figure, axes: Axes) -> None:
    ends, labels, heights = _ends(axes), _labels(axes), _heights(axes)
    to_axes = axes.transData + axes.transAxes.inverted()
    at = [np.clip(to_axes.transform(end), 0.0, 1.0) for *_, end in ends]
    aside = [number for number in range(len(ends)) if at[number][0] >= FAR]
    order = sorted(aside, key=lambda number: float(at[number][1]))
    places = spread(
        [float(at[number][1]) for number in order], [heights[number] for number in order]
    )
    apart = any(
        abs(place - at[number][1]) > 0.3 * heights[number] or at[number][0] < 0.94
        for number, place in zip(order, places, strict=True)
    )
    for number, place in zip(order, places, strict=True):
        x, y = (float(value) for value in at[number])
        colour = to_hex(ends[number][1].get_color())
        leader = {
            "arrowstyle": "-",
            "color": colour,
            "linestyle": ends[number][1].get_linestyle(),  # tells curves of one colour apart
            "linewidth": 1.1,
            "shrinkA": 1,
            "shrinkB": 3,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            labels[number],
            (x, y),
            (1.08 if apart else 1.03, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            linespacing=1.0,
            color=ink(colour),
            annotation_clip=False,
            arrowprops=leader if apart else None,
        )
    name_points(
        figure,
        axes,
        [
            (label, *end, to_hex(line.get_color()))
            for number, (label, line, end) in enumerate(ends)
            if number not in aside
        ],
    )
