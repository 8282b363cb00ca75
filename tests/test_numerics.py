"""The tolerance law refuses what it should refuse."""

import pytest
import torch

from tests.numerics import assert_close_to_truth, head_inputs, plain_linear_logprobs

TRUTH = torch.tensor([1.0, -2.0, 0.5, -torch.inf], dtype=torch.float64)


def test_accepts_a_rounded_truth_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert_close_to_truth(TRUTH.to(dtype), TRUTH, TRUTH)


def test_allows_a_few_times_the_error_of_plain_torch() -> None:
    plain = TRUTH + torch.tensor([0.0, 1e-3, 0.0, 0.0])
    assert_close_to_truth((TRUTH + 3.9e-3).float(), TRUTH, plain)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close_to_truth((TRUTH + 4.1e-3).float(), TRUTH, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, 1.00001), "largest error 1.0"),
        ((0, torch.nan), "largest error inf"),
        ((0, torch.inf), "largest error inf"),
        ((3, -1e30), "infinities differ"),
        ((3, torch.nan), "infinities differ"),
    ],
)
def test_refuses(change: tuple[int, float], message: str) -> None:
    ours = TRUTH.float()
    ours[change[0]] = change[1]
    with pytest.raises(AssertionError, match=message):
        assert_close_to_truth(ours, TRUTH, TRUTH)


def test_exact_zeros_have_to_be_exact() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close_to_truth(torch.tensor([0.0, 1e-30, 0.0]), zeros, zeros)


def test_plain_program_drops_ignored_rows() -> None:
    inputs = head_inputs(8, 4, 20, ignored=True)
    for result in plain_linear_logprobs(inputs.hidden, inputs.weight, inputs.targets):
        assert result.isfinite().all()
        assert (result[inputs.targets == -100] == 0.0).all()
