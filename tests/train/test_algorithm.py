"""Algorithms: the table, and a function of the user's own, as docs/algorithms.md says."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agro_kernels import POLICY_GRADIENT_FORMS, policy_gradient_coefficients
from agro_train import settings
from agro_train.algorithm import ALGORITHMS, coefficients, load_algorithm, try_algorithm
from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.data.rows import read_jsonl
from agro_train.refusal import Refusal
from agro_train.types import Scores

pytestmark = pytest.mark.usefixtures("no_curves")

DOCS = Path(__file__).parents[2] / "docs"
CONFIG = TrainConfig(beta=0.3, prompts_per_step=3, num_generations=2)
NAN = float("nan")


def made_up_scores() -> Scores:
    """Three groups of 3, 2 and 1 completions, one of the first without a reward."""
    return Scores(
        rewards=torch.tensor([1.0, 0.5, NAN, 0.0, 1.0, 1.0], dtype=torch.float64),
        logprobs=torch.tensor([-3.0, -2.0, -5.5, -4.0, -1.0, -2.0], dtype=torch.float64),
        ref_logprobs=torch.tensor([-4.0, -2.0, -5.0, -4.5, -4.0, -3.0], dtype=torch.float64),
        sampling_logprobs=torch.full((6,), NAN, dtype=torch.float64),
        lengths=torch.full((6,), 2),
        groups=torch.tensor([7, 7, 7, 3, 3, 5]),
        on_policy=torch.ones(6, dtype=torch.bool),
        entropy=torch.tensor(15.0, dtype=torch.float64),
        num_tokens=torch.tensor(10),
    )


def test_configuration_knows_the_algorithms_of_the_table() -> None:
    assert tuple(ALGORITHMS) == settings.ALGORITHMS


def test_every_form_that_needs_no_sampler_is_in_the_table() -> None:
    scores = made_up_scores()
    data = (scores.rewards, scores.logprobs, scores.ref_logprobs, scores.groups)
    forms = [
        name for name, form in POLICY_GRADIENT_FORMS.items() if not form.needs_sampling_logprobs
    ]
    assert {"agro", *(f"pg_{form}" for form in forms)} == set(ALGORITHMS)
    for form in forms:
        ours, _ = coefficients(scores, replace(CONFIG, algorithm=f"pg_{form}"))
        assert torch.equal(ours, policy_gradient_coefficients(*data, beta=0.3, form=form))


# What a user might write; each is called by its name in this module.


def all_ones(scores: Scores, config: TrainConfig) -> Tensor:
    return torch.ones(len(scores.rewards))


def one_for_all(scores: Scores, config: TrainConfig) -> Tensor:
    return torch.zeros(())


def integers(scores: Scores, config: TrainConfig) -> Tensor:
    return torch.zeros(len(scores.rewards), dtype=torch.int64)


def a_list(scores: Scores, config: TrainConfig) -> list[float]:
    return [0.0] * len(scores.rewards)


def rewards_as_they_are(scores: Scores, config: TrainConfig) -> Tensor:
    return -scores.rewards


def divided_by_their_spread(scores: Scores, config: TrainConfig) -> Tensor:
    rewards = scores.rewards.nan_to_num(0.0).reshape(-1, config.num_generations)
    apart = rewards - rewards.mean(1, keepdim=True)
    return (-apart / apart.std(1, keepdim=True)).flatten()


NOT_A_FUNCTION = 3


def own(function: Callable[..., object]) -> str:
    return f"{__name__}:{function.__name__}"


def test_own_function_decides_the_coefficients_and_statistics_stay_agros() -> None:
    scores = made_up_scores()
    ours, stats = coefficients(scores, replace(CONFIG, algorithm=own(all_ones)))
    assert torch.equal(ours, torch.ones(6, dtype=torch.float64))
    assert stats == coefficients(scores, CONFIG)[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:f", "expected an importable module in 'nowhere:f', got none .* Python path"),
        (f"{__name__}:absent", "expected a function absent in .*test_algorithm.py, got None"),
        (f"{__name__}:NOT_A_FUNCTION", "expected a function NOT_A_FUNCTION in .*, got 3"),
        (f"{__name__}:", "expected module:function, got 'tests.train.test_algorithm:'"),
        (own(a_list), r"expected a tensor of 6 coefficients from .*a_list, got list"),
        (own(one_for_all), r"expected \(6,\) floating-point coefficients .*, got \(\) of"),
        (own(integers), r"expected \(6,\) floating-point .*, got \(6,\) of torch.int64"),
        (
            own(rewards_as_they_are),
            "expected finite coefficients .*, got nan for completion 6 of 6, whose",
        ),
        (
            own(divided_by_their_spread),
            "expected finite coefficients .*, got nan for completion 1 of 6",
        ),
    ],
)
def test_function_that_cannot_serve_is_refused_before_anything_is_loaded(
    name: str, message: str
) -> None:
    with pytest.raises(Refusal, match=f"^algorithm: {message}"):
        try_algorithm(replace(CONFIG, algorithm=name))


def test_module_that_fails_shows_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing_algorithm.py").write_text("raise KeyError('beta')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match="got KeyError\\('beta'\\) while it was imported"):
        load_algorithm("failing_algorithm:f")
    assert "failing_algorithm.py" in capsys.readouterr().err


def test_page_example_trains_and_is_the_policy_gradient_over_the_standard_deviation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (DOCS / "algorithms.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    (tmp_path / "my_algorithm.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    (name,) = re.findall(r"algorithm=(\w+:\w+)", page)
    config = replace(CONFIG, algorithm=name)
    try_algorithm(config)
    scores = made_up_scores()
    ours, _ = coefficients(scores, config)
    loo, _ = coefficients(scores, replace(CONFIG, algorithm="pg_loo"))  # averaged over two groups
    regularised = scores.rewards - 0.3 * (scores.logprobs - scores.ref_logprobs)
    for rows in ([0, 1], [3, 4]):
        expected = loo[rows] * (2 - 1) / 2 / (regularised[rows].std() + 1e-4) * 2 / 3
        torch.testing.assert_close(ours[rows], expected)
    assert ours[2] == ours[5] == 0.0
    settings = ["steps=1", "warm_start_steps=0", "prompts_per_step=2", "num_generations=4"]
    more = ["eval_every=0", "beta=0.01", f"algorithm={name}", f"output_dir={tmp_path / 'run'}"]
    rewards = "reward=tests.train.reward_functions:even_share"
    monkeypatch.syspath_prepend(DOCS.parent)
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    assert main(["train", "tiny-arithmetic", *settings, *more, rewards]) == 0
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["grad_norm"] > 0
