"""What n completions of a prompt say about k of them, and how sure a mean over prompts is."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations
from math import comb

import torch
from torch import Tensor


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of the n completions, drawn without replacement, hold a correct one: the
    unbiased estimate 1 - C(n - c, k) / C(n, k) of passing with k samples (Chen et al. 2021)."""
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to the {n} completions of a prompt, got {k}")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def majority_at_k(
    answers: Sequence[Hashable | None],
    correct: Sequence[bool],
    k: int,
    *,
    generator: torch.Generator,
    draws: int = 200,
) -> float:
    """Probability that the most frequent answer of k completions is correct.

    The mean over all choices of k of the n completions, or over `draws` random ones where there are
    more. An answer of None does not vote; answers with equally many votes are as likely as each
    other; without any vote the prompt is failed. Equal answers are correct together: the share of
    correct ones counts.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to the {n} completions of a prompt, got {k}")
    picks: list[Sequence[int]] = []
    if comb(n, k) <= draws:
        picks.extend(combinations(range(n), k))
    else:
        order = torch.rand(draws, n, generator=generator, dtype=torch.float64).argsort(1)
        picks.extend(order[:, :k].tolist())
    votes = [_majority([answers[i] for i in pick], [correct[i] for i in pick]) for pick in picks]
    return sum(votes) / len(votes)


def _majority(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    right = Counter(a for a, good in zip(answers, correct, strict=True) if good)
    winners = [answer for answer, count in votes.items() if count == most]
    return sum(right[answer] / most for answer in winners) / len(winners)


def bootstrap_interval(
    values: Sequence[float], *, seed: int, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values`, one a prompt, over resamples of the prompts."""
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means: Tensor = torch.stack(
        [
            data[torch.randint(len(data), (len(data),), generator=generator)].mean()
            for _ in range(resamples)
        ]
    )
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
