"""Problems small enough that every expectation is a sum: one prompt, K possible completions (arms).

A policy is a softmax over K logits. S independent problems are solved at once: whatever belongs to
an arm is (S, K), whatever belongs to a problem is (S,), all float64. A direction is what a step of
gradient descent adds to the logits, up to the step size: minus the gradient of the loss, with the
scale 1 / beta throughout, so that AGRO's is the size of a policy gradient.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Direction = Callable[[Tensor], Tensor]
"""(S, K) log-probabilities of the current policy to (S, K) what to add to its logits."""
Row = Mapping[str, object]


class Claim(NamedTuple):
    """One sentence that an experiment is to show, with what was measured, and whether it did."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Bandits:
    """S problems of K arms."""

    rewards: Tensor  # (S, K)
    ref_logprobs: Tensor  # (S, K), nats
    beta: float

    def optimum(self) -> Tensor:
        """(S, K) log-probabilities of pi_ref * exp(r / beta) / Z."""
        return (self.ref_logprobs + self.rewards / self.beta).log_softmax(-1)

    def regularized(self, logprobs: Tensor) -> Tensor:
        """(S, K) R = r - beta * log(pi / pi_ref)."""
        return self.rewards - self.beta * (logprobs - self.ref_logprobs)

    def relative_kl(self, logprobs: Tensor) -> Tensor:
        """(S,) KL(pi || optimum) over KL(pi_ref || optimum): 1 at the reference, 0 when solved."""
        optimum = self.optimum()

        def kl(policy: Tensor) -> Tensor:
            return (policy.exp() * (policy - optimum)).sum(-1)

        return (kl(logprobs) / kl(self.ref_logprobs)).clamp(min=0)  # below 0 by rounding only


def gaussian_bandits(
    seeds: Sequence[int],
    num_arms: int,
    beta: float,
    *,
    reward_sd: float = 1.0,
    ref_sd: float = 1.0,
) -> Bandits:
    """One problem a seed: r ~ N(0, reward_sd^2), pi_ref = softmax(N(0, ref_sd^2))."""
    draws = torch.stack(
        [
            torch.randn(
                2, num_arms, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
            for seed in seeds
        ]
    )
    return Bandits(reward_sd * draws[:, 0], (ref_sd * draws[:, 1]).log_softmax(-1), beta)


def policies(
    start: Tensor, direction: Direction, step: float | Tensor, iterations: int
) -> Iterator[Tensor]:
    """Log-probabilities (S, K) before the first update and after each: iterations + 1 of them.

    start: (S, K) logits. step: a number, or (S, 1).
    """
    logits = start
    for _ in range(iterations):
        logprobs = logits.log_softmax(-1)
        yield logprobs
        logits = logits + step * direction(logprobs)
    yield logits.log_softmax(-1)


def relative_kl_at(
    marks: Sequence[int], bandits: Bandits, direction: Direction, step: float | Tensor
) -> Tensor:
    """(len(marks), S) relative KL after so many updates from pi_ref; marks ascending."""
    wanted = set(marks)
    run = policies(bandits.ref_logprobs, direction, step, marks[-1])
    return torch.stack([bandits.relative_kl(lp) for k, lp in enumerate(run) if k in wanted])


def expected_score(weights: Tensor, logprobs: Tensor) -> Tensor:
    """(S, K) sum over arms of weights (S, K) times the gradient of log pi in the logits."""
    return weights - logprobs.exp() * weights.sum(-1, keepdim=True)


def off_policy_agro(bandits: Bandits, law: Tensor) -> Direction:
    """Exact AGRO on data of `law` (S, K), probabilities: E_law (R - E_law R) score."""

    def direction(logprobs: Tensor) -> Tensor:
        regularized = bandits.regularized(logprobs)
        return law * (regularized - (law * regularized).sum(-1, keepdim=True))

    return direction


def on_policy_agro(bandits: Bandits, lr_weight: float, lr_cap: bool = False) -> Direction:
    """Exact AGRO on the policy's own data, the law of the data differentiated too.

    lr_weight 0 is the KL-regularised policy gradient, 1 the gradient of the on-policy loss.
    lr_cap: lr_weight is lowered to beta / max(R - E R) where that is less, as `agro_coefficients`
    does for a group, here over all arms.
    """

    def direction(logprobs: Tensor) -> Tensor:
        policy, regularized = logprobs.exp(), bandits.regularized(logprobs)
        deviation = regularized - (policy * regularized).sum(-1, keepdim=True)
        if lr_weight == 0:
            return policy * deviation
        weight: float | Tensor = lr_weight
        if lr_cap:
            largest = deviation.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
            weight = (bandits.beta / largest).clamp(max=lr_weight)
        squares = deviation**2
        centred = squares - (policy * squares).sum(-1, keepdim=True)
        return policy * (deviation - weight / (2 * bandits.beta) * centred)

    return direction


class Groups(NamedTuple):
    """What a coefficient function sees of one step's samples, B = S * G * n rows."""

    rewards: Tensor  # (B,)
    logprobs: Tensor  # (B,), under the current policy
    ref_logprobs: Tensor  # (B,)
    groups: Tensor  # (B,) int64


class Sampler:
    """G groups of n arms a step for each of S problems, and the update that they give."""

    def __init__(self, bandits: Bandits, num_groups: int, group_size: int, seed: int) -> None:
        self.bandits = bandits
        self.num_groups = num_groups  # per problem; coefficients are to be divided by it
        num_problems = bandits.rewards.shape[0]
        self.num_rows = num_groups * group_size  # per problem
        self.groups = torch.arange(num_problems * num_groups).repeat_interleave(group_size)
        self.generator = torch.Generator().manual_seed(seed)

    def direction(
        self, law: Tensor, logprobs: Tensor, coefficients: Callable[[Groups], Tensor]
    ) -> Tensor:
        """(S, K) minus the gradient of sum_b coefficients[b] * logprob of row b.

        law: (S, K), probabilities that the arms are drawn from.
        """
        arms = law.multinomial(self.num_rows, replacement=True, generator=self.generator)

        def of_rows(values: Tensor) -> Tensor:
            return values.gather(1, arms).flatten()

        bandits = self.bandits
        samples = Groups(
            of_rows(bandits.rewards), of_rows(logprobs), of_rows(bandits.ref_logprobs), self.groups
        )
        per_arm = torch.zeros_like(logprobs).scatter_add_(
            1, arms, coefficients(samples).view_as(arms)
        )
        return -expected_score(per_arm, logprobs)


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """Rows of the same keys; floats with six digits."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _text(value) for key, value in row.items()} for row in rows)
    return path


def print_table(rows: Sequence[Row]) -> None:
    """Aligned columns under their names."""
    lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
