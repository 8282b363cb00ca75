"""The on-policy loss from above: where descending it leads, how fast, and what the cap mends.

On the policy's own samples AGRO's loss also moves the law of the samples. Its gradient is that of
the KL-regularised policy gradient and a likelihood-ratio term (lr_weight 1), which has the optimum
too, but also falls towards every deterministic policy. Four questions, each with a plot: where is
the ridge between the two, which success rates fall, how often the optimum is reached from pi_ref,
and how many updates it takes where it is.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from agro_kernels import agro_coefficients
from agro_train.experiments import tabular
from agro_train.experiments.tabular import Bandits, Claim, Direction, Groups, Row, Sampler


class Method(NamedTuple):
    """A setting of on-policy AGRO, in `agro_coefficients`' words."""

    label: str
    colour: str
    lr_weight: float
    lr_cap: bool


METHODS = {
    "exact": Method("exact on-policy gradient (lr_weight=1)", tabular.RED, 1.0, False),
    "capped": Method("capped (lr_weight=1, lr_cap)", tabular.BLUE, 1.0, True),
    "policy_gradient": Method("policy gradient (lr_weight=0)", tabular.GREEN, 0.0, False),
}


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """Writes a CSV and a PNG a question, landscape_*; quick: fewer problems and updates."""
    found: list[Claim] = []
    for question in (two_arms, success_rate, basin, speed):
        found += question(output_dir, quick)
    return found


# --- Two arms: the ridge --------------------------------------------------------------------------

# Optimum (1/2, 1/2), so that the loss is beta^2 / 2 * p (1 - p) z^2 at log-odds z, p = sigmoid(z).
RIDGE = 2.3994  # z tanh(z / 2) = 2
INSIDE, OUTSIDE = 2.39, 2.41
TWO_ARM_STEP = 0.5


def two_arms(output_dir: Path, quick: bool) -> list[Claim]:
    """Loss over the log-odds, and where descent from each of them ends."""
    starts = torch.cat(
        [
            torch.linspace(-5, 5, 21 if quick else 101, dtype=torch.float64),
            torch.tensor([INSIDE, OUTSIDE], dtype=torch.float64),
        ]
    )
    ends = {name: descend_two_arms(name, starts, 3_000) for name in METHODS}
    loss = two_arm_loss(starts)
    rows: list[Row] = [
        {
            "start": starts[i].item(),
            "loss": loss[i].item(),
            **{f"end_{name}": end[i].item() for name, end in ends.items()},
        }
        for i in range(len(starts))
    ]
    tabular.write_csv(output_dir / "landscape_two_arms.csv", rows)
    ridge = find_ridge()
    draw_two_arms(starts[:-2], {name: end[:-2] for name, end in ends.items()}, ridge).savefig(
        output_dir / "landscape_two_arms.png", dpi=120
    )
    inside, outside = ends["exact"][-2].item(), ends["exact"][-1].item()
    others = max(ends[name].abs().amax().item() for name in ("capped", "policy_gradient"))
    return [
        Claim(
            f"two arms: the exact gradient changes sign at log-odds {ridge:.5f}, the root of "
            f"z tanh(z/2) = 2, {RIDGE}",
            abs(ridge * math.tanh(ridge / 2) - 2) < 1e-9 and round(ridge, 4) == RIDGE,
        ),
        Claim(
            f"from {INSIDE} it leads to the optimum, 0 ({inside:.1e}), from {OUTSIDE} away from it "
            f"({outside:.1f})",
            abs(inside) < 1e-6 and outside > 2 * RIDGE,
        ),
        Claim(
            f"capped and policy gradient lead to the optimum from every start ({others:.0e})",
            others < 1e-6,
        ),
    ]


def two_arm_bandits(num_problems: int) -> Bandits:
    """Equal rewards: pi_ref = (1/2, 1/2) is the optimum."""
    halves = torch.full((num_problems, 2), 0.5, dtype=torch.float64)
    return Bandits(torch.zeros_like(halves), halves.log(), beta=1.0)


def two_arm_logits(log_odds: Tensor) -> Tensor:
    """(S,) to (S, 2)."""
    return torch.stack([log_odds / 2, -log_odds / 2], -1)


def two_arm_loss(log_odds: Tensor) -> Tensor:
    """Half the variance of R under the policy, in units of beta^2, (S,)."""
    return 0.5 * log_odds.sigmoid() * (-log_odds).sigmoid() * log_odds**2


