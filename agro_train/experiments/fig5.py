"""Figure 5: learning from data that the policy does not make. Does AGRO learn more from it?

Two kinds of data: generations of the reference, fixed before training (the offline case), and
generations of an earlier policy, sampled anew every 21st update and learned from until then. Six
losses on them at the paper's beta of 0.001, and on the reference's at 0.1, where the KL has a say.

AGRO's off-policy loss is the policy gradient with the mean of the whole R as baseline. Tapered, it
pushes a completion down only as far as the policy still gives it what its sampler gave it;
one-sided, it pushes none down. Both are this project's, not the paper's. Forms of the policy
gradient that read the sampler's log-probabilities ("stale", "importance_weighted") are not in the
trainer: they are in Figure 1.
"""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from agro_train.experiments import compare, fig2, tabular
from agro_train.experiments.compare import ALGORITHMS, Curves, Named, Tuned
from agro_train.experiments.language import RECORDED
from agro_train.experiments.sweep import Sweep
from agro_train.experiments.tabular import Claim
from agro_train.watch import style

NAMES = ("pg_k2", "pg_k3", "pg_no_baseline", "agro", "agro_tapered", "agro_one_sided")
BASELINE = "pg_k2"
REFERENCE: Mapping[str, object] = {"recorded": RECORDED}
EARLIER: Mapping[str, object] = {"replay_fraction": 1.0, "replay_max_staleness": 20}
DATA = {"the reference's": REFERENCE, "an earlier policy's": EARLIER}
SETTINGS = (("the reference's", 0.001), ("the reference's", 0.1), ("an earlier policy's", 0.001))
# Learning rates are tuned in each setting; seeds and grid are fig2's.

PANELS = {"eval_reward": "held-out, sampled", "eval_kl": "KL to the reference, nats"}
Setting = tuple[str, float]  # whose data, beta


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """Writes fig5_learning_rates.csv, fig5_differences.csv and fig5.png."""
    tuned, settings, curves = measured(Sweep(output_dir, quick), quick)
    compare.report_tuning(output_dir / "fig5_learning_rates.csv", tuned)
    differences = compare.statements(curves, settings, ("data", "beta"), BASELINE)
    tabular.write_csv(output_dir / "fig5_differences.csv", differences)
    for lines in tables(curves, settings):
        print(*lines, "", sep="\n")
    style.save(draw(curves, settings), output_dir / "fig5.png")
    return compare.fair_each(curves, {_label(setting): each for setting, each in settings.items()})


def measured(sweep: Sweep, quick: bool) -> tuple[dict[str, Tuned], dict[Setting, Named], Curves]:
    """Learning rates by setting, and the runs at the chosen ones."""
    tuned = {setting: tune(sweep, setting, quick) for setting in SETTINGS[:: 2 if quick else 1]}
    settings = {setting: points(setting, found.rates, quick) for setting, found in tuned.items()}
    curves = sweep.curves(compare.every_point(settings))
    return {_label(at): found for at, found in tuned.items()}, settings, curves


def tune(sweep: Sweep, setting: Setting, quick: bool) -> Tuned:
    """Learning rates; quick: of two algorithms."""
    data, beta = setting
    names = (BASELINE, "agro") if quick else NAMES
    return fig2.tune(sweep, names, quick, beta=beta, **DATA[data])


def points(
    setting: Setting,
    rates: Mapping[str, float],
    quick: bool,
    kinds: Mapping[str, Mapping[str, object]] = DATA,
) -> Named:
    """The runs in a setting, whose data is one of `kinds`."""
    data, beta = setting
    return fig2.points(rates, quick, beta=beta, **kinds[data])


def _label(setting: Setting) -> str:
    data, beta = setting
    return f"{data} data, beta {beta:g}"


def tables(curves: Curves, settings: Mapping[Setting, Named]) -> list[list[str]]:
    """Markdown, for each setting: where the algorithms end, and their differences."""
    measures = {k: v for k, v in compare.MEASURES.items() if k != "reward"}  # it is the data's
    found = []
    for (data, beta), named in settings.items():
        key = f"{data}, beta {beta:g}"
        levels = compare.level_rows(curves, named, measures, key)
        start = compare.start_row(curves, named, measures, key)
        found.append(compare.markdown([*levels, start]))
        found.append(
            compare.markdown(compare.difference_rows(curves, named, BASELINE, measures, key))
        )
    return found


@style.sheet()
def draw(curves: Curves, settings: Mapping[Setting, Named]) -> Figure:
    """One row of panels for each setting, one column for each measure."""
    figure, grid = style.panels(
        len(settings) * len(PANELS), columns=len(PANELS), row=3.0, sharey="col"
    )
    places = iter(grid)
    for (data, beta), named in settings.items():
        for measure, label in PANELS.items():
            axes = next(places)
            for name, each in named.items():
                compare.draw_curve(axes, curves, each, measure, ALGORITHMS[name])
            axes.set(title=f"{data}, beta {beta:g}:\n{label}", xlabel="updates")
    for axes in grid:  # last: it ends the scaling that panels of a column share
        axes.set_ylim(bottom=0)
    style.finish(figure, note=compare.OVER_SEEDS)
    return figure
