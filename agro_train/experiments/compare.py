"""Algorithms against each other over the same seeds: learning rates, tables, noise, curves.

Two runs of one seed start from the same weights and see the same prompts in the same order, so what
is compared is the difference within a seed. A difference is larger than the noise if the 95 %
interval of its mean over the seeds (Student's t) does not hold zero. Each interval stands for
itself: of twenty such with nothing behind them, one is expected to miss zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from agro_train.experiments import tabular
from agro_train.experiments.language import Curve, Point, point
from agro_train.experiments.sweep import Sweep
from agro_train.experiments.tabular import Claim, Row
from agro_train.watch import style

# Student's t, two-sided 95 %, by degrees of freedom: from 1 to 9.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Algorithm:
    label: str
    colour: str
    stroke: str
    settings: Mapping[str, object]  # of `agro train`


# Without the taper, which acts on recorded and replayed completions alone: as in the paper.
AS_PUBLISHED: Mapping[str, object] = {"off_policy_taper": 0.0}

# Named as in the tables, with spaces.
ALGORITHMS = {
    "pg_k2": Algorithm("pg k2", style.VERMILLION, "-", {"algorithm": "pg_reward_baseline_k2"}),
    "pg_k3": Algorithm("pg k3", style.VERMILLION, "--", {"algorithm": "pg_reward_baseline_k3"}),
    "pg_no_baseline": Algorithm(
        "pg no baseline", style.ORANGE, "-", {"algorithm": "pg_no_baseline"}
    ),
    "agro": Algorithm("agro", style.OURS, "-", AS_PUBLISHED),
    "on_policy": Algorithm("on policy", style.BLACK, "-", {"lr_weight": 1.0, **AS_PUBLISHED}),
    "on_policy_small": Algorithm(
        "on policy small", style.PURPLE, "--", {"lr_weight": 0.001, **AS_PUBLISHED}
    ),
    "on_policy_capped": Algorithm(
        "on policy capped",
        style.SKY,
        "-.",
        {"lr_weight": 1.0, "lr_cap": True, **AS_PUBLISHED},
    ),
    "agro_tapered": Algorithm("agro tapered", style.GREEN, "-", {}),
    "agro_one_sided": Algorithm("agro one sided", style.GREEN, ":", {"off_policy_taper": math.inf}),
}

# What tables report: of the training samples, the mean over the last updates; the rest is of the
# held-out prompts at the end. "below" and "above" one half: by the prompt's pass rate at the start.
MEASURES = {
    "reward": "training reward",
    "eval_accuracy": "greedy",
    "eval_reward": "sampled",
    "eval_below": "sampled, below 1/2",
    "eval_above": "sampled, above 1/2",
    "eval_kl": "KL",
    "eval_entropy": "entropy",
    "regularised": "r - beta KL",
}

Named = Mapping[str, Sequence[Point]]
"""An algorithm's points, one a seed, by its name; seeds in the same order for all."""
Curves = Mapping[Point, Curve]


# --- Learning rates -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """The learning rate of each algorithm, and what the grid gave."""

    rates: Mapping[str, float]
    scores: Mapping[str, Mapping[float, float]]  # by algorithm and rate; empty: a grid of one


def tune(
    sweep: Sweep,
    variants: Mapping[str, Mapping[str, object]],
    grid: Sequence[float],
    seeds: Sequence[int],
    below: Sequence[float] = (),
) -> Tuned:
    """Each variant's best by the held-out reward less beta times the KL, at the end, mean over the
    seeds, which are none of those reported. A grid of one is not run.

    below: further rates, downwards, each for the variants whose lowest rate so far is the best.
    """
    if len(grid) == 1:
        return Tuned(dict.fromkeys(variants, grid[0]), {})
    scores: dict[str, dict[float, float]] = {name: {} for name in variants}
    open_ended = list(variants)
    for rates in (grid, *([rate] for rate in below)):
        points = {
            (name, rate): [point(seed, {**variants[name], "learning_rate": rate}) for seed in seeds]
            for name in open_ended
            for rate in rates
        }
        curves = sweep.curves(one for each in points.values() for one in each)
        for (name, rate), each in points.items():
            scores[name][rate] = fmean(values_of(curves, each, "regularised"))
        open_ended = [name for name in open_ended if _best(scores[name]) == min(scores[name])]
    return Tuned({name: _best(found) for name, found in scores.items()}, scores)


def _best(scores: Mapping[float, float]) -> float:
    return max(scores, key=lambda rate: scores[rate])


