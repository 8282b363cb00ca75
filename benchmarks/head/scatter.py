"""Time over ours against memory, ours and every peer: the README's picture.

    python -m benchmarks.head.scatter [--out FILE]

Forward and backward of Llama-3-8B's head on a GPU and of SmolLM2-135M's on a CPU, bf16, from the
CSV files of `benchmarks.head.gpu` and `benchmarks.head.cpu`. Nothing is measured.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from agro_train.watch import style
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure.plots import colour
from benchmarks.measure.rows import RESULTS, read_csv

Point = tuple[str, float, float]  # provider, time in one unit, MB beyond inputs and results


def gpu_points() -> list[Point]:
    return [
        (row["provider"], float(row["median_ms"]) / 1e3, float(row["extra_mb"]))
        for row in read_csv(RESULTS / "bench_linear_logprobs.csv")
        if (row["form"], row["tokens"], row["phase"], row["status"])
        == ("forward_backward", "4096", "whole", "ok")
        and row["with_entropy"] == "False"
        and row["extra_mb"]
    ]


def cpu_points() -> list[Point]:
    """Under the faster precision of those that have two; as called in turn with ours, where they
    were. Times over the bare products, which every process measures."""
    case = {
        "shape": "A",
        "dtype": "bf16",
        "form": "forward_backward",
        "entropy": "no",
        "status": "ok",
    }
    found: dict[str, tuple[bool, Point]] = {}
    for row in read_csv(RESULTS / "bench_cpu.csv"):
        if any(row[name] != value for name, value in case.items()) or row["provider"] == "floor":
            continue
        point = row["provider"], float(row["relative"]), float(row["peak_mb"])
        alone, kept = found.get(point[0], (True, None))
        now_alone = not row["in_turn_with"]
        if kept is None or (now_alone, point[1]) < (alone, kept[1]):
            found[point[0]] = now_alone, point
    return [point for _, point in found.values()]


@style.sheet()
def draw(panels: Mapping[str, Sequence[Point]]) -> Figure:
    figure, grid = style.panels(len(panels), columns=1, row=3.1)
    for axes, (title, points) in zip(grid, panels.items(), strict=True):
        times = {provider: seconds for provider, seconds, _ in points}
        axes.axhline(1, color=style.GREY, linewidth=1.0, linestyle="--")
        for provider, seconds, memory in points:
            shade = colour(provider)
            axes.scatter(
                max(memory, 1.0),
                seconds / times["ours"],
                s=260 if provider == "ours" else 70,
                marker="*" if provider == "ours" else "o",
                facecolor=style.PAPER if PROVIDERS[provider].stores_logits else shade,
                edgecolor=shade,
                linewidth=2.0,
                zorder=3,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        longest = 1.3 * max(times.values()) / times["ours"]
        ticks = [tick for tick in (0.75, 1, 1.5, 2, 3, 5, 8) if tick < longest]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.margins(x=0.12, y=0.2)
        axes.set_title(f"time over ours: {title}")
    grid[-1].set_xlabel("memory beyond inputs and results, MB")
    style.finish(figure, note="forward and backward, bf16; hollow: stores the logits")
    for axes, points in zip(grid, panels.values(), strict=True):
        ours = next(seconds for provider, seconds, _ in points if provider == "ours")
        style.name_points(
            figure,
            axes,
            [(name, max(memory, 1.0), s / ours, colour(name)) for name, s, memory in points],
        )
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    docs = Path(__file__).parents[2] / "docs"
    parser.add_argument("--out", type=Path, default=docs / "speed_memory.png")
    options = parser.parse_args(arguments)
    panels = {
        "NVIDIA H200, Llama-3-8B's head": gpu_points(),
        "AMD EPYC (Zen 5), two cores, SmolLM2-135M's head": cpu_points(),
    }
    for title, points in panels.items():
        print(title, *(f"  {p}: {t:.4g}, {m:.0f} MB" for p, t, m in points), sep="\n")
    style.save(draw(panels), options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
