"""The Triton kernel of the logits of given ids, by Triton's interpreter or on a GPU, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from agro_kernels._torch import linear_logprobs as blocked
from agro_kernels._triton import target_logprobs as kernels
from agro_kernels.head import Head
from tests.conftest import SetSizes
from tests.kernels.test_triton_linear_logprobs import DEVICE, DTYPES, OPTIONS, case, dtype_id
from tests.numerics import assert_close_to_truth

SHAPE = (11, 40, 75)  # N, D, V

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def several_blocks(set_sizes: SetSizes) -> None:
    """The last of them not whole, over the ids and over D."""
    set_sizes(kernels, BLOCK_IDS=4, BLOCK_D=16)


def in_float64(head: Head) -> Head:
    """The same numbers; rounding to a 16-bit dtype stays."""
    return head._replace(
        hidden=head.hidden.double(),
        weight=head.weight.double(),
        bias=None if head.bias is None else head.bias.double(),
    )


def lse_of(head: Head) -> Tensor:
    """(N,) fp32, any numbers."""
    return torch.linspace(-3.0, 9.0, head.targets.shape[0], device=DEVICE)


def plain(head: Head, ids: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch, in fp32: what a program without the kernel computes."""
    return blocked.many_target_logprobs(head, ids, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("options", OPTIONS)
def test_matches_float64(options: str, dtype: torch.dtype) -> None:
    inputs, keywords = case(options, SHAPE, dtype)
    head = inputs.head(**keywords)
    lse = lse_of(head)
    ours = kernels.target_logprobs(head, lse)
    assert ours.dtype == torch.float32
    assert (ours[head.targets == -100] == 0).all()
    _, truth = plain(in_float64(head), head.targets[:, None], lse.double())
    _, other = plain(head, head.targets[:, None], lse)
    assert_close_to_truth(ours, truth[:, 0], other[:, 0])


@pytest.mark.parametrize("options", ["plain", "softcap", "everything"])
def test_many_ids_match_float64(options: str) -> None:
    inputs, keywords = case(options, SHAPE, torch.bfloat16)
    head = inputs.head(**keywords)
    lse = lse_of(head)
    ids = torch.randint(0, SHAPE[2], (SHAPE[0], 6), device=DEVICE)
    ids[2, 1], ids[3] = -100, -100
    ids[head.targets == -100] = -100  # of rows that hold NaN
    ours = kernels.many_target_logprobs(head, ids.int(), lse)
    truth = plain(in_float64(head), ids, lse.double())
    for name, mine, true, other in zip(
        ("logits", "logprobs"), ours, truth, plain(head, ids, lse), strict=True
    ):
        assert mine.shape == ids.shape
        assert (mine[ids == -100] == 0).all()
        assert_close_to_truth(mine, true, other, name)


def test_ids_outside_the_vocabulary_and_bans() -> None:
    inputs, _ = case("plain", SHAPE, torch.float32)
    bias = torch.zeros(SHAPE[2], device=DEVICE)
    bias[7] = -torch.inf
    head = inputs.head()._replace(bias=bias)
    ids = torch.tensor([75, -1, 2**40, 7, 3] + [0] * 6, device=DEVICE)
    logprobs = kernels.target_logprobs(head._replace(targets=ids), lse_of(head))
    assert logprobs[:3].isnan().all() and logprobs[3] == -torch.inf
    assert logprobs[4:].isfinite().all()


def test_strides_do_not_matter() -> None:
    inputs, keywords = case("everything", SHAPE, torch.bfloat16)
    head = inputs.head(**keywords)
    lse = lse_of(head)
    n, d, _ = SHAPE
    strided: dict[str, Any] = {
        "hidden": head.hidden.new_empty(n, 2 * d)[:, ::2].copy_(head.hidden),
        "weight": head.weight.T.contiguous().T,
        "targets": torch.stack([head.targets] * 2, 1)[:, 0],
    }
    ours = kernels.target_logprobs(head._replace(**strided), torch.stack([lse] * 2, 1)[:, 0])
    assert torch.equal(ours, kernels.target_logprobs(head, lse))


def test_no_tokens() -> None:
    inputs, _ = case("plain", (0, 40, 75), torch.float32)
    head = inputs.head()
    assert kernels.target_logprobs(head, torch.empty(0, device=DEVICE)).shape == (0,)
