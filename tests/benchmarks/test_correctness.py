"""A wrong result is objected to, whichever it is."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.head import correctness
from benchmarks.head.providers.base import Results, Step, make_inputs
from benchmarks.head.providers.ours import Ours
from benchmarks.measure.shapes import SMOKE_SHAPE, SMOKE_SOFTCAP_SHAPE, Shape


def spoil_logprobs(results: Results) -> None:
    assert results.logprobs is not None
    results.logprobs += 0.1


def spoil_entropy(results: Results) -> None:
    assert results.entropy is not None
    results.entropy += 0.1


def spoil_dhidden(results: Results) -> None:
    assert results.dhidden is not None
    results.dhidden[-1] += 0.1 * results.dhidden.norm()


def spoil_dweight(results: Results) -> None:
    assert results.dweight is not None
    results.dweight *= 0.9


@pytest.mark.parametrize("spoil", [spoil_logprobs, spoil_entropy, spoil_dhidden, spoil_dweight])
@pytest.mark.parametrize("shape", [SMOKE_SHAPE, SMOKE_SOFTCAP_SHAPE], ids=lambda s: s.name)
def test_a_wrong_result_is_objected_to(spoil: Callable[[Results], None], shape: Shape) -> None:
    step = Step(Ours(), "forward_backward", make_inputs(shape, torch.float32), with_entropy=True)
    step()
    assert correctness.objection(step, torch.float32) is None
    spoil(step.results())  # views of what the step holds
    assert (correctness.objection(step, torch.float32) or "").startswith("wrong:")


def test_nan_is_beyond_the_limits() -> None:
    found = correctness.Errors(logprob_error=float("nan"))
    assert correctness.beyond_limits(found, torch.bfloat16) is not None
