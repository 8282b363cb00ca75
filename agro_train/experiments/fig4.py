"""Figure 4: how much reward for how much KL, on and off policy.

Each algorithm at several betas, from its own samples and from fixed generations of the reference;
where it ends after as many updates as in Figure 2. Beside it what is possible: the optimum
pi_ref * exp(r / beta) / Z has, of all policies, the most reward for its KL, and for 0/1 rewards it
is known from the reference's pass rates.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from agro_train.experiments import compare, fig2, fig5, tabular
from agro_train.experiments.compare import ALGORITHMS, Curves, Named, Tuned
from agro_train.experiments.language import Point, start_samples
from agro_train.experiments.sweep import Sweep
from agro_train.experiments.tabular import Claim, Row
from agro_train.watch import style

BETAS = (0.001, 0.1, 0.3)
ON_POLICY = ("pg_k2", "agro", "on_policy", "on_policy_capped")
OFF_POLICY = ("pg_k2", "agro", "agro_tapered")  # on the reference's generations
BASELINE = "pg_k2"
# Learning rates are tuned at each beta on each kind of samples; seeds and grid are fig2's.

MEASURES = {
    "eval_reward": "held-out, sampled",
    "eval_kl": "KL, nats a completion",
    "regularised": "r - beta KL",
}
OWN, REFERENCES = "own", "the reference's"
KINDS: Mapping[str, Mapping[str, object]] = {OWN: {}, REFERENCES: fig5.REFERENCE}
Setting = tuple[str, float]  # samples, beta


class Tradeoff(NamedTuple):
    kl: float  # nats a completion
    reward: float


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """Writes fig4_learning_rates.csv, fig4_points.csv, fig4_differences.csv and fig4.png."""
    tuned, settings, curves, best = measured(Sweep(output_dir, quick), quick)
    compare.report_tuning(output_dir / "fig4_learning_rates.csv", tuned)
    tabular.write_csv(output_dir / "fig4_points.csv", point_rows(curves, settings, best))
    differences = compare.statements(curves, settings, ("samples", "beta"), BASELINE, MEASURES)
    tabular.write_csv(output_dir / "fig4_differences.csv", differences)
    for lines in tables(curves, settings, best):
        print(*lines, "", sep="\n")
    style.save(draw(curves, settings, best), output_dir / "fig4.png")
    return compare.fair_each(curves, {_label(setting): each for setting, each in settings.items()})


def measured(
    sweep: Sweep, quick: bool
) -> tuple[dict[str, Tuned], dict[Setting, Named], Curves, dict[float, Tradeoff]]:
    """Learning rates by setting, the runs at the chosen ones, and the optimum by beta."""
    tuned = {
        (kind, beta): fig2.tune(sweep, names, quick, beta=beta, **KINDS[kind])
        for beta in BETAS[: 2 if quick else None]
        for kind, names in {OWN: OFF_POLICY if quick else ON_POLICY, REFERENCES: OFF_POLICY}.items()
    }
    settings = {setting: points(setting, found.rates, quick) for setting, found in tuned.items()}
    every = compare.every_point(settings)
    curves = sweep.curves(every)
    starts = {one.seed: sweep.pass_rates(one) for one in every}
    rates = torch.tensor([rate for found in starts.values() for rate in found.values()])
    count = start_samples(every[0].config())
    best = {beta: optimum(rates, count, beta) for beta in frontier()}
    return {_label(at): found for at, found in tuned.items()}, settings, curves, best


def points(setting: Setting, rates: Mapping[str, float], quick: bool) -> Named:
    return fig5.points(setting, rates, quick, KINDS)


def _label(setting: Setting) -> str:
    kind, beta = setting
    return f"{kind} samples, beta {beta:g}"


def optimum(rates: Tensor, count: int, beta: float) -> Tradeoff:
    """Means over prompts of the KL and reward of pi_ref * exp(r / beta) / Z for 0/1 rewards.

    rates: (P,) the reference's share of passes among `count` completions of each prompt; a share of
    none or all is taken as half a completion off.
    """
    before = (rates.double() * count + 0.5) / (count + 1)
    log_odds = before.logit() + 1 / beta
    after, failed = log_odds.sigmoid(), (-log_odds).sigmoid()
    kl = torch.xlogy(after, after / before) + torch.xlogy(failed, failed / (1 - before))
    return Tradeoff(float(kl.mean()), float(after.mean()))


def frontier() -> list[float]:
    """The betas of the curve of what is possible."""
    return sorted({*BETAS, *(10 ** (exponent / 10) for exponent in range(-20, 11))})


def point_rows(
    curves: Curves, settings: Mapping[Setting, Named], best: Mapping[float, Tradeoff]
) -> list[Row]:
    """One row a run at its end, and one a beta of the optimum."""
    rows: list[Row] = [
        {
            "samples": samples,
            "beta": beta,
            "algorithm": name,
            "seed": one.seed,
            **{m: compare.value_of(curves, one, m) for m in MEASURES},
        }
        for (samples, beta), named in settings.items()
        for name, each in named.items()
        for one in each
    ]
    rows += [
        {
            "samples": "",
            "beta": beta,
            "algorithm": "optimum",
            "seed": "",
            "eval_reward": at.reward,
            "eval_kl": at.kl,
            "regularised": at.reward - beta * at.kl,
        }
        for beta, at in best.items()
    ]
    return rows


def tables(
    curves: Curves, settings: Mapping[Setting, Named], best: Mapping[float, Tradeoff]
) -> list[list[str]]:
    """Markdown, for each kind of samples: where the algorithms end beside the optimum, and their
    differences."""
    found = []
    for kind in dict.fromkeys(samples for samples, _ in settings):
        levels: list[Row] = []
        differences: list[Row] = []
        for (samples, beta), named in settings.items():
            if samples != kind:
                continue
            at = best[beta]
            values = (at.reward, at.kl, at.reward - beta * at.kl)
            levels += [
                {"beta": f"{beta:g}", **row}
                for row in compare.level_rows(curves, named, MEASURES, f"{kind} samples")
            ]
            levels.append(
                {"beta": f"{beta:g}", f"{kind} samples": "optimum"}
                | {label: f"{v:.3f}" for label, v in zip(MEASURES.values(), values, strict=True)}
            )
            differences += [
                {"beta": f"{beta:g}", **row}
                for row in compare.difference_rows(
                    curves, named, BASELINE, MEASURES, f"{kind} samples"
                )
            ]
        found += [compare.markdown(levels), compare.markdown(differences)]
    return found


@style.sheet()
def draw(
    curves: Curves, settings: Mapping[Setting, Named], best: Mapping[float, Tradeoff]
) -> Figure:
    """Reward against KL, one panel a kind of samples; a line joins an algorithm's betas."""
    kinds = list(dict.fromkeys(samples for samples, _ in settings))
    figure, all_axes = style.panels(len(kinds), row=3.6, sharey=True, sharex=True)
    for kind, axes in zip(kinds, all_axes, strict=True):
        axes.plot(
            [best[beta].kl for beta in sorted(best, reverse=True)],
            [best[beta].reward for beta in sorted(best, reverse=True)],
            color=style.GREY,
            linewidth=1.2,
            label="optimum",
        )
        names = list(
            dict.fromkeys(n for (s, _), named in settings.items() if s == kind for n in named)
        )
        for name in names:
            _draw_ends(
                axes,
                curves,
                {
                    beta: settings[kind, beta][name]
                    for beta in sorted((b for s, b in settings if s == kind), reverse=True)
                },
                name,
            )
        axes.set(title=f"{kind} samples", xlabel="KL, nats a completion")
        axes.margins(y=0.1)
    for places in _near({beta: best[beta] for _, beta in settings}):
        text = f"beta {', '.join(f'{beta:g}' for beta in places)}"
        at = best[places[0]]
        for axes in all_axes:
            axes.plot(*at, ".", color=style.GREY, markersize=9)
            axes.annotate(
                text, at, (-6, 4), textcoords="offset points", ha="right", color=style.GREY
            )
    all_axes[0].set_ylabel("held-out reward, sampled")
    style.finish(figure, note="a line joins an algorithm's betas; bars: 95 % intervals")
    return figure


def _near(places: Mapping[float, Tradeoff]) -> list[list[float]]:
    """Betas in groups that one label serves."""
    found: dict[tuple[float, float], list[float]] = {}
    for beta, at in places.items():
        found.setdefault((round(at.kl, 1), round(at.reward, 1)), []).append(beta)
    return list(found.values())


def _draw_ends(
    axes: Axes, curves: Curves, by_beta: Mapping[float, Sequence[Point]], name: str
) -> None:
    """Mean over seeds at each beta, with the 95 % intervals of both."""
    kls = [
        compare.interval(compare.values_of(curves, each, "eval_kl")) for each in by_beta.values()
    ]
    rewards = [
        compare.interval(compare.values_of(curves, each, "eval_reward"))
        for each in by_beta.values()
    ]
    compare.draw_intervals(
        axes, ALGORITHMS[name], [kl.mean for kl in kls], rewards, [kl.half for kl in kls]
    )