def report_tuning(path: Path, tuned: Mapping[str, Tuned]) -> None:
    """Writes what the grids of several settings gave, and prints it, chosen rates bold; nothing of
    grids of one."""
    rows: list[Row] = [
        {
            "setting": at,
            "algorithm": name,
            "learning_rate": rate,
            "regularised_reward": scores[rate],
            "chosen": "yes" if rate == found.rates[name] else "no",
        }
        for at, found in tuned.items()
        for name, scores in found.scores.items()
        for rate in sorted(scores)
    ]
    if rows:
        tabular.write_csv(path, rows)
        print(*tuning_table(tuned), "", sep="\n")


def tuning_table(tuned: Mapping[str, Tuned]) -> list[str]:
    """Markdown: what the grids of several settings gave, chosen rates bold."""
    tried = [
        (at, name, found.rates[name], scores)
        for at, found in tuned.items()
        for name, scores in found.scores.items()
    ]
    every = sorted({rate for *_, scores in tried for rate in scores})
    rows: list[Row] = []
    for at, name, chosen, scores in tried:
        texts = {rate: f"{score:.3f}" for rate, score in scores.items()}
        texts[chosen] = f"**{texts[chosen]}**"
        numbers = {f"{rate:g}": texts.get(rate, "") for rate in every}
        rows.append({"setting": at, "algorithm": name, **numbers})
    return markdown(rows)


# --- Numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval."""

    mean: float
    half: float

    @property
    def beyond_noise(self) -> bool:
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"

    def signed(self) -> str:
        """As a difference, bold where it is larger than the noise."""
        text = f"{self.mean:+.3f} ± {self.half:.3f}"
        return f"**{text}**" if self.beyond_noise else text


def interval(values: Sequence[float]) -> Interval:
    """Of two to ten values; equal ones have no width, and one that is not a number spoils it."""
    mean, count = fmean(values), len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, T_95[count - 2] * deviation / math.sqrt(count))


def value_of(curves: Curves, one: Point, measure: str) -> float:
    """At the last mark. "regularised": the held-out reward less beta times the KL, what all
    algorithms are to raise."""
    last = curves[one][-1]
    if measure == "regularised":
        return last["eval_reward"] - one.config().beta * last["eval_kl"]
    return last[measure]


def values_of(curves: Curves, points: Sequence[Point], measure: str) -> list[float]:
    return [value_of(curves, one, measure) for one in points]


def difference(
    curves: Curves, ours: Sequence[Point], theirs: Sequence[Point], measure: str
) -> Interval:
    """Of the points of the same seed."""
    assert [one.seed for one in ours] == [one.seed for one in theirs], "pairs are of one seed"
    pairs = zip(values_of(curves, ours, measure), values_of(curves, theirs, measure), strict=True)
    return interval([a - b for a, b in pairs])


# --- Tables ---------------------------------------------------------------------------------------


def level_rows(
    curves: Curves, named: Named, measures: Mapping[str, str] = MEASURES, key: str = "algorithm"
) -> list[Row]:
    """One row a name: each measure's mean over seeds ± half its 95 % interval."""
    return [
        {
            key: name,
            **{label: str(interval(values_of(curves, points, m))) for m, label in measures.items()},
        }
        for name, points in named.items()
    ]


def start_row(
    curves: Curves, named: Named, measures: Mapping[str, str] = MEASURES, key: str = "algorithm"
) -> Row:
    """A row beside those of `level_rows`: where all of them began."""
    points = next(iter(named.values()))
    values = {label: [_at_start(curves, one, m) for one in points] for m, label in measures.items()}
    cells = {label: "" if math.isnan(v[0]) else str(interval(v)) for label, v in values.items()}
    return {key: "(at the start)", **cells}


def start_of(curves: Curves, named: Named, measure: str) -> float:
    """Mean over the seeds."""
    return fmean(_at_start(curves, one, measure) for one in next(iter(named.values())))


def _at_start(curves: Curves, one: Point, measure: str) -> float:
    return curves[one][0]["eval_reward" if measure == "regularised" else measure]


def difference_rows(
    curves: Curves,
    named: Named,
    baseline: str,
    measures: Mapping[str, str] = MEASURES,
    key: str = "algorithm",
) -> list[Row]:
    """One row a name other than `baseline`: what it has more, bold where larger than the noise."""
    return [
        {
            key: f"{name} less {baseline}",
            **{
                label: difference(curves, points, named[baseline], m).signed()
                for m, label in measures.items()
            },
        }
        for name, points in named.items()
        if name != baseline
    ]


