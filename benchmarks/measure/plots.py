"""What the charts share: how each provider looks."""

from collections.abc import Iterable, Mapping
from typing import Any

from agro_train.watch import style

# Colour and stroke, the same in every chart: a colour a project, a stroke each of its programs.
LOOKS = {
    "ours": (style.OURS, "-"),
    "ours_keeping_quarter": (style.OURS, "--"),
    "ours_keeping_half": (style.OURS, "-."),
    "ours_keeping_most": (style.OURS, (0, (3, 1, 1, 1, 1, 1))),
    "ours_keeping_all": (style.OURS, ":"),
    "floor": (style.GREY, "--"),
    "floor_kept": (style.GREY, ":"),
    "torch": (style.BLACK, "-"),
    "torch_compile": (style.BLACK, "--"),
    "checkpointed_loop": (style.SKY, "-"),
    "torch_lce": (style.ORANGE, "-"),
    "torch_lce_tuned": (style.ORANGE, "--"),
    "trl_selective": (style.PURPLE, "-"),
    "trl_chunked": (style.PURPLE, "--"),
    "liger_chunked": (style.GREEN, "-"),
    "liger_scaled": (style.GREEN, "--"),
    "quack": (style.SKY, "--"),
    "cce": (style.VERMILLION, "-"),
    "cce_torch_compile": (style.VERMILLION, "--"),
}


def colour(provider: str) -> str:
    return LOOKS[provider][0]


def look(provider: str) -> dict[str, Any]:
    """Colour and stroke, as keywords of Axes.plot."""
    shade, stroke = LOOKS[provider]
    return {"color": shade, "linestyle": stroke}


def distinct(rows: Iterable[Mapping[str, str]], column: str) -> list[str]:
    """The values of a column, each once, in the order of their appearance."""
    return list(dict.fromkeys(row[column] for row in rows))
