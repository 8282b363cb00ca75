"""pass@k, maj@k and the bootstrap against enumeration and known answers."""

from itertools import combinations
from statistics import fmean

import pytest
import torch

from agro_train.evaluate import bootstrap_interval, majority_at_k, pass_at_k


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_mean_over_all_choices(n: int) -> None:
    for correct in range(n + 1):
        marks = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            expected = fmean(any(choice) for choice in combinations(marks, k))
            assert pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-12)


def test_k_beyond_the_completions_is_refused() -> None:
    with pytest.raises(ValueError, match="k: expected 1 to the 4 completions of a prompt, got 5"):
        pass_at_k(4, 1, 5)
    with pytest.raises(ValueError, match="k: expected 1 to the 1 completions of a prompt, got 2"):
        majority_at_k(["1"], [True], 2, generator=torch.Generator())


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["1", "2", "1"], "1", 1.0),
        (["1", "2", "1"], "2", 0.0),
        (["1", "2"], "2", 0.5),  # a tie
        (["1", None, None], "1", 1.0),  # None does not vote
        ([None, None], "1", 0.0),
    ],
)
def test_majority_of_all(answers: list[str | None], right: str, expected: float) -> None:
    correct = [answer == right for answer in answers]
    found = majority_at_k(answers, correct, len(answers), generator=torch.Generator())
    assert found == expected


def test_majority_of_fewer_is_the_mean_over_all_choices_or_approaches_it() -> None:
    answers = ["1", "1", "1", "2", "2", "3", None]
    correct = [answer == "1" for answer in answers]
    whole = torch.Generator()
    exact = fmean(
        majority_at_k([answers[i] for i in c], [correct[i] for i in c], 3, generator=whole)
        for c in combinations(range(7), 3)
    )
    generator = torch.Generator().manual_seed(0)
    assert majority_at_k(answers, correct, 3, generator=generator) == pytest.approx(
        exact, abs=1e-12
    )
    # 30 draws of the 35 choices are drawn anew each time.
    found = [majority_at_k(answers, correct, 3, generator=generator, draws=30) for _ in range(130)]
    assert len(set(found)) > 1
    assert fmean(found) == pytest.approx(exact, abs=4 * 0.5 / 3900**0.5)  # four standard errors


def test_bootstrap_interval_is_seeded_and_as_wide_as_the_normal_one() -> None:
    values = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_interval(values.tolist(), seed=1)
    assert (low, high) == bootstrap_interval(values.tolist(), seed=1)
    assert (low, high) != bootstrap_interval(values.tolist(), seed=2)
    mean, half = float(values.mean()), 1.96 * float(values.std()) / 10
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)
    assert bootstrap_interval([1.0, 1.0], seed=0) == (1.0, 1.0)
