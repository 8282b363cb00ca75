"""Figure 1: every form's samples average to its expected update, and the quick run shows it."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agro_train import experiments
from agro_train.cli import main
from agro_train.experiments import fig1, tabular
from agro_train.experiments.tabular import Claim, Groups
from tests.enumeration import all_tuples, expectation

RESULTS = Path(__file__).parents[3] / "docs" / "experiments"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with experiments.one_thread():
        yield


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("form", fig1.FORMS)
@pytest.mark.parametrize("n", [2, 3])
def test_samples_average_to_the_expected_update(form: str, n: int) -> None:
    bandits = tabular.gaussian_bandits([7], num_arms=4, beta=0.6)
    logprobs = torch.tensor([[0.3, -1.0, 0.8, 0.1]], dtype=torch.float64).log_softmax(-1)
    law = bandits.ref_logprobs.exp()
    arms, groups = all_tuples(4, n)

    def of_rows(values: Tensor) -> Tensor:
        return values[0, arms]

    samples = Groups(
        of_rows(bandits.rewards), of_rows(logprobs), of_rows(bandits.ref_logprobs), groups
    )
    coefficients = fig1.coefficient_functions(bandits.beta, num_groups=1)[form](samples)
    per_arm = expectation([law[0]] * n, coefficients)[None]
    sampled = -tabular.expected_score(per_arm, logprobs)
    if form == "reward_baseline_exact_kl":
        sampled = sampled - bandits.beta * fig1.kl_gradient(bandits, logprobs)
    exact = fig1.exact_directions(bandits)[form](logprobs)
    assert float((sampled - exact).abs().max()) < 1e-12


def test_kl_gradient_is_autograds() -> None:
    bandits = tabular.gaussian_bandits([1, 2], num_arms=5, beta=1.0)
    logits = torch.randn(2, 5, dtype=torch.float64).requires_grad_()
    logprobs = logits.log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - bandits.ref_logprobs)).sum()
    truth = torch.autograd.grad(kl, logits)[0]
    ours = fig1.kl_gradient(bandits, logprobs.detach())
    assert float((ours - truth).abs().max()) < 1e-12


def test_quick_run_separates_agro_from_the_policy_gradient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 arms, data of pi_ref: AGRO below 1e-6 of the first KL, the exact-KL form above 0.3."""
    assert main(["reproduce", "fig1", "--quick", f"output_dir={tmp_path}"]) == 0
    final = {
        (row["updates"], row["form"], row["seed"]): float(row["relative_kl"])
        for row in rows_of(tmp_path / "fig1_final.csv")
    }
    seeds = {seed for _, _, seed in final}
    assert len(seeds) == 3
    assert {form for _, form, _ in final} == set(fig1.FORMS)
    for seed in seeds:
        assert final["exact", "agro", seed] < 1e-6
        assert final["exact", "reward_baseline_exact_kl", seed] > 0.3
        assert final["sampled", "agro", seed] < 0.05  # on its way after 200 updates
    assert (tmp_path / "fig1.png").stat().st_size > 0
    assert "FAILS" not in capsys.readouterr().out


def test_sampled_loo_is_agro_step_by_step() -> None:
    bandits = tabular.gaussian_bandits([0, 1], num_arms=20, beta=0.3)
    directions = fig1.sampled_directions(bandits)
    agro, loo = (
        tabular.relative_kl_at(range(0, 31, 5), bandits, directions[form], 4.0)
        for form in ("agro", "loo")
    )
    assert float((agro - loo).abs().max()) < 1e-12
    assert bool((agro[-1] < 0.9).all())


def test_a_claim_that_fails_is_said_and_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fig1, "run", lambda *_: [Claim("pigs swim", True), Claim("fly", False)])
    assert main(["reproduce", "fig1", f"output_dir={tmp_path}"]) == 1
    assert capsys.readouterr().out.splitlines()[:2] == ["holds: pigs swim", "FAILS: fly"]
    made_by = json.loads((tmp_path / "fig1_run.json").read_text())
    assert made_by["command"] == "agro reproduce fig1"
    assert made_by["claims"] == {"pigs swim": True, "fly": False}
    assert {"git_commit", "torch", "cpu", "seconds_now"} <= set(made_by)


def test_claims_fail_where_the_curves_say_so() -> None:
    """The curves of AGRO and of the exact-KL form exchanged."""
    ones = torch.ones(2, 3, dtype=torch.float64)
    curves = {
        (kind, 1.0, form): ones if form in ("agro", "loo") else 0 * ones
        for kind in ("exact", "sampled")
        for form in fig1.FORMS
    }
    found = fig1.claims(curves, dict.fromkeys(fig1.FORMS, 0.0), ["exact", "sampled"])
    assert [claim.holds for claim in found] == [False, False, True, False]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["fig9"], f"figure: expected one of {', '.join(experiments.FIGURES)}, got 'fig9'"),
        (["fig1", "seeds=3"], "arguments: expected output_dir=DIR, got 'seeds=3'"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *arguments]) == 2
    assert capsys.readouterr().err == f"agro: {complaint}\n"


def test_settings_may_follow_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "steps=7"]) == 0
    assert "steps: 7\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["reproduce", "fig1", "--quick", "--slow"])


def test_readme_has_the_results_of_the_committed_run() -> None:
    readme = (RESULTS / "README.md").read_text()
    final: dict[tuple[str, float, str], list[float]] = {}
    for row in rows_of(RESULTS / "results" / "fig1_final.csv"):
        key = row["updates"], float(row["beta"]), row["form"]
        final.setdefault(key, []).append(float(row["relative_kl"]))
    curves = {key: torch.tensor([kl], dtype=torch.float64) for key, kl in final.items()}
    for row in fig1.summary_rows(curves):
        assert "| " + " | ".join(map(str, row.values())) + " |" in readme
