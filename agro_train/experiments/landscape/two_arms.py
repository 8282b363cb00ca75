"""Two arms: where the ridge between the optimum and the deterministic policies lies."""

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from agro_train.experiments import tabular
from agro_train.experiments.landscape.methods import METHODS, direction_of
from agro_train.experiments.tabular import Bandits, Claim, Row
from agro_train.watch import style

# Optimum (1/2, 1/2), so that the loss is beta^2 / 2 * p (1 - p) z^2 at log-odds z, p = sigmoid(z).
RIDGE = 2.3994  # z tanh(z / 2) = 2
INSIDE, OUTSIDE = 2.39, 2.41
STEP = 0.5


def run(output_dir: Path, quick: bool) -> list[Claim]:
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
    drawn = draw(starts[:-2], {name: end[:-2] for name, end in ends.items()}, ridge)
    style.save(drawn, output_dir / "landscape_two_arms.png")
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
    *_, logprobs = tabular.policies(two_arm_logits(starts), direction, STEP, updates)
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


@style.sheet()
def draw(starts: Tensor, ends: dict[str, Tensor], ridge: float) -> Figure:
    figure, (left, right) = style.panels(2, row=3.6)
    z = torch.linspace(-6, 6, 601, dtype=torch.float64)
    loss = two_arm_loss(z)
    left.plot(z, loss, color=METHODS["exact"].colour)
    inside = z.abs() <= ridge
    top = 1.25 * loss.amax().item()
    left.axvspan(-ridge, ridge, color=style.GREEN, alpha=style.BAND, linewidth=0)
    for outer in (-6, 6):
        left.axvspan(math.copysign(ridge, outer), outer, color=style.VERMILLION,
                     alpha=style.BAND, linewidth=0)  # fmt: skip
    left.plot([-ridge, ridge], [loss[inside].amax()] * 2, "o", color=METHODS["exact"].colour)
    left.annotate(
        f"ridge\n{ridge:.4f}",
        (ridge, loss.amax().item()),
        (4.4, 0.98 * top),
        ha="center",
        va="top",
        arrowprops={"arrowstyle": "-", "color": style.GREY},
    )
    left.text(0, 0.98 * top, "to the\noptimum", ha="center", va="top")
    for side in (-1, 1):
        left.text(4.2 * side, 0.04 * top, "to one\narm", ha="center")
    left.set_xlim(-6, 6)
    left.set_ylim(0, top)
    left.set(title="on-policy loss / beta² of two arms", xlabel="log-odds of the policy")
    left.grid(visible=False)
    for name, stroke, width in (
        ("exact", "-", 2.2),
        ("capped", "-", 3.0),
        ("policy_gradient", ":", 3.0),
    ):
        method = METHODS[name]
        right.plot(
            starts.sigmoid(),
            ends[name].sigmoid(),
            stroke,
            color=method.colour,
            linewidth=width,
            label=name.replace("_", " "),
        )
    right.set_ylim(-0.05, 1.05)
    right.set(title="probability of the first arm, after descent", xlabel="at the start")
    style.finish(figure)
    return figure
