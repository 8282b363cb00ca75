"""Numbers of the paper's experiments, from what `agro reproduce` left in docs/experiments/results.

Nothing is run: a table is made of the committed curves as `agro reproduce` makes it. What a marker
names of the experiments with a language model: `at`, which runs (fig2, fig4/own/0.1,
fig5/reference/0.001, beyond/staleness/4, ahead/8, smollm2, offline), `of`, an algorithm, and
`measure`, a column of language_curves.csv or `regularised`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean, median

import torch

from agro_train.experiments import (
    ahead,
    beyond,
    compare,
    fig1,
    fig2,
    fig4,
    fig5,
    offline,
    smollm2,
    tabular,
)
from agro_train.experiments.compare import Curves, Named
from agro_train.experiments.landscape import speed
from agro_train.experiments.language import Curve, Point
from agro_train.experiments.sweep import Sweep
from benchmarks.measure.rows import read_csv
from benchmarks.pages.markers import Numbers, Query, Table

RESULTS = Path(__file__).parents[2] / "docs" / "experiments" / "results"


class Committed(Sweep):
    """The runs that are in the folder, and no others."""

    @cached_property
    def known(self) -> dict[Point, Curve]:
        return self._known()

    def curves(self, points: Iterable[Point]) -> dict[Point, Curve]:
        wanted = list(points)
        missing = [one for one in wanted if one not in self.known]
        if missing:
            raise ValueError(
                f"{self.curves_path}: expected a run for each number of the page, got none of "
                f"{missing[0].command} and {len(missing) - 1} more; run `agro reproduce`"
            )
        return {one: self.known[one] for one in wanted}


@cache
def committed() -> Committed:
    return Committed(RESULTS, quick=False)


# --- Tables ---------------------------------------------------------------------------------------


@cache
def printed(figure: str) -> list[list[str]]:
    """The tables of a figure, in the order in which `agro reproduce` prints them."""
    sweep = committed()
    if figure == "fig2":
        tuned, named, curves = fig2.measured(sweep, quick=False)
        return [compare.tuning_table({fig2.SETTING: tuned}), *fig2.tables(curves, named)]
    if figure == "fig4":
        at_settings, settings, curves, best = fig4.measured(sweep, quick=False)
        return [compare.tuning_table(at_settings), *fig4.tables(curves, settings, best)]
    if figure == "fig5":
        at_settings, of_settings, curves = fig5.measured(sweep, quick=False)
        return [compare.tuning_table(at_settings), *fig5.tables(curves, of_settings)]
    if figure == "ahead":
        runs, curves = ahead.measured(sweep, quick=False)
        return ahead.tables(curves, {name: beyond.by_value(runs, name) for name in ahead.NAMES})
    if figure in ("smollm2", "offline"):
        named, curves = _of_the_real_model(figure)
        return smollm2.tables(curves, named)
    question = beyond.QUESTIONS[figure.removeprefix("beyond/")]
    tuned_at, runs, curves = beyond.measured(sweep, question, quick=False)
    first = [compare.tuning_table(tuned_at)] if question.tuned else []
    return [*first, *beyond.tables(curves, question, runs)]


def _of_the_real_model(figure: str) -> tuple[Named, Curves]:
    named = (
        offline.points(quick=False)
        if figure == "offline"
        else smollm2.points(smollm2.NAMES, quick=False)
    )
    return named, committed().curves([one for each in named.values() for one in each])


def language(query: Query) -> list[str]:
    """One of a figure's tables: `of`, the figure, `number`, from 1."""
    (figure,), (number,) = query["of"], query["number"]
    return printed(figure)[int(number) - 1]


def fig1_table(_: Query) -> list[str]:
    return compare.markdown(fig1.summary_rows(_fig1()))


def _fig1() -> fig1.Curves:
    found: dict[tuple[str, float, str], list[float]] = {}
    for row in read_csv(RESULTS / "fig1_final.csv"):
        key = (row["updates"], float(row["beta"]), row["form"])
        found.setdefault(key, []).append(float(row["relative_kl"]))
    return {key: torch.tensor([each], dtype=torch.float64) for key, each in found.items()}


def basin_table(_: Query) -> list[str]:
    return compare.markdown(read_csv(RESULTS / "landscape_basin.csv"))


def speed_table(_: Query) -> list[str]:
    return compare.markdown(speed.summary(_needed()))


def _needed() -> dict[tuple[int, float, str], list[int | None]]:
    found: dict[tuple[int, float, str], list[int | None]] = {}
    for row in read_csv(RESULTS / "landscape_speed.csv"):
        key = (int(row["arms"]), float(row["beta"]), row["method"])
        found.setdefault(key, []).append(int(row["updates"]) if row["updates"] else None)
    return found


def ahead_means(_: Query) -> list[str]:
    """Held-out reward by staleness, and after equal time without any."""
    titles = {
        "agro_tapered": "AGRO, tapered (the default)",
        "agro": "AGRO as published",
        "pg_k2": "policy gradient, KL by k2",
    }
    runs, curves = ahead.measured(committed(), quick=False)
    later = {name: beyond.by_value(runs, name) for name in titles}
    in_time = {row["algorithm"]: str(row["k = 0"]) for row in ahead.equal_time(curves, later)}
    rows: list[tabular.Row] = []
    for name, title in titles.items():
        means = {
            k
            if k != "0"
            else "k = 0": f"{fmean(compare.values_of(curves, each, 'eval_reward')):.2f}"
            for k, each in later[name].items()
        }
        equal = f"{float(in_time[name].split()[0]):.2f}"
        rows.append({"": title, **means, "k = 0, equal time": equal})
    return compare.markdown(rows)


# --- Numbers --------------------------------------------------------------------------------------


