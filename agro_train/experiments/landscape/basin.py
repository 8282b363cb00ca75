"""How often the optimum is reached from pi_ref, by the spread of the rewards."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from agro_kernels import agro_coefficients
from agro_train.experiments import tabular
from agro_train.experiments.landscape.methods import METHODS, direction_of
from agro_train.experiments.tabular import Bandits, Claim, Direction, Groups, Row, Sampler
from agro_train.watch import style

SDS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # of the rewards, in units of beta
QUICK_SDS = (0.5, 2.0, 5.0)
PROBLEMS = 40  # of each
ARMS = 10
REF_SD = 0.5  # of pi_ref's logits
STEP = 0.5
REACHED = 1e-3  # relative KL
EXACT_UPDATES = 20_000
SAMPLED_UPDATES = 5_000
NUM_GROUPS = 4
GROUP_SIZE = 8


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """How many of the problems end at the optimum, by the spread of the rewards."""
    num_problems = 10 if quick else PROBLEMS
    spreads = QUICK_SDS if quick else SDS
    bandits = basin_bandits(spreads, range(num_problems))
    exact_updates, sampled_updates = (2_000, 100) if quick else (EXACT_UPDATES, SAMPLED_UPDATES)
    reached: dict[tuple[str, str], list[int]] = {}  # (updates, method) -> for each spread
    rows: list[Row] = []

    def follow(updates: str, method: str, direction: Direction, step: float, last: int) -> None:
        marks = (last // 5, last)
        for after, kl in zip(
            marks, tabular.relative_kl_at(marks, bandits, direction, step), strict=True
        ):
            counts = (kl < REACHED).view(len(spreads), -1).sum(1).tolist()
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
        follow("exact", name, direction_of(name, bandits), STEP, exact_updates)
        follow("sampled", name, sampled_direction_of(name, bandits), STEP, sampled_updates)
    small = STEP / 5
    follow("exact", "exact, step / 5", direction_of("exact", bandits), small, exact_updates)
    tabular.write_csv(output_dir / "landscape_basin.csv", rows)
    tabular.print_table(rows)
    style.save(draw(reached, spreads, num_problems), output_dir / "landscape_basin.png")
    missed = {name: num_problems * len(spreads) - sum(reached["exact", name]) for name in METHODS}
    exact_counts = reached["exact", "exact"]
    at_smallest, at_largest = exact_counts[0], exact_counts[-1]
    return [
        Claim(
            "from pi_ref the exact on-policy gradient loses the optimum as rewards spread: "
            f"{at_smallest} of {num_problems} reach it at sd {spreads[0]:g} beta, {at_largest} at "
            f"{spreads[-1]:g}",
            at_smallest == num_problems and at_largest <= num_problems // 10,
        ),
        Claim(
            "a fifth of the step changes nothing: it is the landscape",
            exact_counts == reached["exact", "exact, step / 5"],
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
        tabular.gaussian_bandits(seeds, ARMS, 1.0, reward_sd=sd, ref_sd=REF_SD) for sd in spreads
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


@style.sheet()
def draw(
    reached: dict[tuple[str, str], list[int]], spreads: Sequence[float], num_problems: int
) -> Figure:
    figure, grid = style.panels(2, columns=1, row=2.9, sharex=True)
    titles = {"exact": "exact expected updates", "sampled": "updates from sampled groups"}
    for axes, (updates, title) in zip(grid, titles.items(), strict=True):
        for i, (name, method) in enumerate(METHODS.items()):
            places = [k + 0.27 * (i - 1) for k in range(len(spreads))]
            heights = [100 * count / num_problems for count in reached[updates, name]]
            axes.bar(places, heights, 0.25, color=method.colour, label=method.label)
            for place, height in zip(places, heights, strict=True):
                if height == 0:
                    axes.text(place, 1, "0", ha="center", color=style.ink(method.colour))
        axes.set_xticks(range(len(spreads)), [f"{sd:g}" for sd in spreads])
        axes.set(title=f"problems that reach the optimum, %: {title}")
        axes.grid(visible=False, axis="x")
    grid[-1].set_xlabel("standard deviation of the rewards / beta")
    style.legend(figure)
    return figure
