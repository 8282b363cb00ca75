"""Time over ours against memory, ours and every peer: the README's picture.

    python -m benchmarks.head.scatter [--out FILE]

Forward and backward of Llama-3-8B's head on a GPU and of SmolLM2-135M's on a CPU, bf16, from the
CSV files of `benchmarks.head.gpu` and `benchmarks.head.cpu`. Nothing is measured.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure.rows import RESULTS, read_csv

OURS = "#0b6e69"
PEERS = {True: "#c2571a", False: "#5b5fc7"}  # by whether they store the logits
# Their labels, from the left: offset in points, and where the text ends.
BESIDE = (((-8, -5), "right"), ((0, -16), "center"), ((7, 2), "left"))
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


def draw(panels: Mapping[str, Sequence[Point]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        times = {provider: seconds for provider, seconds, _ in points}
        rank = 0  # of those that store the logits, which lie close together
        for provider, seconds, memory in sorted(points, key=lambda point: point[2]):
            mine, stores = provider == "ours", PROVIDERS[provider].stores_logits
            colour = OURS if mine else PEERS[stores]
            x, y = max(memory, 1.0), seconds / times["ours"]
            axes.scatter(x, y, s=170 if mine else 60, marker="*" if mine else "o", color=colour)
            where, side = (7, 4), "left"
            if stores:
                where, side = BESIDE[min(rank, len(BESIDE) - 1)]
                rank += 1
            axes.annotate(
                provider,
                (x, y),
                xytext=where,
                ha=side,
                textcoords="offset points",
                fontsize=10,
                color=colour,
            )
        axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = [
            t
            for t in (0.75, 1, 1.5, 2, 3, 5, 8)
            if t < 1.3 * max(s / times["ours"] for _, s, _ in points)
        ]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.margins(x=0.25, y=0.2)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("memory beyond inputs and results, MB")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("time over ours")
    figure.suptitle(
        "forward and backward, bf16; orange: stores the logits, violet: does not", fontsize=11
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
    draw(panels).savefig(options.out, dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
