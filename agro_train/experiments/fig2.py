"""Figures 2 and 3: learning from the policy's own samples, against a policy gradient.

Training reward (Figure 2) and held-out evaluation (Figure 3) of a policy gradient, AGRO's
off-policy loss on on-policy samples, and AGRO's on-policy loss with its likelihood-ratio term at
full weight, small, and capped; beta = 0.001 as in the paper.

With the mean of the whole R as baseline the policy gradient is AGRO's off-policy loss, number by
number, so it is not run twice. The form here has its baseline on r and the KL beside it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from agro_train.experiments import compare, tabular
from agro_train.experiments.compare import ALGORITHMS, Curves, Named, Tuned
from agro_train.experiments.language import QUICK, point
from agro_train.experiments.sweep import Sweep
from agro_train.experiments.tabular import Claim
from agro_train.watch import style

NAMES = ("pg_k2", "agro", "on_policy", "on_policy_small", "on_policy_capped")
BASELINE = "pg_k2"
SETTING = "own samples"  # as the table of learning rates calls it
SEEDS = range(5)
TUNING_SEEDS = (100, 101)
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
LOWER = (1e-5,)  # for those that are best at the lowest

PANELS = {
    "fig2": {
        "reward": "mean reward, training samples",
        "eval_kl": "KL to the reference, nats a completion",
        "eval_entropy": "entropy, nats a token",
    },
    "fig3": {
        "eval_accuracy": "held-out, greedy",
        "eval_reward": "held-out, sampled",
        "eval_below": "sampled, pass rate below 1/2 at the start",
        "eval_above": "sampled, pass rate above 1/2 at the start",
    },
}


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """Writes fig2_learning_rates.csv, fig2_differences.csv, fig2.png and fig3.png."""
    tuned, named, curves = measured(Sweep(output_dir, quick), quick)
    compare.report_tuning(output_dir / "fig2_learning_rates.csv", {SETTING: tuned})
    tabular.write_csv(
        output_dir / "fig2_differences.csv", compare.statement_rows(curves, named, BASELINE)
    )
    for lines in tables(curves, named):
        print(*lines, "", sep="\n")
    for name, panels in PANELS.items():
        style.save(draw(curves, named, panels), output_dir / f"{name}.png")
    return compare.fair(curves, [one for each in named.values() for one in each])


def measured(sweep: Sweep, quick: bool) -> tuple[Tuned, Named, Curves]:
    """Learning rates, and the runs at the chosen ones."""
    tuned = tune(sweep, NAMES, quick)
    named = points(tuned.rates, quick)
    return tuned, named, sweep.curves(one for each in named.values() for one in each)


def scale(quick: bool) -> Mapping[str, object]:
    """Settings that make a run quick."""
    return QUICK if quick else {}


def seeds(quick: bool) -> Sequence[int]:
    return SEEDS[:2] if quick else SEEDS


def tune(sweep: Sweep, names: Sequence[str], quick: bool, **settings: object) -> Tuned:
    """Learning rates with these settings changed for all; quick: one that goes for all."""
    grid = LEARNING_RATES[2:3] if quick else LEARNING_RATES
    variants = {name: {**ALGORITHMS[name].settings, **scale(quick), **settings} for name in names}
    return compare.tune(sweep, variants, grid, TUNING_SEEDS, LOWER)


def points(rates: Mapping[str, float], quick: bool, **settings: object) -> Named:
    """The runs of each algorithm in `rates`, with these settings changed for all."""
    return {
        name: [
            point(
                seed,
                {
                    **ALGORITHMS[name].settings,
                    "learning_rate": rate,
                    **scale(quick),
                    **settings,
                },
            )
            for seed in seeds(quick)
        ]
        for name, rate in rates.items()
    }


def tables(curves: Curves, named: Named) -> list[list[str]]:
    """Markdown: where the algorithms end, and their differences."""
    return [
        compare.markdown([*compare.level_rows(curves, named), compare.start_row(curves, named)]),
        compare.markdown(compare.difference_rows(curves, named, BASELINE)),
    ]


@style.sheet()
def draw(curves: Curves, named: Named, panels: Mapping[str, str]) -> Figure:
    """One panel a measure, against updates."""
    figure, grid = style.panels(len(panels))
    for axes, (measure, title) in zip(grid, panels.items(), strict=True):
        for name, each in named.items():
            compare.draw_curve(axes, curves, each, measure, ALGORITHMS[name])
        axes.set(title=title, xlabel="updates")
        axes.set_ylim(bottom=0)
    style.finish(figure, note=compare.OVER_SEEDS)
    return figure
