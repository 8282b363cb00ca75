"""The on-policy landscape: the two-arm ridge, the success-rate rule, the basin and the speed."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from agro_train import experiments
from agro_train.cli import main
from agro_train.experiments import tabular
from agro_train.experiments.landscape import speed, success_rate, two_arms
from agro_train.experiments.landscape.methods import METHODS, direction_of

README = Path(__file__).parents[3] / "docs" / "experiments" / "README.md"
RATES = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with experiments.one_thread():
        yield


def test_two_arm_descent_converges_inside_the_ridge_and_not_outside() -> None:
    starts = torch.tensor([2.39, 2.41, -2.39, -2.41], dtype=torch.float64)
    ends = two_arms.descend_two_arms("exact", starts, 2_000).tolist()
    assert abs(ends[0]) < 1e-6
    assert abs(ends[2]) < 1e-6
    assert ends[1] > 5
    assert ends[3] < -5


def test_two_arm_loss_falls_along_the_exact_direction() -> None:
    """The formula that is drawn is the loss whose gradient is followed."""
    z = torch.tensor([-4.0, -1.0, 0.5, 2.3994, 3.0], dtype=torch.float64).requires_grad_()
    slope = torch.autograd.grad(two_arms.two_arm_loss(z).sum(), z)[0]
    direction = direction_of("exact", two_arms.two_arm_bandits(5))
    logprobs = two_arms.two_arm_logits(z.detach()).log_softmax(-1)
    # A logit of z / 2 moves by direction: the derivative in z is half that of the two logits.
    assert float((direction(logprobs)[:, 0] + slope).abs().max()) < 1e-12


@pytest.mark.parametrize("beta", success_rate.BETAS)
def test_success_speed_of_the_ops_coefficients_is_the_rule(beta: float) -> None:
    exact = success_rate.success_speed(METHODS["exact"], beta, RATES)
    assert float((exact - (1 + (2 * RATES - 1) / (2 * beta))).abs().max()) < 1e-12
    assert (exact > 0).tolist() == (0.5 - beta < RATES).tolist()
    gradient = success_rate.success_speed(METHODS["policy_gradient"], beta, RATES)
    assert float((gradient - 1).abs().max()) < 1e-12
    assert bool((success_rate.success_speed(METHODS["capped"], beta, RATES) > 0).all())


def test_success_rates_part_at_the_rule_in_training() -> None:
    parted = success_rate.TRAINED_STARTS
    ends = success_rate.train_success_rates("exact", 300)[-1].tolist()
    for start, end in zip(parted, ends, strict=True):
        assert end > 0.9 if start > 0.5 - success_rate.TRAINED_BETA else end < 0.1
    for name in ("capped", "policy_gradient"):
        run = success_rate.train_success_rates(name, 300)
        assert bool((run.diff(dim=0) > 0).all())
        assert bool((run[-1] > 0.9).all())


@pytest.mark.parametrize("name", list(speed.LABELS))
def test_updates_needed_are_the_fewest_over_the_steps(name: str) -> None:
    def needed(seeds: list[int], limit: int) -> list[int | None]:
        bandits = tabular.gaussian_bandits(seeds, num_arms=5, beta=1.0, reward_sd=0.5)
        return speed.updates_needed(name, bandits, limit)

    (count,) = needed([0], 1_000)
    assert count is not None
    assert count > 1
    assert needed([0], count) == [count]
    assert needed([0], count - 1) == [None]
    assert needed([0, 1, 2], 1_000) == [count, *needed([1], 1_000), *needed([2], 1_000)]


def test_quick_run_holds_and_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "landscape", "--quick", f"output_dir={tmp_path}"]) == 0
    assert "FAILS" not in capsys.readouterr().out
    for question in ("two_arms", "success_rate", "basin", "speed"):
        assert (tmp_path / f"landscape_{question}.png").stat().st_size > 0
    with (tmp_path / "landscape_basin.csv").open(newline="") as file:
        basin = {
            row["method"]: [int(value) for key, value in row.items() if key.startswith("sd")]
            for row in csv.DictReader(file)
            if row["updates"] == "exact"
        }
    assert basin["capped"] == basin["policy_gradient"] == [10, 10, 10]
    assert basin["exact"][0] == 10
    assert basin["exact"][2] == 0


def test_readme_has_the_results_of_the_committed_run() -> None:
    readme = README.read_text()
    results = README.parent / "results"
    with (results / "landscape_basin.csv").open(newline="") as file:
        basin_rows = [list(row.values()) for row in csv.DictReader(file)]
    needed: dict[tuple[int, float, str], list[int | None]] = {}
    with (results / "landscape_speed.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            setting = int(row["arms"]), float(row["beta"]), row["method"]
            count = int(row["updates"]) if row["updates"] else None
            needed.setdefault(setting, []).append(count)
    speed_rows = [list(row.values()) for row in speed.summary(needed)]
    for values in basin_rows + speed_rows:
        assert "| " + " | ".join(map(str, values)) + " |" in readme, values
