"""Every wrong argument is named, with what was expected and what came, before any work is done."""

from typing import Any

import numpy as np
import pytest
import torch

from agro_kernels import (
    linear_logprobs,
    linear_logprobs_with_entropy,
    linear_logprobs_with_stats,
    selective_logprobs,
    weighted_logprob_sum,
)

HEAD_OPS = [linear_logprobs, linear_logprobs_with_entropy, linear_logprobs_with_stats]


def good() -> dict[str, object]:
    return {
        "hidden": torch.randn(2, 3, 8),
        "weight": torch.randn(20, 8),
        "targets": torch.randint(0, 20, (2, 3)),
    }


HEAD_CASES = [
    ({"hidden": [1.0]}, TypeError, "hidden: expected a torch.Tensor, got list"),
    ({"hidden": torch.ones(2, 3, 8).long()}, TypeError, "hidden: expected .* got torch.int64"),
    ({"hidden": torch.randn(2, 3, 7)}, ValueError, r"hidden: .*\(..., 8\).* got \(2, 3, 7\)"),
    ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden: .*\(..., 8\).* got \(\)"),
    ({"weight": None}, TypeError, "weight: expected a torch.Tensor, got NoneType"),
    ({"weight": torch.randn(8)}, ValueError, r"weight: expected shape \(V, D\).* got \(8,\)"),
    ({"weight": torch.randn(0, 8)}, ValueError, r"weight: .*V > 0, got \(0, 8\)"),
    (
        {"weight": torch.randn(20, 8).bfloat16()},
        TypeError,
        "weight: expected torch.float32 as hidden, got torch.bfloat16; .*autocast",
    ),
    (
        {"weight": torch.empty(20, 8, device="meta")},
        ValueError,
        "weight: expected device cpu as hidden, got meta",
    ),
    (
        {"targets": torch.zeros(2, 4).long()},
        ValueError,
        r"targets: expected shape \(2, 3\) to match hidden \(2, 3, 8\), got \(2, 4\); shift",
    ),
    ({"targets": torch.zeros(2, 3)}, TypeError, "targets: expected int32 or int64.*torch.float32"),
    ({"bias": torch.randn(8)}, ValueError, r"bias: expected shape \(V,\) = \(20,\).* got \(8,\)"),
    ({"bias": torch.randn(20).half()}, TypeError, "bias: expected torch.float32.*torch.float16"),
    ({"bias": 1.0}, TypeError, "bias: expected a torch.Tensor, got float"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got 0.0"),
    ({"temperature": float("nan")}, ValueError, "temperature: expected .* got nan"),
    ({"temperature": float("inf")}, ValueError, "temperature: expected .* got inf"),
    ({"temperature": "1"}, TypeError, "temperature: expected a float or a tensor, got str"),
    (
        {"temperature": torch.ones(3)},
        ValueError,
        r"temperature: .*shape of targets \(2, 3\), got \(3,\)",
    ),
    ({"temperature": torch.ones(2, 3).long()}, TypeError, "temperature: .* got torch.int64"),
    (
        {"temperature": torch.ones(2, 3, requires_grad=True)},
        ValueError,
        r"temperature: expected a tensor without gradient.*temperature.detach\(\)",
    ),
    ({"softcap": 0.0}, ValueError, "softcap: expected a finite number > 0, got 0.0; pass None"),
    ({"temperature": 1e-39}, ValueError, "temperature: .* from 1e-30 to 1e.30, .* got 1e-39; for"),
    ({"temperature": 10**400}, ValueError, "temperature: expected a finite number > 0, got inf"),
    (
        {"temperature": torch.full((2, 3), 1e-39).double()},
        ValueError,
        "temperature: expected numbers from 1e-30 to 1e.30, which fp32 can divide by, got",
    ),
    ({"softcap": 1e-300}, ValueError, "softcap: .* from 1e-30 to 1e.30, .* got 1e-300; pass None"),
    ({"softcap": 1e39}, ValueError, "softcap: expected a number from 1e-30 to 1e.30, .* got 1e.39"),
    ({"softcap": "30"}, TypeError, "softcap: expected a float or None, got str"),
    ({"softcap": np.bool_(True)}, TypeError, "softcap: expected a float or None, got bool"),
    ({"hidden": torch.ones(2, 3, 0), "weight": torch.ones(20, 0)}, ValueError, "weight: .* D > 0"),
    ({"round_logits": ["bf16"]}, ValueError, r'round_logits: expected "bf16", .* got \[.bf16.\]'),
    ({"ignore_index": 2**63}, ValueError, "ignore_index: expected an int of 64 bits, got 9223372"),
    ({"softcap": True}, TypeError, "softcap: expected a float or None, got bool"),
    ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got NoneType"),
]


@pytest.mark.parametrize("op", HEAD_OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize(("change", "error", "message"), HEAD_CASES)
def test_head_ops_reject(op, change, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        op(**(good() | change))


@pytest.mark.parametrize(("change", "error", "message"), HEAD_CASES)
def test_weighted_logprob_sum_rejects(change, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        weighted_logprob_sum(**(good() | {"coefficients": torch.ones(2, 3)} | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": None}, TypeError, "logits: expected a torch.Tensor, got NoneType"),
        ({"logits": torch.ones(2, 3, 20).long()}, TypeError, "logits: .* got torch.int64"),
        ({"logits": torch.ones(2, 3, 0)}, ValueError, r"logits: .*V > 0, got \(2, 3, 0\)"),
        (
            {"targets": torch.zeros(2, 2).long()},
            ValueError,
            r"targets: expected shape \(2, 3\) to match logits \(2, 3, 20\), got \(2, 2\)",
        ),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number > 0, got -1.0"),
        ({"temperature": 1e-39}, ValueError, "temperature: expected a number from 1e-30 to 1e.30"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an int, got float"),
    ],
)
def test_selective_logprobs_rejects(change, error, message) -> None:  # type: ignore[no-untyped-def]
    arguments = {"logits": torch.randn(2, 3, 20), "targets": torch.zeros(2, 3).long()}
    with pytest.raises(error, match=message):
        selective_logprobs(**(arguments | change))


@pytest.mark.parametrize("op", HEAD_OPS, ids=lambda op: op.__name__)
def test_good_arguments_pass(op) -> None:  # type: ignore[no-untyped-def]
    op(**good(), bias=torch.zeros(20), temperature=1, softcap=30, ignore_index=0)


@pytest.mark.parametrize("of", [np.float16, np.float32, np.float64, np.int32, int])
def test_numbers_of_numpy_are_numbers(of: Any) -> None:
    arguments: Any = good()
    ours = linear_logprobs(**arguments, temperature=of(2), softcap=of(3), ignore_index=np.int16(4))
    same = linear_logprobs(**arguments, temperature=2.0, softcap=3.0, ignore_index=4)
    assert torch.equal(ours, same)
    logits, targets = torch.randn(2, 3, 20), arguments["targets"]
    ours = selective_logprobs(logits, targets, temperature=of(2), ignore_index=np.int64(4))
    assert torch.equal(ours, selective_logprobs(logits, targets, temperature=2.0, ignore_index=4))


@pytest.mark.parametrize("number", [1e-30, 1e30])
def test_the_smallest_and_the_largest_number_work(number: float) -> None:
    """A cap far above the logits is none; one far below makes them equal."""
    arguments: Any = good()
    plain = linear_logprobs(**arguments)
    uniform = torch.full_like(plain, 1 / 20).log()
    capped = linear_logprobs(**arguments, softcap=number)
    torch.testing.assert_close(capped, plain if number > 1 else uniform)
    divided = linear_logprobs(**arguments, temperature=number)
    same = linear_logprobs(**arguments, temperature=torch.full((2, 3), number))
    for results in (divided, same):
        assert not results.isnan().any()
        if number > 1:
            torch.testing.assert_close(results, uniform)