def statement_rows(
    curves: Curves, named: Named, baseline: str, measures: Mapping[str, str] = MEASURES
) -> list[Row]:
    """One row a name and measure, for a CSV: is the difference larger than the noise?"""
    rows: list[Row] = []
    for name, points in named.items():
        for measure, label in measures.items():
            if name == baseline:
                continue
            found = difference(curves, points, named[baseline], measure)
            rows.append(
                {
                    "name": name,
                    "baseline": baseline,
                    "measure": label,
                    "seeds": len(points),
                    "difference": found.mean,
                    "low": found.mean - found.half,
                    "high": found.mean + found.half,
                    "larger_than_noise": "yes" if found.beyond_noise else "no",
                }
            )
    return rows


def statements(
    curves: Curves,
    settings: Mapping[Any, Named],
    columns: Sequence[str],
    baseline: str,
    measures: Mapping[str, str] = MEASURES,
) -> list[Row]:
    """`statement_rows` of several settings, what each setting is in columns before them."""
    return [
        {**dict(zip(columns, setting, strict=True)), **row}
        for setting, named in settings.items()
        for row in statement_rows(curves, named, baseline, measures)
    ]


def every_point(settings: Mapping[Any, Named]) -> list[Point]:
    return [one for named in settings.values() for each in named.values() for one in each]


def markdown(rows: Sequence[Row]) -> list[str]:
    """The lines of a table."""
    names = list(rows[0])
    body = ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *body]


def fair(curves: Curves, points: Sequence[Point]) -> list[Claim]:
    """That the comparison is one: the same updates and samples, the same model at the start."""
    ends = {
        (c[-1]["step"], c[-1]["learned"], c[-1]["sampled"]) for c in (curves[p] for p in points)
    }
    starts: dict[int, set[tuple[float, ...]]] = {}
    for one in points:
        first = curves[one][0]
        measured = (first["eval_accuracy"], first["eval_reward"], first["eval_entropy"])
        starts.setdefault(one.seed, set()).add((*measured, first["eval_kl"]))
    return [
        Claim(
            "every run took the same number of updates, learned from and sampled as many "
            f"completions ({', '.join(f'{u:.0f}, {n:.0f}, {s:.0f}' for u, n, s in sorted(ends))})",
            len(ends) == 1,
        ),
        Claim(
            "every run of a seed started from the same model, its reference",
            all(len(found) == 1 and found.pop()[-1] == 0.0 for found in starts.values()),
        ),
    ]


def fair_each(curves: Curves, settings: Mapping[str, Named]) -> list[Claim]:
    """`fair` within each of the settings; they may differ from each other."""
    return [
        Claim(f"{setting}: {claim.text}", claim.holds)
        for setting, named in settings.items()
        for claim in fair(curves, [one for each in named.values() for one in each])
    ]


# --- Plots ----------------------------------------------------------------------------------------


OVER_SEEDS = "line: mean over seeds, band: lowest to highest"
INTERVALS = "mean over seeds with its 95 % interval"


def draw_curve(
    axes: Axes, curves: Curves, points: Sequence[Point], measure: str, shown: Algorithm
) -> None:
    """Mean over the seeds against updates, with a band from the lowest to the highest."""
    runs = [curves[one] for one in points]
    rows = [row for row in zip(*runs, strict=True) if row[0][measure] == row[0][measure]]
    steps = [row[0]["step"] for row in rows]
    values = [[mark[measure] for mark in row] for row in rows]
    axes.plot(
        steps,
        [fmean(v) for v in values],
        shown.stroke,
        color=shown.colour,
        marker="o",
        markersize=3.5,
        label=shown.label,
    )
    axes.fill_between(
        steps,
        [min(v) for v in values],
        [max(v) for v in values],
        color=shown.colour,
        alpha=style.BAND,
        linewidth=0,
    )


def draw_intervals(
    axes: Axes,
    shown: Algorithm,
    x: Sequence[float],
    y: Sequence[Interval],
    x_halves: Sequence[float] | None = None,
) -> None:
    """Means over the seeds with their 95 % intervals; x_halves: half of those of x."""
    axes.errorbar(
        x,
        [one.mean for one in y],
        xerr=x_halves,
        yerr=[one.half for one in y],
        color=shown.colour,
        linestyle=shown.stroke,
        marker="o",
        label=shown.label,
    )