def descend_two_arms(method: str, starts: Tensor, updates: int) -> Tensor:
    """Log-odds (S,) after the updates."""
    direction = direction_of(method, two_arm_bandits(len(starts)))
    *_, logprobs = tabular.policies(two_arm_logits(starts), direction, TWO_ARM_STEP, updates)
    return logprobs[:, 0] - logprobs[:, 1]


def find_ridge() -> float:
    """The log-odds where the exact direction turns from the optimum to the outside, bisected."""
    direction = direction_of("exact", two_arm_bandits(1))
    low, high = torch.tensor([1.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        outward = direction(two_arm_logits(middle).log_softmax(-1))[0, 0] > 0
        low, high = (low, middle) if outward else (middle, high)
    return low.item()


def draw_two_arms(starts: Tensor, ends: dict[str, Tensor], ridge: float) -> Figure:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    z = torch.linspace(-6, 6, 601, dtype=torch.float64)
    loss = two_arm_loss(z)
    left.plot(z, loss, color="black")
    inside = z.abs() <= ridge
    top = 1.25 * loss.amax().item()
    left.axvspan(-ridge, ridge, color=tabular.GREEN, alpha=0.12, linewidth=0)
    left.axvspan(-6, -ridge, color=tabular.RED, alpha=0.12, linewidth=0)
    left.axvspan(ridge, 6, color=tabular.RED, alpha=0.12, linewidth=0)
    left.plot([-ridge, ridge], [loss[inside].amax()] * 2, "o", color=tabular.RED)
    left.annotate(
        f"ridge: log-odds {ridge:.4f}",
        (ridge, loss.amax().item()),
        (0, 0.97 * top),
        ha="center",
        va="top",
        arrowprops={"arrowstyle": "-", "color": tabular.GREY},
    )
    left.text(0, 0.45 * top, "to the\noptimum", ha="center")
    for side in (-1, 1):
        left.text(4.2 * side, 0.04 * top, "to a deterministic\npolicy", ha="center")
    left.set_xlim(-6, 6)
    left.set_ylim(0, top)
    tabular.tidy(left, "The on-policy loss of two arms", "log-odds of the policy", "loss / beta²")
    for name, line, width in (
        ("exact", "-", 2.0),
        ("capped", "-", 2.0),
        ("policy_gradient", ":", 3.0),
    ):
        method = METHODS[name]
        right.plot(
            starts.sigmoid(),
            ends[name].sigmoid(),
            line,
            color=method.colour,
            lw=width,
            label=method.label,
        )
    right.set_ylim(-0.05, 1.05)
    tabular.tidy(
        right,
        "Where descent ends; the optimum is 1/2",
        "probability of the first arm at the start",
        "at the end",
    )
    right.legend(frameon=False, fontsize=9)
    return figure


# --- Binary rewards: which success rates fall -----------------------------------------------------

SUCCESS_BETAS = (1.0, 0.3, 0.1, 0.03)
SUCCESS_GROUP = 8
TRAINED_BETA = 0.1
TRAINED_STARTS = (0.1, 0.25, 0.35, 0.45, 0.6, 0.8)


def success_rate(output_dir: Path, quick: bool) -> list[Claim]:
    """The first update's effect on the success rate at pi = pi_ref, and training from there."""
    rates = torch.linspace(0.02, 0.98, 13 if quick else 97, dtype=torch.float64)
    speeds = {
        (name, beta): success_speed(METHODS[name], beta, rates)
        for name in METHODS
        for beta in SUCCESS_BETAS
    }
    rows: list[Row] = [
        {
            "beta": beta,
            "success_rate": rate,
            **{name: speeds[name, beta][i].item() for name in METHODS},
        }
        for beta in SUCCESS_BETAS
        for i, rate in enumerate(rates.tolist())
    ]
    tabular.write_csv(output_dir / "landscape_success_rate.csv", rows)
    updates = 200 if quick else 1_000
    trained = {name: train_success_rates(name, updates) for name in METHODS}
    draw_success_rate(rates, speeds, trained).savefig(
        output_dir / "landscape_success_rate.png", dpi=120
    )
    off_rule = max(
        (speeds["exact", beta] - (1 + (2 * rates - 1) / (2 * beta))).abs().amax().item()
        for beta in SUCCESS_BETAS
    )
    slowest = min(speeds["capped", beta].amin().item() for beta in SUCCESS_BETAS)
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
    n = SUCCESS_GROUP
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
    run = tabular.policies(ref_logprobs, direction, 0.1, updates)
    return torch.stack([logprobs[:, 0].exp() for logprobs in run])


def draw_success_rate(
    rates: Tensor, speeds: dict[tuple[str, float], Tensor], trained: dict[str, Tensor]
) -> Figure:
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    first, *others = figure.subplots(1, 4, width_ratios=[1.7, 1, 1, 1])
    first.axhspan(-5, 0, color=tabular.RED, alpha=0.1, linewidth=0)
    first.text(0.98, -0.4, "success falls", ha="right", va="center")
    first.plot([0, 1], [1, 1], color=METHODS["policy_gradient"].colour, lw=2)
    first.text(0.98, 0.9, "policy gradient", ha="right", va="top", fontsize=9)
    shades = torch.linspace(0.35, 1.0, len(SUCCESS_BETAS)).tolist()
    for beta, shade in zip(SUCCESS_BETAS, shades, strict=True):
        curve = speeds["exact", beta]
        first.plot(rates, curve, color=tabular.RED, alpha=shade, lw=2)
        # Beside the leftmost point of the line inside the axes.
        at = int((curve > -4.6).nonzero()[0])
        first.annotate(
            f"beta = {beta:g}",
            (rates[at].item(), curve[at].item()),
            (-5, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
        )
        if beta < 0.5:
            first.plot([0.5 - beta], [0], "o", color=tabular.RED, zorder=3)
    first.set_xlim(-0.22, 1)
    first.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    first.set_ylim(-5, 5)
    tabular.tidy(
        first,
        "First exact on-policy update (dots: p = 1/2 - beta)",
        "success rate p of pi = pi_ref",
        "rise of success, policy gradient = 1",
    )
    titles = ("exact on-policy gradient", "capped", "policy gradient")
    for axes, (name, method), title in zip(others, METHODS.items(), titles, strict=True):
        axes.plot(range(len(trained[name])), trained[name], color=method.colour)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, len(trained[name]) - 1)
        axes.set_ylim(-0.02, 1.02)
        tabular.tidy(axes, title, f"updates (beta = {TRAINED_BETA:g})", "")
    others[0].axhline(0.5 - TRAINED_BETA, color="black", lw=0.8, ls=(0, (4, 4)))
    others[0].text(1.5, 0.5 - TRAINED_BETA, "1/2 - beta", va="bottom", fontsize=9)
    others[0].set_ylabel("success rate")
    return figure


# --- From pi_ref: how often the optimum is reached ------------------------------------------------

BASIN_SDS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # of the rewards, in units of beta
QUICK_SDS = (0.5, 2.0, 5.0)
BASIN_PROBLEMS = 40  # of each
BASIN_ARMS = 10
BASIN_REF_SD = 0.5  # of pi_ref's logits
BASIN_STEP = 0.5
BASIN_REACHED = 1e-3  # relative KL
EXACT_UPDATES = 20_000
SAMPLED_UPDATES = 5_000
NUM_GROUPS = 4
GROUP_SIZE = 8


def basin(output_dir: Path, quick: bool) -> list[Claim]:
    """How many of the problems end at the optimum, by the spread of the rewards."""
    num_problems = 10 if quick else BASIN_PROBLEMS
    spreads = QUICK_SDS if quick else BASIN_SDS
    bandits = basin_bandits(spreads, range(num_problems))
    exact_updates, sampled_updates = (2_000, 100) if quick else (EXACT_UPDATES, SAMPLED_UPDATES)
    reached: dict[tuple[str, str], list[int]] = {}  # (updates, method) -> for each spread
    rows: list[Row] = []

    def follow(updates: str, method: str, direction: Direction, step: float, last: int) -> None:
        marks = (last // 5, last)
        for after, kl in zip(
            marks, tabular.relative_kl_at(marks, bandits, direction, step), strict=True
        ):
            counts = (kl < BASIN_REACHED).view(len(spreads), -1).sum(1).tolist()
            reached[updates, method] = counts
            rows.append(
                {
                    "updates": updates,
                    "method": method,
                    "after": after,
                    "problems": num_problems,
                    **{f"sd {sd:g} beta": n for sd, n in zip(spreads, counts, strict=True)},
                }
            )

    for name in METHODS:
        follow("exact", name, direction_of(name, bandits), BASIN_STEP, exact_updates)
        follow("sampled", name, sampled_direction_of(name, bandits), BASIN_STEP, sampled_updates)
    small = BASIN_STEP / 5
    follow("exact", "exact, step / 5", direction_of("exact", bandits), small, exact_updates)
    tabular.write_csv(output_dir / "landscape_basin.csv", rows)
    tabular.print_table(rows)
    draw_basin(reached, spreads, num_problems).savefig(output_dir / "landscape_basin.png", dpi=120)
    missed = {name: num_problems * len(spreads) - sum(reached["exact", name]) for name in METHODS}
    lost = reached["exact", "exact"]
    return [
        Claim(
            "from pi_ref the exact on-policy gradient loses the optimum as rewards spread: "
            f"{lost[0]} of {num_problems} reach it at sd {spreads[0]:g} beta, {lost[-1]} at "
            f"{spreads[-1]:g}",
            lost[0] == num_problems and lost[-1] <= num_problems // 10,
        ),
        Claim(
            "a fifth of the step changes nothing: it is the landscape",
            lost == reached["exact", "exact, step / 5"],
        ),
        Claim(
            "capped and policy gradient reach it in every problem, with exact updates "
            f"(missed: {missed['capped']} and {missed['policy_gradient']})",
            missed["capped"] == missed["policy_gradient"] == 0,
        ),
    ]


def basin_bandits(spreads: Sequence[float], seeds: Sequence[int]) -> Bandits:
    """len(spreads) * len(seeds) problems, all of one spread together."""
    parts = [
        tabular.gaussian_bandits(seeds, BASIN_ARMS, 1.0, reward_sd=sd, ref_sd=BASIN_REF_SD)
        for sd in spreads
    ]
    return Bandits(
        torch.cat([bandits.rewards for bandits in parts]),
        torch.cat([bandits.ref_logprobs for bandits in parts]),
        beta=1.0,
    )


def sampled_direction_of(name: str, bandits: Bandits) -> Direction:
    """Updates from groups that the policy samples itself, by `agro_coefficients`."""
    method = METHODS[name]
    sampler = Sampler(bandits, NUM_GROUPS, GROUP_SIZE, seed=0)

    def coefficients(samples: Groups) -> Tensor:
        return agro_coefficients(
            *samples,
            beta=bandits.beta,
            lr_weight=method.lr_weight,
            lr_cap=method.lr_cap,
            num_groups=NUM_GROUPS,
            scale=1 / bandits.beta,
        ).coefficients

    return lambda logprobs: sampler.direction(logprobs.exp(), logprobs, coefficients)


def draw_basin(
    reached: dict[tuple[str, str], list[int]], spreads: Sequence[float], num_problems: int
) -> Figure:
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    titles = {"exact": "exact expected updates", "sampled": "updates from sampled groups"}
    for axes, (updates, title) in zip(
        figure.subplots(1, 2, sharey=True), titles.items(), strict=True
    ):
        for i, (name, method) in enumerate(METHODS.items()):
            places = [k + 0.27 * (i - 1) for k in range(len(spreads))]
            heights = [100 * count / num_problems for count in reached[updates, name]]
            axes.bar(places, heights, 0.25, color=method.colour, label=method.label)
            for place, height in zip(places, heights, strict=True):
                if height == 0:
                    axes.text(place, 1, "0", ha="center", fontsize=9, color=method.colour)
        axes.set_xticks(range(len(spreads)), [f"{sd:g}" for sd in spreads])
        tabular.tidy(axes, title, "standard deviation of the rewards / beta", "")
    figure.axes[0].set_ylabel("problems that reach the optimum, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


# --- Speed: updates to the optimum ----------------------------------------------------------------

SPEED_SETTINGS = ((10, 1.0), (10, 0.3), (100, 1.0), (100, 0.5))  # arms, beta
SPEED_SEEDS = 10
SPEED_REACHED = 1e-6  # relative KL
SPEED_STEPS = tuple(2.0**k for k in range(-3, 11))  # in units of 1 / beta
SPEED_UPDATES = 20_000
SPEED_LABELS = {
    **{name: (method.label, method.colour) for name, method in METHODS.items()},
    "off_policy_reference": ("off-policy AGRO, data of pi_ref", tabular.ORANGE),
    "off_policy_uniform": ("off-policy AGRO, uniform data", tabular.PURPLE),
}


def speed(output_dir: Path, quick: bool) -> list[Claim]:
    """Updates until relative KL SPEED_REACHED, each problem and method at its best step."""
    seeds = range(2 if quick else SPEED_SEEDS)
    limit = 1_000 if quick else SPEED_UPDATES
    settings = SPEED_SETTINGS[:1] if quick else SPEED_SETTINGS
    needed: dict[tuple[int, float, str], list[int | None]] = {}
    for num_arms, beta in settings:
        bandits = tabular.gaussian_bandits(seeds, num_arms, beta)
        for name in SPEED_LABELS:
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
    tabular.print_table(speed_summary(needed))
    draw_speed(needed, limit).savefig(output_dir / "landscape_speed.png", dpi=120)
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
            0.5 <= min(ratios) and max(ratios) <= 2,
        )
    ]


def updates_needed(name: str, bandits: Bandits, limit: int) -> list[int | None]:
    """For each problem the fewest updates over the steps; None: more than limit at every step."""
    num_steps, num_problems = len(SPEED_STEPS), bandits.rewards.shape[0]
    # Every problem once a step, as problems of their own: step major.
    repeated = Bandits(
        bandits.rewards.repeat(num_steps, 1),
        bandits.ref_logprobs.repeat(num_steps, 1),
        bandits.beta,
    )
    steps = torch.tensor(SPEED_STEPS, dtype=torch.float64) / bandits.beta
    if name == "off_policy_reference":
        direction = tabular.off_policy_agro(repeated, repeated.ref_logprobs.exp())
    elif name == "off_policy_uniform":
        uniform = torch.full_like(repeated.rewards, 1 / repeated.rewards.shape[1])
        direction = tabular.off_policy_agro(repeated, uniform)
    else:
        direction = direction_of(name, repeated)
    fewest: list[int | None] = [None] * num_problems
    run = tabular.policies(
        repeated.ref_logprobs, direction, steps.repeat_interleave(num_problems)[:, None], limit
    )
    for update, logprobs in enumerate(run):
        # A step too large ends in NaN, which is not below anything.
        arrived = (repeated.relative_kl(logprobs) < SPEED_REACHED).view(num_steps, -1).any(0)
        for problem in arrived.nonzero().flatten().tolist():
            if fewest[problem] is None:
                fewest[problem] = update
        if None not in fewest:
            break
    return fewest


def speed_summary(needed: dict[tuple[int, float, str], list[int | None]]) -> list[Row]:
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


def draw_speed(needed: dict[tuple[int, float, str], list[int | None]], limit: int) -> Figure:
    settings = list(dict.fromkeys((num_arms, beta) for num_arms, beta, _ in needed))
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots()
    for i, (name, (label, colour)) in enumerate(SPEED_LABELS.items()):
        for k, setting in enumerate(settings):
            place = k + 0.16 * (i - 2)
            counts = needed[*setting, name]
            reached = [count for count in counts if count is not None]
            if reached:
                axes.plot([place] * 2, [min(reached), max(reached)], color=colour, lw=1.5)
                axes.plot(place, statistics.median(reached), "o", color=colour)
            if missing := len(counts) - len(reached):
                axes.text(place, 1.6 * limit, str(missing), ha="center", va="center", color=colour)
        axes.plot([], [], "o-", color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(settings) - 0.5)
    axes.axhspan(limit, 3 * limit, color=tabular.GREY, alpha=0.2, linewidth=0)
    axes.text(
        -0.48,
        1.6 * limit,
        f"not in {limit:,} updates:\nnumber of problems",
        va="center",
        fontsize=9,
    )
    axes.set_ylim(1, 2.7 * limit)
    axes.set_xticks(
        range(len(settings)), [f"{arms} arms, beta = {beta:g}" for arms, beta in settings]
    )
    tabular.tidy(
        axes,
        f"Updates until KL(policy || optimum) is {SPEED_REACHED:g} of the first",
        "",
        "updates",
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def direction_of(method: str, bandits: Bandits) -> Direction:
    """Exact expected updates of a method on the policy's own samples."""
    return tabular.on_policy_agro(bandits, METHODS[method].lr_weight, METHODS[method].lr_cap)
