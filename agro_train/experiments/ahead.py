"""What sampling ahead of the updates costs in learning, and what it saves in time.

`max_staleness` k, with the engine that samples beside the updates: the samples of step t are the
policy's after max(0, t - k) updates. Everything not named is as in Figure 2, whose learning rates
these runs share: those of k = 0 are Figure 2's own.
"""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from agro_train.experiments import beyond, compare, fig2, tabular
from agro_train.experiments.compare import ALGORITHMS, Algorithm, Curves, Named
from agro_train.experiments.sweep import Sweep
from agro_train.experiments.tabular import Claim, Row
from agro_train.watch import style

NAMES = ("pg_k2", "agro", "agro_tapered")
STALENESS = (0, 1, 2, 4, 8)
AXIS = "max_staleness"
MEASURES = {
    "eval_accuracy": "greedy",
    "eval_reward": "sampled",
    "eval_below": "sampled, below 1/2",
    "eval_kl": "KL",
}
COLOURS = dict(
    zip(
        map(str, STALENESS),
        (style.BLACK, style.BLUE, style.GREEN, style.ORANGE, style.VERMILLION),
        strict=True,
    )
)


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """Writes ahead_differences.csv, ahead_equal_time.csv and ahead.png."""
    runs, curves = measured(Sweep(output_dir, quick), quick)
    later = {name: beyond.by_value(runs, name) for name in NAMES}
    differences = [
        {"algorithm": name, **row}
        for name, named in later.items()
        for row in compare.statement_rows(curves, named, "0", MEASURES)
    ]
    tabular.write_csv(output_dir / "ahead_differences.csv", differences)
    in_time = equal_time(curves, later)
    tabular.write_csv(output_dir / "ahead_equal_time.csv", in_time)
    for lines in tables(curves, later):
        print(*lines, "", sep="\n")
    style.save(draw(curves, later), output_dir / "ahead.png")
    return compare.fair_each(curves, {f"{AXIS}={k}": named for k, named in runs.items()})


def measured(sweep: Sweep, quick: bool) -> tuple[dict[str, Named], Curves]:
    """The runs by k, then algorithm."""
    rates = fig2.tune(sweep, NAMES, quick).rates
    kept = STALENESS[:: 4 if quick else 1]
    runs = {str(k): fig2.points(rates, quick, **({AXIS: k} if k else {})) for k in kept}
    return runs, sweep.curves(compare.every_point(runs))


def tables(curves: Curves, later: Mapping[str, Named]) -> list[list[str]]:
    """Markdown: where the runs end, what each k changes, and after equal time."""
    found = (levels(curves, later), changes(curves, later), equal_time(curves, later))
    return [compare.markdown(rows) for rows in found]


def step_time(k: str) -> float:
    """Of a step, in updates, where generation takes as long as one: both in turn, or side by
    side."""
    return 2.0 if k == "0" else 1.0


def levels(curves: Curves, later: Mapping[str, Named]) -> list[Row]:
    """Where the runs end, after equally many updates."""
    return [
        {"algorithm": name, **row}
        for name, named in later.items()
        for row in compare.level_rows(curves, named, MEASURES, AXIS)
    ]


def changes(curves: Curves, later: Mapping[str, Named]) -> list[Row]:
    """What each k differs in from k = 0, seed by seed."""
    return [
        {"algorithm": name, **row}
        for name, named in later.items()
        for row in compare.difference_rows(curves, named, "0", MEASURES, AXIS)
    ]


def equal_time(curves: Curves, later: Mapping[str, Named]) -> list[Row]:
    """Held-out reward, sampled, where generation takes as long as an update: k = 0 has then made
    half as many updates as the others."""
    rows: list[Row] = []
    for name, named in later.items():
        cells: dict[str, object] = {"algorithm": name}
        for k, points in named.items():
            found = []
            for one in points:
                curve = curves[one]
                reached = curve[-1]["step"] / step_time(k)
                at = min(curve, key=lambda mark: abs(mark["step"] - reached))
                found.append(at["eval_reward"])
            cells[f"k = {k}"] = str(compare.interval(found))
        rows.append(cells)
    return rows


@style.sheet()
def draw(curves: Curves, later: Mapping[str, Named]) -> Figure:
    """Held-out reward against updates (left) and against time (right), a row an algorithm."""
    figure, grid = style.panels(2 * len(later), sharey=True)
    places = iter(grid)
    for name, named in later.items():
        for timed, x in ((False, "updates"), (True, "time, in updates")):
            axes = next(places)
            for k, points in named.items():
                shown = Algorithm(f"k = {k}", COLOURS[k], "-", {})
                every = step_time(k) if timed else 1.0
                placed = {
                    one: [{**mark, "step": every * mark["step"]} for mark in curves[one]]
                    for one in points
                }
                compare.draw_curve(axes, placed, points, "eval_reward", shown)
            axes.set(title=f"{ALGORITHMS[name].label}: held-out, sampled", xlabel=x)
            last = max(curves[one][-1]["step"] for one in named["0"])
            axes.set_xlim(0, last * 1.02)
    style.finish(figure, note=compare.OVER_SEEDS)
    return figure
