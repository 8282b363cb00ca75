"""Beyond the paper: six questions about AGRO's losses, each a table and a plot.

Where the on-policy term helps and where it harms, by prompt and by what is trained on, how
staleness hurts, what recorded data beside fresh ones buy, whose probability the taper should know,
and how large a group should be.
Everything not named is as in Figure 2, whose learning rates three of them share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from agro_train.experiments import compare, fig2, fig5, tabular
from agro_train.experiments.compare import ALGORITHMS, Curves, Named, Tuned
from agro_train.experiments.language import RECORDED
from agro_train.experiments.sweep import Sweep
from agro_train.experiments.tabular import Claim, Row
from agro_train.watch import style

MEASURES = {
    "eval_accuracy": "greedy",
    "eval_reward": "sampled",
    "eval_below": "sampled, below 1/2",
    "eval_above": "sampled, above 1/2",
    "eval_kl": "KL",
}


@dataclass(frozen=True)
class Question:
    """A setting that is varied for some algorithms, all else equal."""

    axis: str  # what is varied
    names: Sequence[str]  # algorithms; the others are compared with the first
    values: Mapping[str, Mapping[str, object]]  # label -> settings
    baseline: str | None  # the value that the others are compared with, if they can be
    measures: Mapping[str, str] = field(default_factory=lambda: MEASURES)
    tuned: bool = False  # learning rates at each value; else those that fig2 found for all


def mixed(fresh: int, fraction: float) -> dict[str, object]:
    """A step of `fresh` groups of the policy's own, and recorded ones for the rest."""
    prompts = round(fresh / (1 - fraction))
    recorded = {"recorded": RECORDED, "recorded_fraction": fraction} if fraction else {}
    return {"prompts_per_step": prompts, **recorded}


def stale(steps: int) -> dict[str, object]:
    """Samples of a policy up to `steps` updates old: a fresh batch, then as often again."""
    return {"replay_fraction": 1.0, "replay_max_staleness": steps} if steps else {}


FRESH_GROUPS = 4  # a step
SAMPLES = 128  # a step, whatever the group size

