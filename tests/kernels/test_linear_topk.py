"""linear_topk: against the full logits, and its ids in linear_logprobs."""

from typing import Any

import pytest
import torch

from agro_kernels import linear_logprobs, linear_topk, reference
from tests.numerics import assert_close_to_truth, head_inputs

pytestmark = pytest.mark.usefixtures("small_tiles")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 100, 203])
def test_values_match_truth_and_ids_are_theirs(k: int, dtype: torch.dtype) -> None:
    """k above the 64 columns of a tile, and all."""
    inputs = head_inputs(21, 19, 203, dtype=dtype, bias=True)
    options: dict[str, Any] = {"softcap": 9.0, "temperature": torch.linspace(0.5, 2.0, 21)}
    ours = linear_topk(inputs.hidden, inputs.weight, k, bias=inputs.bias, **options)
    assert inputs.bias is not None
    exact = inputs.hidden.double(), inputs.weight.double(), inputs.bias.double()
    truth = reference.logits_of(*exact, **options).log_softmax(-1)
    plain = reference.logits_of(inputs.hidden, inputs.weight, inputs.bias, **options)
    of_plain = plain.log_softmax(-1).topk(k).values
    assert ours.logprobs.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert_close_to_truth(ours.logprobs, truth.topk(k).values, of_plain)
    assert_close_to_truth(ours.logprobs, truth.gather(1, ours.ids), of_plain)
    assert_close_to_truth(
        ours.lse, reference.logits_of(*exact, **options).logsumexp(1), plain.logsumexp(1)
    )
    assert (ours.logprobs.diff() <= 0).all()
    assert all(row.unique().numel() == k for row in ours.ids)


def test_argmax_and_leading_axes() -> None:
    inputs = head_inputs(24, 8, 203)
    ours = linear_topk(inputs.hidden.view(2, 3, 4, 8), inputs.weight, 1)
    logits = inputs.hidden @ inputs.weight.T
    assert torch.equal(ours.ids.view(24), logits.argmax(1))
    assert ours.logprobs.shape == (2, 3, 4, 1) and ours.lse.shape == (2, 3, 4)
    assert linear_topk(inputs.hidden[:0], inputs.weight, 5).ids.shape == (0, 5)


def test_ids_give_differentiable_logprobs() -> None:
    inputs = head_inputs(9, 8, 203)
    copy = inputs.in_dtype(torch.float32)
    top = linear_topk(copy.hidden, copy.weight, 5)
    assert not top.logprobs.requires_grad
    logprobs = linear_logprobs(copy.hidden, copy.weight, top.ids)
    torch.testing.assert_close(logprobs, top.logprobs)
    logprobs.sum().backward()
    assert copy.hidden.grad is not None


def test_what_is_not_kept_or_banned_is_not_there() -> None:
    inputs = head_inputs(3, 8, 203, bias=True)
    kept_ids = torch.tensor([[3, 190, -1], [70, 71, 72], [-1, -1, -1]])
    ours = linear_topk(inputs.hidden, inputs.weight, 3, kept_ids=kept_ids)
    assert set(ours.ids[0].tolist()) == {3, 190, -1} and ours.ids[0, 2] == -1
    assert ours.logprobs[0, 2] == -torch.inf
    assert set(ours.ids[1].tolist()) == {70, 71, 72}
    torch.testing.assert_close(ours.logprobs[:2].exp().sum(1), torch.ones(2))
    bias = torch.full((203,), -torch.inf)
    bias[[5, 150]] = 0.0
    ours = linear_topk(inputs.hidden, inputs.weight, 4, bias=bias)
    assert (ours.ids[:, 2:] == -1).all() and (ours.ids[:, :2].sum(1) == 155).all()


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k: expected an int from 1 to the vocabulary's 20, got 0; 1 is"),
        (21, ValueError, "k: expected an int from 1 to the vocabulary's 20, got 21; 1 is"),
        (1.0, TypeError, "k: expected an int, got float"),
        (True, TypeError, "k: expected an int, got bool"),
    ],
)
def test_rejects(k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_topk(torch.randn(3, 8), torch.randn(20, 8), k)
