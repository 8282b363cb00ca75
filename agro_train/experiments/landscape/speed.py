"""How many updates the optimum takes, where it is reached."""

import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure

from agro_train.experiments import tabular
from agro_train.experiments.landscape.methods import METHODS, direction_of
from agro_train.experiments.tabular import Bandits, Claim, Row
from agro_train.watch import style

SETTINGS = ((10, 1.0), (10, 0.3), (100, 1.0), (100, 0.5))  # arms, beta
SEEDS = 10
REACHED = 1e-6  # relative KL
STEPS = tuple(2.0**k for k in range(-3, 11))  # in units of 1 / beta
UPDATES = 20_000
LABELS = {
    **{name: (method.label, method.colour) for name, method in METHODS.items()},
    "off_policy_reference": ("AGRO, data of pi_ref", style.OURS),
    "off_policy_uniform": ("AGRO, uniform data", style.PURPLE),
}


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """Updates until relative KL REACHED, each problem and method at its best step."""
    seeds = range(2 if quick else SEEDS)
    limit = 1_000 if quick else UPDATES
    settings = SETTINGS[:1] if quick else SETTINGS
    needed: dict[tuple[int, float, str], list[int | None]] = {}
    for num_arms, beta in settings:
        bandits = tabular.gaussian_bandits(seeds, num_arms, beta)
        for name in LABELS:
            needed[num_arms, beta, name] = updates_needed(name, bandits, limit)
    rows: list[Row] = [
        {
            "arms": num_arms,
            "beta": beta,
            "method": name,
            "seed": seed,
            "updates": "" if count is None else count,
        }
        for (num_arms, beta, name), counts in needed.items()
        for seed, count in zip(seeds, counts, strict=True)
    ]
    tabular.write_csv(output_dir / "landscape_speed.csv", rows)
    tabular.print_table(summary(needed))
    style.save(draw(needed, limit), output_dir / "landscape_speed.png")
    ratios = [
        exact / gradient
        for (num_arms, beta, name), counts in needed.items()
        if name == "exact"
        for exact, gradient in zip(counts, needed[num_arms, beta, "policy_gradient"], strict=True)
        if exact is not None and gradient is not None
    ]
    return [
        Claim(
            "where the exact on-policy gradient reaches the optimum it takes as many updates as "
            "the policy gradient, to the step grid's factor of two "
            f"({min(ratios):.2f} to {max(ratios):.2f} times, {len(ratios)} problems)",
            min(ratios) >= 0.5 and max(ratios) <= 2,
        )
    ]


def updates_needed(name: str, bandits: Bandits, limit: int) -> list[int | None]:
    """For each problem the fewest updates over the steps; None: more than limit at every step."""
    num_steps, num_problems = len(STEPS), bandits.rewards.shape[0]
    # Every problem once a step, as problems of their own: step major.
    repeated = Bandits(
        bandits.rewards.repeat(num_steps, 1),
        bandits.ref_logprobs.repeat(num_steps, 1),
        bandits.beta,
    )
    steps = torch.tensor(STEPS, dtype=torch.float64) / bandits.beta
    if name == "off_policy_reference":
        direction = tabular.off_policy_agro(repeated, repeated.ref_logprobs.exp())
    elif name == "off_policy_uniform":
        uniform = torch.full_like(repeated.rewards, 1 / repeated.rewards.shape[1])
        direction = tabular.off_policy_agro(repeated, uniform)
    else:
        direction = direction_of(name, repeated)
    fewest: list[int | None] = [None] * num_problems
    policies = tabular.policies(
        repeated.ref_logprobs, direction, steps.repeat_interleave(num_problems)[:, None], limit
    )
    for update, logprobs in enumerate(policies):
        # A step too large ends in NaN, which is not below anything.
        arrived = (repeated.relative_kl(logprobs) < REACHED).view(num_steps, -1).any(0)
        for problem in arrived.nonzero().flatten().tolist():
            if fewest[problem] is None:
                fewest[problem] = update
        if None not in fewest:
            break
    return fewest


def summary(needed: dict[tuple[int, float, str], list[int | None]]) -> list[Row]:
    """One row a setting and method: how many seeds reached it, and the fewest, median and most."""
    rows: list[Row] = []
    for (num_arms, beta, name), counts in needed.items():
        reached = sorted(count for count in counts if count is not None)
        rows.append(
            {
                "arms": num_arms,
                "beta": beta,
                "method": name,
                "reached": f"{len(reached)} of {len(counts)}",
                "fewest": reached[0] if reached else "",
                "median": statistics.median(reached) if reached else "",
                "most": reached[-1] if reached else "",
            }
        )
    return rows


@style.sheet()
def draw(needed: dict[tuple[int, float, str], list[int | None]], limit: int) -> Figure:
    settings = list(dict.fromkeys((num_arms, beta) for num_arms, beta, _ in needed))
    figure, (axes,) = style.panels(1, columns=1, row=4.6)
    for i, (name, (label, colour)) in enumerate(LABELS.items()):
        for k, setting in enumerate(settings):
            place = k + 0.16 * (i - 2)
            counts = needed[*setting, name]
            reached = [count for count in counts if count is not None]
            if reached:
                axes.plot([place] * 2, [min(reached), max(reached)], color=colour)
                axes.plot(place, statistics.median(reached), "o", color=colour)
            if missing := len(counts) - len(reached):
                axes.text(
                    place,
                    2.5 * limit,
                    str(missing),
                    ha="center",
                    va="center",
                    color=style.ink(colour),
                )
        axes.plot([], [], "o-", color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(settings) - 0.5)
    axes.axhspan(limit, 7 * limit, color=style.GREY, alpha=style.BAND, linewidth=0)
    axes.text(
        -0.48,
        2.5 * limit,
        f"not in {limit:,} updates:\nnumber of problems",
        va="center",
    )
    axes.set_ylim(1, 6.5 * limit)
    axes.set_xticks(
        range(len(settings)), [f"{arms} arms,\nbeta = {beta:g}" for arms, beta in settings]
    )
    axes.set_title(f"updates until KL(policy || optimum) is {REACHED:g} of the first")
    axes.grid(visible=False, axis="x")
    style.legend(figure, "dot: median over problems, bar: fewest to most")
    return figure
