"""What the charts share: a colour for each provider, and small helpers."""

from collections.abc import Iterable, Mapping

from matplotlib.axes import Axes

# One colour a provider, the same in every chart; "@medium" and other variants take the provider's.
COLOURS = {
    "ours": "#e4572e",
    "ours_keeping_quarter": "#f2a48d",
    "ours_keeping_half": "#ec7e62",
    "ours_keeping_all": "#b8391a",
    "floor": "#222222",
    "floor_kept": "#666666",
    "torch": "#9aa5b1",
    "torch_compile": "#4269d0",
    "checkpointed_loop": "#6cc5b0",
    "torch_lce": "#c6b04a",
    "torch_lce_tuned": "#efb118",
    "trl_selective": "#a463f2",
    "trl_chunked": "#7b3fc4",
    "liger_chunked": "#3ca951",
    "liger_scaled": "#1f7a34",
    "quack": "#ff9da6",
    "cce": "#97bbf5",
    "cce_torch_compile": "#2b8cbe",
}


def colour(provider: str) -> str:
    """Of a provider, whatever its precision."""
    return COLOURS.get(provider.split("@")[0], "#bbbbbb")


def without_box(axes: Axes) -> None:
    """Leaves the axes at the left and the bottom."""
    axes.spines[["top", "right"]].set_visible(False)


def distinct(rows: Iterable[Mapping[str, str]], column: str) -> list[str]:
    """The values of a column, each once, in the order of their appearance."""
    return list(dict.fromkeys(row[column] for row in rows))
