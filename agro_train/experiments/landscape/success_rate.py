"""Binary rewards: which success rates the first on-policy update lowers."""

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from agro_kernels import agro_coefficients
from agro_train.experiments import tabular
from agro_train.experiments.landscape.methods import METHODS, Method, direction_of
from agro_train.experiments.tabular import Bandits, Claim, Row
from agro_train.watch import style

BETAS = (1.0, 0.3, 0.1, 0.03)
GROUP_SIZE = 8
TRAINED_BETA = 0.1
TRAINED_STARTS = (0.1, 0.25, 0.35, 0.45, 0.6, 0.8)


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """The first update's effect on the success rate at pi = pi_ref, and training from there."""
    rates = torch.linspace(0.02, 0.98, 13 if quick else 97, dtype=torch.float64)
    speeds = {
        (name, beta): success_speed(METHODS[name], beta, rates)
        for name in METHODS
        for beta in BETAS
    }
    rows: list[Row] = [
        {
            "beta": beta,
            "success_rate": rate,
            **{name: speeds[name, beta][i].item() for name in METHODS},
        }
        for beta in BETAS
        for i, rate in enumerate(rates.tolist())
    ]
    tabular.write_csv(output_dir / "landscape_success_rate.csv", rows)
    updates = 200 if quick else 1_000
    trained = {name: train_success_rates(name, updates) for name in METHODS}
    style.save(draw(rates, speeds, trained), output_dir / "landscape_success_rate.png")
    off_rule = max(
        (speeds["exact", beta] - (1 + (2 * rates - 1) / (2 * beta))).abs().amax().item()
        for beta in BETAS
    )
    slowest = min(speeds["capped", beta].amin().item() for beta in BETAS)
    return [
        Claim(
            "0/1 rewards at pi = pi_ref: the exact gradient raises success where "
            f"p > 1/2 - beta and lowers it below (off the formula by {off_rule:.0e})",
            off_rule < 1e-9,
        ),
        Claim(
            f"capped never lowers it (slowest: {slowest:.3g} of the policy gradient's speed)",
            slowest > 0,
        ),
    ]


def success_speed(method: Method, beta: float, rates: Tensor) -> Tensor:
    """How fast the log-odds of success rise at pi = pi_ref, in units of the policy gradient's.

    The exact expectation over groups of n from `agro_coefficients`: a group is one of n + 1, by its
    number of successes.

    rates: (P,) success rates. Returns (P,).
    """
    n = GROUP_SIZE
    successes = torch.arange(n + 1, dtype=torch.float64)
    rewards = (torch.arange(n) < successes[:, None]).double().flatten()
    level = torch.zeros_like(rewards)  # pi = pi_ref: no log-ratio anywhere
    coefficients = agro_coefficients(
        rewards,
        level,
        level,
        torch.arange(n + 1).repeat_interleave(n),
        beta=beta,
        lr_weight=method.lr_weight,
        lr_cap=method.lr_cap,
        num_groups=1,
        scale=1 / beta,
    ).coefficients
    of_successes = (coefficients * rewards).view(n + 1, n).sum(1)
    of_failures = (coefficients * (1 - rewards)).view(n + 1, n).sum(1)
    p = rates[:, None]
    choose = torch.tensor([float(math.comb(n, k)) for k in range(n + 1)], dtype=torch.float64)
    probability = choose * p**successes * (1 - p) ** (n - successes)
    # The score of success is 1 - p in its own logit, that of failure -p.
    slope = (probability * (of_successes * (1 - p) - of_failures * p)).sum(1)
    return -slope / (rates * (1 - rates))


def train_success_rates(method: str, updates: int) -> Tensor:
    """(updates + 1, len(TRAINED_STARTS)) success rates under exact updates from pi_ref."""
    start = torch.tensor(TRAINED_STARTS, dtype=torch.float64)
    ref_logprobs = torch.stack([start, 1 - start], -1).log()
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(ref_logprobs)
    direction = direction_of(method, Bandits(rewards, ref_logprobs, TRAINED_BETA))
    policies = tabular.policies(ref_logprobs, direction, 0.1, updates)
    return torch.stack([logprobs[:, 0].exp() for logprobs in policies])


@style.sheet()
def draw(
    rates: Tensor, speeds: dict[tuple[str, float], Tensor], trained: dict[str, Tensor]
) -> Figure:
    figure, (first, *others) = style.panels(4, row=3.0)
    exact, gradient = METHODS["exact"], METHODS["policy_gradient"]
    first.axhspan(-5, 0, color=style.GREY, alpha=style.BAND, linewidth=0)
    first.text(0.98, -4.5, "success falls", ha="right", va="center")
    first.plot([0, 1], [1, 1], color=gradient.colour, label=gradient.label)
    for beta in BETAS:
        curve = speeds["exact", beta]
        first.plot(rates, curve, color=exact.colour)
        # Beside the leftmost point of the line inside the axes.
        at = int((curve > -4.6).nonzero()[0])
        first.annotate(
            f"beta {beta:g}",
            (rates[at].item(), curve[at].item()),
            (-5, 0),
            textcoords="offset points",
            ha="right",
            va="top" if at else "bottom",  # of a line that comes from below, under the others'
        )
        if beta < 0.5:
            first.plot([0.5 - beta], [0], "o", color=exact.colour, zorder=3)
    first.set_xlim(-0.45, 1)
    first.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    first.set_ylim(-5, 5)
    first.set(title="speed at the start, exact; dots: 1/2 - beta", xlabel="success rate of pi_ref")
    titles = ("exact on-policy gradient", "capped", "policy gradient")
    for axes, (name, method), title in zip(others, METHODS.items(), titles, strict=True):
        axes.plot(range(len(trained[name])), trained[name], color=method.colour)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, len(trained[name]) - 1)
        axes.set_ylim(-0.02, 1.02)
        axes.set(title=f"success rate, {title}", xlabel=f"updates (beta = {TRAINED_BETA:g})")
    others[0].axhline(0.5 - TRAINED_BETA, color=style.GREY, linewidth=1.0, linestyle="--")
    right = len(trained["exact"]) - 1
    others[0].text(
        right, 0.5 - TRAINED_BETA, "1/2 - beta", ha="right", va="bottom", color=style.GREY
    )
    style.finish(figure, [first])
    return figure
