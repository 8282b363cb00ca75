"""Figure 1: data that the policy did not make. AGRO finds the optimum; which policy gradients do?

100 arms, every sample drawn from the reference policy. The policy gradient with a KL penalty has
many customary forms, equal in expectation on the policy's own samples and not on these. Each is run
here under its name: with exact expected updates, and with sampled groups whose coefficients come
from agro_kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from agro_kernels import (
    POLICY_GRADIENT_FORMS,
    agro_coefficients,
    policy_gradient_coefficients,
)
from agro_train.experiments import tabular
from agro_train.experiments.tabular import Bandits, Claim, Direction, Groups, Row, Sampler
from agro_train.watch import style

# Label, colour and line of each curve. Names are POLICY_GRADIENT_FORMS' where it has the form.
FORMS = {
    "agro": ("AGRO", style.OURS, "-"),
    "loo": ("PG, loo baseline on R: AGRO again", style.SKY, ":"),
    "importance_weighted": ("PG, importance weighted", style.GREEN, "-"),
    "no_baseline": ("PG, no baseline", style.ORANGE, "-"),
    "no_baseline_shifted": ("PG, no baseline, all rewards + 2", style.ORANGE, "--"),
    "reward_baseline_k2": ("PG, baseline on r, KL by k2", style.VERMILLION, "-"),
    "reward_baseline_k3": ("PG, baseline on r, KL by k3", style.VERMILLION, "--"),
    "reward_baseline_exact_kl": ("PG, baseline on r, exact KL", style.BLACK, "-"),
    "stale": ("PG, KL frozen at sampling", style.GREY, "--"),
}
SHIFT = 2.0  # what no_baseline_shifted adds to every reward, which does not move the optimum

NUM_ARMS = 100
NUM_SEEDS = 10
BETAS = (1.0, 0.5)  # the sampled runs have the first
EXACT_UPDATES = 10_000
# In units of 1 / (beta * largest probability under pi_ref), which bounds AGRO's curvature. The
# gradient of k3 is stiff: it grows as pi_ref / pi on arms that the policy leaves.
EXACT_STEP = 0.25
EXACT_STEP_K3 = 0.025
SAMPLED_UPDATES = 6_000
SAMPLED_STEP = 4.0
NUM_GROUPS = 16
GROUP_SIZE = 8

SOLVED = 1e-6  # the relative KL that AGRO has to reach
FAILED = 0.3  # and what the form with the exact KL has to stay above

# (updates, beta, form) -> relative KL (marks, seeds)
Curves = dict[tuple[str, float, str], Tensor]


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """Writes fig1_final.csv, fig1_curves.csv, fig1.png; quick: fewer seeds, updates and betas.

    A quick run's sampled curves are too short to solve anything, so its claims are of exact ones.
    """
    seeds = range(3 if quick else NUM_SEEDS)
    betas = BETAS[:1] if quick else BETAS
    marks = {
        "exact": spaced_marks(4_000 if quick else EXACT_UPDATES),
        "sampled": spaced_marks(200 if quick else SAMPLED_UPDATES),
    }
    curves: Curves = {}
    fixed_points: dict[str, float] = {}  # form -> largest expected update at the optimum
    for beta in betas:
        bandits = tabular.gaussian_bandits(seeds, NUM_ARMS, beta)
        for form, direction in exact_directions(bandits).items():
            at_optimum = direction(bandits.optimum()).abs().amax().item()
            fixed_points[form] = max(fixed_points.get(form, 0.0), at_optimum)
            curves["exact", beta, form] = tabular.relative_kl_at(
                marks["exact"], bandits, direction, exact_step(bandits, form)
            )
    bandits = tabular.gaussian_bandits(seeds, NUM_ARMS, betas[0])
    for form, direction in sampled_directions(bandits).items():
        curves["sampled", betas[0], form] = tabular.relative_kl_at(
            marks["sampled"], bandits, direction, SAMPLED_STEP
        )
    tabular.write_csv(output_dir / "fig1_final.csv", final_rows(curves))
    drawn = curve_rows(curves, marks)
    tabular.write_csv(output_dir / "fig1_curves.csv", drawn)
    tabular.print_table(summary_rows(curves))
    style.save(draw(drawn), output_dir / "fig1.png")
    return claims(curves, fixed_points, ["exact"] if quick else ["exact", "sampled"])


def spaced_marks(updates: int) -> list[int]:
    """After which updates a curve has a point: 0, ten a decade, the last."""
    spaced = {round(10 ** (k / 10)) for k in range(100)}
    return [0, *sorted(k for k in spaced if k < updates), updates]


def exact_step(bandits: Bandits, form: str) -> Tensor:
    """(S, 1) step on expected updates."""
    step = EXACT_STEP_K3 if form == "reward_baseline_k3" else EXACT_STEP
    return step / (bandits.beta * bandits.ref_logprobs.exp().amax(-1, keepdim=True))


def exact_directions(bandits: Bandits) -> dict[str, Direction]:
    """The expected update of each form on samples of pi_ref."""
    beta, rewards, ref_logprobs = bandits.beta, bandits.rewards, bandits.ref_logprobs
    law = ref_logprobs.exp()
    above_mean = rewards - (law * rewards).sum(-1, keepdim=True)

    def mean_of(advantage: Callable[[Tensor], Tensor], logprobs: Tensor) -> Tensor:
        return tabular.expected_score(law * advantage(logprobs), logprobs)

    agro = tabular.off_policy_agro(bandits, law)
    return {
        "agro": agro,
        "loo": agro,
        # Weights pi / pi_ref under pi_ref's law: the update on the policy's own samples.
        "importance_weighted": tabular.on_policy_agro(bandits, lr_weight=0),
        "no_baseline": partial(mean_of, bandits.regularized),
        "no_baseline_shifted": partial(mean_of, lambda lp: SHIFT + bandits.regularized(lp)),
        "reward_baseline_k2": partial(mean_of, lambda lp: above_mean - beta * (lp - ref_logprobs)),
        "reward_baseline_k3": partial(
            mean_of, lambda lp: above_mean - beta * (1 - (ref_logprobs - lp).exp())
        ),
        "reward_baseline_exact_kl": lambda lp: (
            mean_of(lambda _: above_mean, lp) - beta * kl_gradient(bandits, lp)
        ),
        # The log-ratio of the law of the data to pi_ref, which is 0 here: no KL is left.
        "stale": partial(mean_of, lambda _: above_mean),
    }


def kl_gradient(bandits: Bandits, logprobs: Tensor) -> Tensor:
    """(S, K) gradient of KL(pi || pi_ref) in the logits, summed over all arms."""
    return tabular.expected_score(logprobs.exp() * (logprobs - bandits.ref_logprobs), logprobs)


def coefficient_functions(beta: float, num_groups: int) -> dict[str, Callable[[Groups], Tensor]]:
    """Each form's coefficients (B,) on groups sampled from pi_ref, by agro_kernels.

    "reward_baseline_exact_kl" is without its KL, which has no coefficient: `kl_gradient` adds it.
    """

    def form(name: str, samples: Groups) -> Tensor:
        return policy_gradient_coefficients(
            *samples,
            beta=beta,
            form=name,
            sampling_logprobs=samples.ref_logprobs,
            num_groups=num_groups,
        )

    def agro(samples: Groups) -> Tensor:
        return agro_coefficients(
            *samples, beta=beta, num_groups=num_groups, scale=1 / beta
        ).coefficients

    def shifted(samples: Groups) -> Tensor:
        return form("no_baseline", samples._replace(rewards=samples.rewards + SHIFT))

    return {
        "agro": agro,
        **{name: partial(form, name) for name in POLICY_GRADIENT_FORMS},
        "no_baseline_shifted": shifted,
        # On samples of pi_ref, what is left of "stale" is the reward less the others' mean.
        "reward_baseline_exact_kl": partial(form, "stale"),
    }


def sampled_directions(bandits: Bandits) -> dict[str, Direction]:
    """Updates of each form from NUM_GROUPS * GROUP_SIZE arms of pi_ref, the same for each form."""
    law = bandits.ref_logprobs.exp()

    def direction(name: str) -> Direction:
        sampler = Sampler(bandits, NUM_GROUPS, GROUP_SIZE, seed=0)
        coefficients = functions[name]

        def update(logprobs: Tensor) -> Tensor:
            step = sampler.direction(law, logprobs, coefficients)
            if name == "reward_baseline_exact_kl":
                step = step - bandits.beta * kl_gradient(bandits, logprobs)
            return step

        return update

    functions = coefficient_functions(bandits.beta, NUM_GROUPS)
    return {name: direction(name) for name in FORMS}


def claims(curves: Curves, fixed_points: dict[str, float], updates: Sequence[str]) -> list[Claim]:
    """What the curves of these kinds of updates show."""

    def final(form: str) -> Tensor:
        return torch.cat(
            [
                kl[-1]
                for (kind, _, name), kl in curves.items()
                if (kind in updates, name) == (True, form)
            ]
        )

    kinds = " and ".join(updates)
    solved, failed = final("agro").amax().item(), final("reward_baseline_exact_kl").amin().item()
    at_rest = {form for form, update in fixed_points.items() if update < 1e-12}
    expected = {"agro"} | {
        name
        for name, form in POLICY_GRADIENT_FORMS.items()
        if form.optimum_is_fixed_point_off_policy
    }
    apart = max(
        (kl - curves[kind, beta, "loo"]).abs().amax().item()
        for (kind, beta, form), kl in curves.items()
        if (kind, form) == ("sampled", "agro")
    )
    return [
        Claim(
            f"AGRO ends below {SOLVED:g} of the first KL ({kinds}; worst seed: {solved:.1e})",
            solved < SOLVED,
        ),
        Claim(
            f"the policy gradient with a baseline on r and the exact KL ends above {FAILED:g} "
            f"({kinds}; best seed: {failed:.2f})",
            failed > FAILED,
        ),
        Claim(
            "with the loo baseline on the whole of R it is AGRO (sampled curves apart by "
            f"{apart:.0e})",
            apart < 1e-9,
        ),
        Claim(
            f"the optimum is a fixed point of {', '.join(sorted(at_rest))} and of no other form, "
            "as POLICY_GRADIENT_FORMS says",
            at_rest == expected,
        ),
    ]


def final_rows(curves: Curves) -> list[Row]:
    """One row a problem: relative KL after the last update."""
    return [
        {"updates": kind, "beta": beta, "form": form, "seed": seed, "relative_kl": value}
        for (kind, beta, form), kl in curves.items()
        for seed, value in enumerate(kl[-1].tolist())
    ]


def curve_rows(curves: Curves, marks: dict[str, list[int]]) -> list[Row]:
    """One row a mark: over the seeds."""
    return [
        {
            "updates": kind,
            "beta": beta,
            "form": form,
            "update": mark,
            "median": values.quantile(0.5).item(),
            "lowest": values.amin().item(),
            "highest": values.amax().item(),
        }
        for (kind, beta, form), kl in curves.items()
        for mark, values in zip(marks[kind], kl, strict=True)
    ]


def summary_rows(curves: Curves) -> list[Row]:
    """One row a form: median over seeds (lowest to highest) of the final relative KL."""

    def text(final: Tensor) -> str:
        return f"{final.quantile(0.5):.2g} ({final.amin():.2g} to {final.amax():.2g})"

    columns = dict.fromkeys((kind, beta) for kind, beta, _ in curves)
    return [
        {
            "form": form,
            **{
                f"{kind}, beta {beta:g}": text(curves[kind, beta, form][-1])
                for kind, beta in columns
            },
        }
        for form in FORMS
    ]


@style.sheet()
def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Relative KL against updates: median and range over seeds, one panel a kind of updates.

    rows: of fig1_curves.csv.
    """
    shown = list(dict.fromkeys((row["updates"], float(row["beta"])) for row in rows))
    figure, grid = style.panels(len(shown), columns=1, row=3.4)
    for axes, (kind, beta) in zip(grid, shown, strict=True):
        of_panel = [row for row in rows if (row["updates"], float(row["beta"])) == (kind, beta)]
        for form in FORMS:
            _draw_curve(axes, form, [row for row in of_panel if row["form"] == form])
        title = "exact expected updates" if kind == "exact" else "updates from sampled groups"
        axes.set(title=f"{title}, beta = {beta:g}")
        axes.set(xlabel="updates", xscale="log", yscale="log", ylim=(SOLVED / 30, 30))
        axes.set_xlim(1, max(float(row["update"]) for row in of_panel))
        axes.axhline(SOLVED, color=style.GREY, linewidth=1.0, linestyle="--")
        axes.text(1.2, SOLVED * 1.5, "solved", color=style.GREY)
    figure.suptitle("KL(policy || optimum), 1 at the start")
    style.finish(figure, note="line: median over problems, band: lowest to highest")
    return figure


def _draw_curve(axes: Axes, form: str, rows: Sequence[Mapping[str, Any]]) -> None:
    label, colour, stroke = FORMS[form]

    def column(name: str) -> list[float]:
        return [max(float(row[name]), 1e-16) for row in rows]  # no 0 on a logarithmic axis

    updates = [float(row["update"]) for row in rows]
    wide = form in ("agro", "loo")
    axes.plot(
        updates,
        column("median"),
        color=colour,
        linestyle=stroke,
        linewidth=3.0 if wide else 1.8,
        label=label,
    )
    if form != "loo":  # its range is AGRO's
        axes.fill_between(
            updates,
            column("lowest"),
            column("highest"),
            color=colour,
            alpha=style.BAND,
            linewidth=0,
        )