@cache
def runs_at(at: str) -> tuple[Named, Curves]:
    """The runs of a place, by algorithm, and their curves."""
    figure, *inside = at.split("/")
    sweep = committed()
    if figure in ("smollm2", "offline"):
        return _of_the_real_model(figure)
    if figure == "fig2":
        _, named, curves = fig2.measured(sweep, quick=False)
        return named, curves
    if figure == "ahead":
        by_k, curves = ahead.measured(sweep, quick=False)
        return by_k[inside[0]], curves
    if figure == "beyond":
        question, value = inside
        _, by_value, curves = beyond.measured(sweep, beyond.QUESTIONS[question], quick=False)
        return by_value[value.replace("_", " ")], curves
    whose = {"reference": "the reference's", "earlier": "an earlier policy's", "own": fig4.OWN}
    setting = (whose[inside[0]], float(inside[1]))
    if figure == "fig4":
        _, settings, curves, _ = fig4.measured(sweep, quick=False)
        return settings[setting], curves
    _, settings, curves = fig5.measured(sweep, quick=False)
    return settings[setting], curves


def _runs(query: Query, place: str = "at", whose: str = "of") -> tuple[Sequence[Point], Curves]:
    ((at,), (name,)) = query[place], query[whose]
    named, curves = runs_at(at)
    return named[name], curves


def _measure(query: Query) -> str:
    (measure,) = query.get("measure", ["eval_reward"])
    return measure


def end(query: Query) -> list[float]:
    """The mean over the seeds."""
    return end_with_half(query)[:1]


def end_with_half(query: Query) -> list[float]:
    """And half of its 95 % interval."""
    points, curves = _runs(query)
    found = compare.interval(compare.values_of(curves, points, _measure(query)))
    return [found.mean, found.half]


def start(query: Query) -> list[float]:
    (at,) = query["at"]
    named, curves = runs_at(at)
    return [compare.start_of(curves, named, _measure(query))]


def less(query: Query) -> list[float]:
    """The mean difference within a seed."""
    return less_with_half(query)[:1]


def less_with_half(query: Query) -> list[float]:
    """And half of its 95 % interval; `than`, the other algorithm, `than_at`, where it is another
    place."""
    both = {"than_at": query["at"], "than": query["of"], **query}
    ours, curves = _runs(query)
    theirs, others = _runs(both, "than_at", "than")
    found = compare.difference({**curves, **others}, ours, theirs, _measure(query))
    return [found.mean, found.half]


def lost(query: Query) -> list[float]:
    """`less`, as what is lost."""
    return [-value for value in less(query)]


def gains(query: Query) -> list[float]:
    """From the start to the end of each seed: the least and the most that a seed gains, and the
    most that one loses."""
    points, curves = _runs(query)
    found = [curves[one][-1]["eval_reward"] - curves[one][0]["eval_reward"] for one in points]
    gained = [gain for gain in found if gain > 0]
    return [min(gained), max(gained), -min(found)]


def fig1_final(query: Query) -> list[float]:
    """The least of a form, of all runs."""
    (form,) = query["of"]
    return [min(float(kl.min()) for (*_, name), kl in _fig1().items() if name == form)]


def speed_ratio(_: Query) -> list[float]:
    """Updates of the exact gradient over the policy gradient's, where both arrive: the least and
    the most, and of how many problems of all."""
    needed = _needed()
    pairs = [
        pair
        for (arms, beta, name), counts in needed.items()
        if name == "exact"
        for pair in zip(counts, needed[arms, beta, "policy_gradient"], strict=True)
    ]
    ratios = [exact / gradient for exact, gradient in pairs if exact and gradient]
    return [min(ratios), max(ratios), len(ratios), len(pairs)]


def below_half(_: Query) -> list[float]:
    """Percent of a reported seed's held-out prompts whose pass rate at the start is below one half:
    the least and the most."""
    found = []
    named, _curves = runs_at("fig2")
    for one in next(iter(named.values())):
        rates = committed().pass_rates(one).values()
        found.append(100 * sum(rate < 0.5 for rate in rates) / len(rates))
    return [min(found), max(found)]


def took(query: Query) -> list[float]:
    """Of the runs of a `base` that sample with the weights as they are: how many there are, their
    median in seconds, and all of them in minutes, each in a thread of its own."""
    times = {
        (row["settings"], row["seed"]): float(row["time_s"])
        for row in committed().rows
        if row["base"].partition("@")[0] in query["base"] and "max_staleness" not in row["settings"]
    }
    return [len(times), median(times.values()), sum(times.values()) / 60]


def math(query: Query) -> list[float]:
    """A column of the first or last evaluation of the run on MATH."""
    (measure,), (when,) = query["measure"], query["at"]
    lines = (RESULTS / "smollm2_math_metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if measure in row]
    return [float(rows[{"start": 0, "end": -1}[when]][measure])]


def math_right(query: Query) -> list[float]:
    """How many of the held-out prompts of that run were answered rightly, as it was judged then."""
    prompts = 119
    return [prompts * math({"measure": ["eval_accuracy"], **query})[0]]


TABLES: Mapping[str, Table] = {
    "reproduce": language,
    "reproduce.fig1": fig1_table,
    "reproduce.landscape.basin": basin_table,
    "reproduce.landscape.speed": speed_table,
    "ahead.learning": ahead_means,
}

NUMBERS: Mapping[str, Numbers] = {
    "end": end,
    "end.interval": end_with_half,
    "start": start,
    "less": less,
    "less.interval": less_with_half,
    "lost": lost,
    "gains": gains,
    "fig1.low": fig1_final,
    "landscape.speed": speed_ratio,
    "starts.below": below_half,
    "took": took,
    "math": math,
    "math.right": math_right,
}