QUESTIONS = {
    "pass_rate": Question(
        "pass rate at the start",
        ("agro", "on_policy_small", "on_policy_capped", "on_policy"),
        {"all prompts": {}},
        None,
        {f"eval_bin{i}": f"{i / 5:g} to {(i + 1) / 5:g}" for i in range(5)},
    ),
    "prompts": Question(
        "prompts trained on",
        ("agro", "on_policy_capped", "on_policy"),
        {"easy": {"data": "graded-sums-easy"}, "hard": {"data": "graded-sums-hard"}},
        None,
        {"eval_accuracy": "greedy", "eval_reward": "sampled", "eval_kl": "KL"},
        tuned=True,
    ),
    "staleness": Question(
        "most updates between sampling and learning",
        ("pg_k2", "agro", "on_policy_capped", "agro_tapered", "agro_one_sided"),
        {str(steps): stale(steps) for steps in (0, 1, 4, 20)},
        "0",
    ),
    "mixing": Question(
        f"share of recorded groups beside {FRESH_GROUPS} fresh ones a step",
        ("pg_k2", "agro", "agro_tapered"),
        {f"{fraction:g}": mixed(FRESH_GROUPS, fraction) for fraction in (0.0, 0.5, 0.9)},
        "0",
        tuned=True,
    ),
    "sampler": Question(
        "the taper's ratio is to",
        ("agro_tapered",),
        {
            "the sampler": fig5.EARLIER,
            "the reference": {**fig5.EARLIER, "off_policy_taper_against": "reference"},
        },
        "the sampler",
        tuned=True,
    ),
    "group_size": Question(
        f"completions of a prompt, of {SAMPLES} a step",
        ("agro", "on_policy_capped"),
        {str(n): {"num_generations": n, "prompts_per_step": SAMPLES // n} for n in (2, 4, 8, 16)},
        "8",
    ),
}


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """Writes beyond_QUESTION.csv and .png for each; quick: its first and last value alone."""
    sweep = Sweep(output_dir, quick)
    claims: list[Claim] = []
    for name, question in QUESTIONS.items():
        tuned, runs, curves = measured(sweep, question, quick)
        rows = statements(curves, question, runs)
        tabular.write_csv(output_dir / f"beyond_{name}.csv", rows)
        if question.tuned:
            compare.report_tuning(output_dir / f"beyond_{name}_learning_rates.csv", tuned)
        for lines in tables(curves, question, runs):
            print(*lines, "", sep="\n")
        style.save(draw(curves, question, runs), output_dir / f"beyond_{name}.png")
        claims += compare.fair_each(curves, {f"{name}, {value}": n for value, n in runs.items()})
    return claims


def measured(
    sweep: Sweep, question: Question, quick: bool
) -> tuple[dict[str, Tuned], dict[str, Named], Curves]:
    """Learning rates by value, and the runs at the chosen ones."""
    tuned = {
        value: fig2.tune(sweep, question.names, quick, **(settings if question.tuned else {}))
        for value, settings in question.values.items()
    }
    runs = points(question, {value: found.rates for value, found in tuned.items()}, quick)
    return tuned, runs, sweep.curves(compare.every_point(runs))


def points(
    question: Question, rates: Mapping[str, Mapping[str, float]], quick: bool
) -> dict[str, Named]:
    """By value, then algorithm; so are the learning rates."""
    values = list(question.values)
    kept = dict.fromkeys([question.baseline or values[-1], values[-1]]) if quick else values
    names = question.names[: 2 if quick else None]
    return {
        value: fig2.points(
            {name: rates[value][name] for name in names}, quick, **question.values[value]
        )
        for value in kept
    }


def by_value(runs: Mapping[str, Named], name: str) -> Named:
    return {value: named[name] for value, named in runs.items()}


def names_of(runs: Mapping[str, Named]) -> list[str]:
    return list(next(iter(runs.values())))


def statements(curves: Curves, question: Question, runs: Mapping[str, Named]) -> list[Row]:
    """For the CSV: levels' differences, between algorithms at each value and between values for
    each algorithm."""
    first, *_ = names_of(runs)
    rows: list[Row] = [
        {"compared": "algorithms", "at": value, **row}
        for value, named in runs.items()
        for row in compare.statement_rows(curves, named, first, question.measures)
    ]
    if question.baseline is not None:
        rows += [
            {"compared": question.axis, "at": name, **row}
            for name in names_of(runs)
            for row in compare.statement_rows(
                curves, by_value(runs, name), question.baseline, question.measures
            )
        ]
    return rows


def tables(curves: Curves, question: Question, runs: Mapping[str, Named]) -> list[list[str]]:
    """Markdown: where the runs end, what algorithms differ in, and what values differ in."""
    first, *_ = names_of(runs)
    measures = question.measures
    levels: list[Row] = []
    algorithms: list[Row] = []
    values: list[Row] = []
    for value, named in runs.items():
        label = {question.axis: value}
        levels += [{**label, **row} for row in compare.level_rows(curves, named, measures)]
        if question.baseline is None:
            levels.append({**label, **compare.start_row(curves, named, measures)})
        algorithms += [
            {**label, **row} for row in compare.difference_rows(curves, named, first, measures)
        ]
    if question.baseline is not None:
        for name in names_of(runs):
            values += [
                {"algorithm": name, **row}
                for row in compare.difference_rows(
                    curves, by_value(runs, name), question.baseline, measures, question.axis
                )
            ]
    return [compare.markdown(rows) for rows in (levels, algorithms, values) if rows]


@style.sheet()
def draw(curves: Curves, question: Question, runs: Mapping[str, Named]) -> Figure:
    """Where runs end, mean over seeds with its 95 % interval: against the value, one panel a
    measure; or against the measure, where there is one value."""
    measures, names = question.measures, names_of(runs)
    if len(runs) == 1:
        (named,) = runs.values()
        panels = {question.axis: (list(measures.values()), [(named, m) for m in measures])}
    else:
        panels = {
            label: (list(runs), [(named, measure) for named in runs.values()])
            for measure, label in measures.items()
        }
    alone = len(panels) == 1
    figure, grid = style.panels(len(panels), columns=1 if alone else 2, row=4.0 if alone else 2.7)
    for axes, (title, (ticks, places)) in zip(grid, panels.items(), strict=True):
        for number, name in enumerate(names):
            found = [
                compare.interval(compare.values_of(curves, named[name], measure))
                for named, measure in places
            ]
            places_of_name = [i + 0.06 * (number - len(names) / 2) for i in range(len(ticks))]
            compare.draw_intervals(axes, ALGORITHMS[name], places_of_name, found)
        if question.baseline is None:
            starts = [compare.start_of(curves, named, measure) for named, measure in places]
            axes.plot(range(len(ticks)), starts, ":", color=style.GREY, label="at the start")
        axes.set_xticks(range(len(ticks)), ticks)
        if alone:
            axes.set(title="held-out reward, sampled", xlabel=title)
        else:
            axes.set_title(title)
        axes.set_ylim(bottom=0)
    across = "" if alone else f"{question.axis}\n"
    style.finish(figure, note=f"{across}{compare.INTERVALS}")
    return figure
