"""The look of every picture: colours that can be told apart, print that can be read, names that do
not overlap; and no drawing of the project without the sheet.
"""

import ast
import itertools
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from agro_train.watch import style

ROOT = Path(__file__).parents[3]
HOME = ROOT / "agro_train" / "watch" / "style.py"
# Machado, Oliveira and Fernandes 2009, at full severity, of linear RGB.
SEEN_BY = {
    "everybody": np.eye(3),
    "protanopes": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopes": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}
NAMES_OF_COLOURS = {"color", "colors", "c", "facecolor", "edgecolor", "ecolor", "fc", "ec"}


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """CIELAB under D65."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) @ (seen @ linear).clip(0, 1)
    cubes = xyz / np.array([0.95047, 1.0, 1.08883])
    f = np.where(cubes > 0.008856, np.cbrt(cubes), 7.787 * cubes + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("seen", SEEN_BY.values(), ids=SEEN_BY)
def test_colours_can_be_told_apart(seen: np.ndarray) -> None:
    """A difference of 2.3 is just seen side by side; each pair here has seven times that, and
    neighbours in the order fifteen."""
    places = [lab(colour, seen) for colour in style.COLOURS]
    apart = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(places, 2)]
    assert min(apart) > 16
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.pairwise(places)) > 35


def test_colours_are_okabe_and_itos_in_their_fixed_order() -> None:
    assert style.COLOURS == tuple("#0072b2 #d55e00 #009e73 #56b4e9 #e69f00 #cc79a7 #000000".split())
    assert style.curve(0)["color"] == style.OURS
    looks = [tuple(style.curve(number).values()) for number in range(28)]
    assert len(set(looks)) == len(looks)


def test_text_can_be_read_on_the_background() -> None:
    assert style.contrast("#ffffff", "#000000") == pytest.approx(21.0)
    for colour in (*style.COLOURS, style.GREY, style.INK):
        assert style.contrast(style.ink(colour), style.PAPER) >= style.TEXT_CONTRAST
    assert style.ink(style.OURS) == style.OURS  # strong enough as it is
    assert all(style.contrast(colour, "#16181c") > 4.5 for colour in style.ON_DARK)


def test_print_is_ten_pixels_high_where_pages_are_narrow() -> None:
    sheet = matplotlib.rc_params_from_file(style.SHEET, use_default_template=False)
    a_point = 430 / (72 * style.WIDTH)  # pixels, in a picture 430 pixels wide
    sizes = {name: size for name, size in sheet.items() if name.endswith(("labelsize", "fontsize"))}
    assert min(sizes.values()) * a_point > 8.9, sizes
    assert sheet["lines.linewidth"] * a_point > 1.5


@pytest.mark.parametrize(
    ("wanted", "heights", "places"),
    [
        ([0.2, 0.8], [0.1, 0.1], [0.2, 0.8]),  # apart as they are
        ([0.5, 0.5], [0.2, 0.2], [0.4, 0.6]),  # as near as can be
        ([0.0, 0.0], [0.2, 0.4], [0.1, 0.4]),  # within
        ([1.0, 1.0, 1.0], [0.2, 0.2, 0.2], [0.5, 0.7, 0.9]),
        ([], [], []),
    ],
)
def test_spread(wanted: list[float], heights: list[float], places: list[float]) -> None:
    assert style.spread(wanted, heights) == pytest.approx(places)


def drawn(labels: list[str], columns: int = 1) -> Figure:
    with style.sheet():
        figure, panels = style.panels(columns, columns=columns)
        for axes in panels:
            for number, label in enumerate(labels):
                axes.plot([0, 1], [0.0, 1.0], label=label, **style.curve(number))
        style.finish(figure)
    return figure


def test_curves_that_end_together_are_named_without_overlap() -> None:
    figure = drawn(["agro", "policy gradient", "on policy"])
    figure.draw_without_rendering()
    boxes = sorted(map(Text.get_window_extent, figure.axes[0].texts), key=lambda box: box.y0)
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "agro",
        "policy gradient",
        "on policy",
    ]
    for below, above in itertools.pairwise(boxes):
        assert above.y0 >= below.y1 - 2  # pixels
    assert all(box.x0 >= figure.axes[0].bbox.x1 for box in boxes)
    assert not figure.legends


def test_too_many_curves_have_a_legend_in_place_of_names() -> None:
    figure = drawn([f"curve {number}" for number in range(20)])
    assert not figure.axes[0].texts
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"curve {n}" for n in range(20)]


def test_points_are_named_beside_each_other() -> None:
    with style.sheet():
        figure, (axes,) = style.panels(1, columns=1)
        points = [(name, 0.5, y, style.OURS) for name, y in (("one", 0.5), ("two", 0.502))]
        axes.plot([0, 1], [0, 1])
        style.finish(figure, [])
        style.name_points(figure, axes, points)
        figure.draw_without_rendering()
    one, two = (text.get_window_extent() for text in axes.texts)
    assert not one.overlaps(two)


def test_cells_left_over_belong_to_the_last_panel() -> None:
    with style.sheet():
        _, panels = style.panels(3)
    assert [len(axes.get_subplotspec().colspan) for axes in panels] == [1, 1, 2]


def test_pictures_are_small_and_of_one_width(tmp_path: Path) -> None:
    path = style.save(drawn(["agro"]), tmp_path / "picture.png")
    with Image.open(path) as picture:
        assert picture.mode == "P" and picture.width == 1050
        assert picture.convert("RGB").getpixel((1, 1)) == tuple(
            round(255 * channel) for channel in to_rgb(style.PAPER)
        )


def test_the_sheet_holds_while_a_picture_is_drawn_and_no_longer() -> None:
    before = matplotlib.rcParams["lines.linewidth"], matplotlib.rcParams["axes.facecolor"]
    with style.sheet():
        assert matplotlib.rcParams["lines.linewidth"] == 2.2
    assert (matplotlib.rcParams["lines.linewidth"], matplotlib.rcParams["axes.facecolor"]) == before


def sources() -> list[Path]:
    folders = ("agro_kernels", "agro_train", "benchmarks", "examples")
    return [path for name in folders for path in sorted((ROOT / name).rglob("*.py"))]


def names(node: ast.expr) -> str:
    """`a.b.c` of a call's function."""
    return ast.unparse(node)


def breaches(path: Path) -> list[str]:
    """What a file does with pictures that is style.py's to do."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"#[0-9a-fA-F]{3,8}", node.value):
                found.append(f"{node.lineno}: the colour {node.value}")
        elif isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in ("rcParams", "rc_context", "pyplot", "plt", "savefig"):
                found.append(f"{node.lineno}: {name}")
        elif isinstance(node, ast.Call):
            if names(node.func) == "Figure":
                found.append(f"{node.lineno}: a Figure that is not style.panels'")
            for keyword in node.keywords:
                if keyword.arg in NAMES_OF_COLOURS and isinstance(keyword.value, ast.Constant):
                    found.append(f"{node.lineno}: {keyword.arg}={keyword.value.value!r}")
            if names(node.func).endswith((".plot", ".errorbar")):
                found += [
                    f"{node.lineno}: {each.value!r}"  # "k:" is black
                    for each in node.args
                    if isinstance(each, ast.Constant) and re.match(r"[bgrcmykwC]", str(each.value))
                ]
        elif isinstance(node, ast.FunctionDef):
            calls = {names(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)}
            decorators = [names(each) for each in node.decorator_list]
            if "style.panels" in calls and "style.sheet()" not in decorators:
                found.append(f"{node.lineno}: {node.name} lacks @style.sheet()")
            if "style.panels" in calls and not calls & {"style.finish", "style.legend"}:
                found.append(f"{node.lineno}: {node.name} names no curves")
    return found


def test_every_picture_is_drawn_with_the_sheet() -> None:
    found = {str(path.relative_to(ROOT)): breaches(path) for path in sources() if path != HOME}
    assert not {path: what for path, what in found.items() if what}


@pytest.mark.parametrize(
    "code",
    [
        "axes.plot(x, y, color='red')",
        "axes.plot(x, y, 'k:')",
        "COLOURS = ['#4269d0']",
        "import matplotlib.pyplot as plt; plt.style.use('ggplot')",
        "matplotlib.rcParams['font.size'] = 9",
        "figure = Figure(figsize=(6, 4))",
        "figure.savefig('x.png')",
        "def draw():\n    figure, grid = style.panels(2)\n    style.finish(figure)",
        "@style.sheet()\ndef draw():\n    figure, grid = style.panels(2)",
    ],
)
def test_what_goes_past_the_sheet_is_found(code: str, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(code)
    assert breaches(path)


def test_every_picture_in_docs_is_shown_on_a_page() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    shown = " ".join(page.read_text() for page in pages)
    for folder in (ROOT / "docs", ROOT / "docs" / "experiments" / "results"):
        for path in folder.glob("*.png"):
            assert f"{path.name})" in shown, path
