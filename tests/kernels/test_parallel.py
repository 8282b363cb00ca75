"""The vocabulary-parallel ops on 2, 3 and 4 processes (gloo, CPU) against one, by the law.

Starting a process costs seconds, so four are started once and every check runs in all of them: in
the groups of ranks 0-1, 0-2 and 0-3. Each writes down what failed; the tests read it.
"""

import contextlib
import datetime
import json
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import agro_kernels
from agro_kernels import (
    linear_logprobs,
    linear_logprobs_with_entropy,
    linear_logprobs_with_stats,
    parallel,
    reference,
    weighted_logprob_sum,
)
from agro_kernels.parallel import VocabularyShards
from tests.kernels.shapes import DTYPES
from tests.numerics import assert_close_to_truth, head_inputs, plain_linear_logprobs

N, D, V = 21, 24, 75
# Rows of the weight on each rank, by the number of ranks: uneven, down to a single row.
SIZES = {2: (40, 35), 3: (10, 64, 1), 4: (31, 1, 3, 40)}
NAMES = ("logprobs", "entropy", "lse", "dhidden", "dweight", "dbias")
Run = dict[str, Tensor | None]  # by NAMES
Outcome = dict[str, dict[str, str]]  # number of ranks -> check -> traceback, or nothing


class Rank:
    """One process's view of a group: its shards, and the whole problem that they are cut from."""

    def __init__(self, shards: VocabularyShards) -> None:
        self.shards = shards
        self.rows = slice(shards.start, shards.start + shards.sizes[shards.rank])

    def part(self, tensor: Tensor | None) -> Tensor | None:
        """This rank's rows of weight (V, D) or bias (V,)."""
        return None if tensor is None else tensor[self.rows].detach().clone()

    def among(self, ours: Tensor, truth: Tensor) -> Tensor:
        """Our rows among the true ones of the others: the law is about the whole tensor."""
        whole = truth.to(ours.dtype, copy=True)
        whole[self.rows] = ours
        return whole

    def assert_same_on_all(self, *tensors: Tensor) -> None:
        """Bit for bit."""
        for tensor in tensors:
            mine = tensor.detach().double().contiguous()
            gathered = [torch.empty_like(mine) for _ in self.shards.sizes]
            dist.all_gather(gathered, mine, group=self.shards.group)
            for other in gathered:
                assert torch.equal(other.nan_to_num(), gathered[0].nan_to_num())


def upstream_of(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logprobs, entropy and lse."""
    c = torch.randn(n, generator=torch.Generator().manual_seed(9))
    return c, 0.3 * c.flip(0), 0.5 * c.roll(1)


def backward(results: tuple[Tensor, ...], leaves: list[Tensor | None], parts: str) -> Run:
    """All of NAMES; parts says which of logprobs, entropy and lse the loss is made of."""
    logprobs, entropy, lse = results
    terms = dict(zip(("logprobs", "entropy", "lse"), results, strict=True))
    upstream = dict(zip(terms, upstream_of(logprobs.numel()), strict=True))
    total = sum(
        (terms[name].flatten() * upstream[name].to(terms[name].dtype)).sum()
        for name in parts.split("+")
    )
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    gradients = iter(torch.autograd.grad(total, wanted))  # type: ignore[arg-type]
    found = [
        next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves
    ]
    return dict(zip(NAMES, (logprobs, entropy, lse, *found), strict=True))


def leaf(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype).clone().requires_grad_()


def whole(inputs: Any, dtype: torch.dtype, parts: str, plain: bool = False, **options: Any) -> Run:
    """The same by one process: the reference, or `plain` torch in a 16-bit dtype."""
    leaves = [leaf(t, dtype) for t in (inputs.hidden, inputs.weight, inputs.bias)]
    hidden, weight, bias = leaves
    assert hidden is not None and weight is not None
    if plain:
        logprobs, lse, entropy = plain_linear_logprobs(
            hidden, weight, inputs.targets, bias=bias, **options
        )
    else:
        logprobs, entropy, lse = reference.linear_logprobs_with_stats(
            hidden, weight, inputs.targets, bias=bias, **options
        )
    return backward((logprobs, entropy, lse), leaves, parts)


def spread(
    rank: Rank,
    inputs: Any,
    dtype: torch.dtype,
    parts: str,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> Run:
    """By the parallel op."""
    leaves = [
        leaf(t, dtype) for t in (inputs.hidden, rank.part(inputs.weight), rank.part(inputs.bias))
    ]
    for name, tensor in zip(("hidden", "weight", "bias"), leaves, strict=True):
        if tensor is not None and name in frozen:
            tensor.requires_grad_(False)
    hidden, weight, bias = leaves
    assert hidden is not None and weight is not None
    results = linear_logprobs_with_stats(
        hidden, weight, inputs.targets, shards=rank.shards, bias=bias, **options
    )
    return backward(tuple(results), leaves, parts)


def compare(
    rank: Rank, inputs: Any, dtype: torch.dtype, parts: str = "logprobs+entropy+lse", **options: Any
) -> Run:
    """The parallel op against the truth, and the same bits on every rank."""
    frozen = options.pop("frozen", ())
    ours = spread(rank, inputs, dtype, parts, frozen, **options)
    options.pop("keep_logits_bytes", None)
    low = dtype in (torch.bfloat16, torch.float16)
    truth = whole(inputs, torch.float64, parts, **options)
    near = whole(inputs, dtype, parts, plain=low, **options)
    for name, our in ours.items():
        if name.removeprefix("d") in frozen or truth[name] is None:
            assert our is None
            continue
        true, pl = truth[name], near[name]
        assert our is not None and true is not None and pl is not None
        if name in ("dweight", "dbias"):
            our = rank.among(our, true)
        assert our.dtype == (dtype if name.startswith("d") or not low else torch.float32)
        assert_close_to_truth(our, true, pl, name)
    same = [ours[name] for name in NAMES[:4]]
    rank.assert_same_on_all(*[tensor for tensor in same if tensor is not None])
    return ours


# --- The checks: each runs in every process of a group --------------------------------------------

CHECKS: dict[str, Callable[[Rank], None]] = {}


def check(function: Callable[[Rank], None]) -> Callable[[Rank], None]:
    CHECKS[function.__name__] = function
    return function


def temperatures() -> Tensor:
    return torch.linspace(0.5, 1.5, N)


@check
def each_dtype(rank: Rank) -> None:
    for dtype in DTYPES:
        compare(rank, head_inputs(N, D, V, dtype=dtype), dtype)


@check
def float64_stays_float64(rank: Rank) -> None:
    """Where the truth is no better than the result; the order of the sums is all that differs."""
    inputs = head_inputs(N, D, V, dtype=torch.float64, bias=True, ignored=True)
    parts = "logprobs+entropy+lse"
    options: dict[str, Any] = {"temperature": temperatures(), "softcap": 5.0}
    ours = spread(rank, inputs, torch.float64, parts, **options)
    exact = whole(inputs, torch.float64, parts, **options)
    for name, our in ours.items():
        expected = exact[name]
        assert our is not None and expected is not None
        expected = expected[rank.rows] if name in ("dweight", "dbias") else expected
        torch.testing.assert_close(our, expected, rtol=1e-12, atol=1e-12)


@check
def all_options_at_once(rank: Rank) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = head_inputs(N, D, V, dtype=dtype, bias=True, ignored=True)
        ours = compare(rank, inputs, dtype, temperature=temperatures(), softcap=5.0)
        out = inputs.targets == -100
        for name in ("logprobs", "entropy", "lse", "dhidden"):
            assert not ours[name][out].any(), name  # type: ignore[index]


@check
def many_targets(rank: Rank) -> None:
    """K ids a token, which several ranks hold; repeats, ignored ids and rows."""
    ids = torch.randint(0, V, (N, 5), generator=torch.Generator().manual_seed(4))
    ids[::3, 2] = ids[::3, 0]
    ids[1::4, 1] = -100
    ids[5] = -100
    c = torch.randn(N, 5, generator=torch.Generator().manual_seed(5))
    of_tokens = c[:, 0].cos()
    options: dict[str, Any] = {"temperature": temperatures(), "softcap": 5.0}
    inputs = head_inputs(N, D, V, bias=True)
    inputs.hidden[5] = torch.nan

    def run(dtype: torch.dtype, shards: VocabularyShards | None = None, **more: Any) -> Any:
        part = rank.part if shards is not None else (lambda tensor: tensor)
        sides = (inputs.hidden, part(inputs.weight), part(inputs.bias))
        leaves = [leaf(tensor, dtype) for tensor in sides]
        hidden, weight, bias = leaves
        assert hidden is not None and weight is not None
        if shards is not None:
            made = linear_logprobs_with_stats(
                hidden, weight, ids, bias=bias, shards=shards, **options, **more
            )
            results = made.logprobs, made.entropy, made.lse
        else:
            results = reference.linear_logprobs_with_stats(
                hidden, weight, ids, bias=bias, **options
            )
        logprobs, entropy, lse = results
        loss = (logprobs * c.to(dtype)).sum() + (lse - 0.3 * entropy) @ of_tokens.to(dtype)
        loss.backward()
        gradients = [one.grad for one in leaves if one is not None]
        return [*(result.detach() for result in results), *gradients]

    ours = run(torch.float32, rank.shards)
    for name, our, truth, near in zip(
        NAMES, ours, run(torch.float64), run(torch.float32), strict=True
    ):
        our = rank.among(our, truth) if name in ("dweight", "dbias") else our
        assert_close_to_truth(our, truth, near, name)
    rank.assert_same_on_all(*ours[:4])
    kept = run(torch.float32, rank.shards, keep_logits_bytes="auto")
    assert torch.equal(kept[0], ours[0])
    part = rank.part(inputs.weight)
    assert part is not None
    buffer = torch.zeros_like(part)
    again = run(torch.float32, rank.shards, weight_grad=buffer)
    assert again[4] is None and torch.equal(buffer, ours[4])
    with pytest.raises(ValueError, match=f"targets: .* got {V} at position"):
        linear_logprobs(
            inputs.hidden, part, ids.masked_fill(ids == ids[0, 1], V), shards=rank.shards
        )


@check
def kept_logits(rank: Rank) -> None:
    """Each rank keeps those of its own rows."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = head_inputs(N, D, V, dtype=dtype, bias=True, ignored=True)
        kept = compare(rank, inputs, dtype, softcap=5.0, keep_logits_bytes="auto")
        again = compare(rank, inputs, dtype, softcap=5.0)
        for name in NAMES[:3]:
            assert torch.equal(kept[name], again[name]), name  # type: ignore[arg-type]


@check
def each_gradient_alone(rank: Rank) -> None:
    inputs = head_inputs(N, D, V, bias=True)
    for parts in ("logprobs", "entropy", "lse"):
        compare(rank, inputs, torch.float32, parts, temperature=0.7)


@check
def frozen_tensors_get_no_gradient(rank: Rank) -> None:
    inputs = head_inputs(N, D, V, bias=True)
    for frozen in (("weight",), ("hidden",), ("hidden", "bias"), ("weight", "bias")):
        compare(rank, inputs, torch.float32, frozen=frozen)


@check
def int32_targets_of_another_shape(rank: Rank) -> None:
    inputs = head_inputs(N, D, V)
    flat = spread(rank, inputs, torch.float32, "logprobs")
    weight = rank.part(inputs.weight)
    assert weight is not None
    logprobs = linear_logprobs(
        inputs.hidden.view(3, 7, D), weight, inputs.targets.view(3, 7).int(), shards=rank.shards
    )
    assert torch.equal(logprobs.flatten(), flat["logprobs"])  # type: ignore[arg-type]


@check
def no_target_on_some_ranks(rank: Rank) -> None:
    """On all but one, which is each rank in turn."""
    for holder, size in enumerate(rank.shards.sizes):
        inputs = head_inputs(N, D, V)
        inputs.targets.remainder_(size).add_(sum(rank.shards.sizes[:holder]))
        compare(rank, inputs, torch.float32)


@check
def ignore_index_inside_the_vocabulary(rank: Rank) -> None:
    inputs = head_inputs(N, D, V, ignored=True)
    for ignored in (0, rank.shards.sizes[0], V - 1):
        inputs.targets[inputs.targets == ignored] = (ignored + 1) % V
        inputs.targets[3::4] = ignored
        ours = compare(rank, inputs, torch.float32, ignore_index=ignored)
        assert not ours["logprobs"][3::4].any()  # type: ignore[index]


@check
def banned_tokens(rank: Rank) -> None:
    """By a bias of -inf: a whole shard, and a few targets."""
    inputs = head_inputs(N, D, V, bias=True)
    assert inputs.bias is not None
    last = sum(rank.shards.sizes[:-1])
    inputs.bias[last:] = -torch.inf
    inputs.targets.remainder_(last)
    inputs.bias[inputs.targets[4]] = -torch.inf
    ours = compare(rank, inputs, torch.float32, "logprobs")
    logprobs = ours["logprobs"]
    assert logprobs is not None
    assert torch.equal(logprobs == -torch.inf, inputs.targets == inputs.targets[4])
    inputs.targets[6] = V - 1  # in the shard where nothing is left
    again = spread(rank, inputs, torch.float32, "logprobs")
    assert again["logprobs"][6] == -torch.inf  # type: ignore[index]
    assert again["dhidden"].isfinite().all()  # type: ignore[union-attr]
    inputs.bias[:] = -torch.inf
    nothing = spread(rank, inputs, torch.float32, "logprobs")
    assert nothing["logprobs"].isnan().all()  # type: ignore[union-attr]
    assert (nothing["lse"] == -torch.inf).all()  # type: ignore[union-attr]


@check
def large_offsets(rank: Rank) -> None:
    """Logits of +-1e4 and all below -100, by a bias that shifts them all."""
    for offset in (1e4, -1e4, -200.0):
        inputs = head_inputs(N, D, V, bias=True)
        assert inputs.bias is not None
        inputs.bias.add_(offset)
        compare(rank, inputs, torch.float32)


@check
def logits_that_are_rounded(rank: Rank) -> None:
    """Inputs of few bits, so that logits are exact and every process rounds the same number."""
    inputs = head_inputs(N, D, V, bias=True)
    for tensor in (inputs.hidden, inputs.weight, inputs.bias):
        assert tensor is not None
        tensor.mul_(8).round_().div_(8)
    for kind in ("bf16", "fp16"):
        compare(rank, inputs, torch.float32, round_logits=kind, softcap=20.0)
    rounded = spread(rank, inputs, torch.float32, "logprobs", round_logits="bf16")["logprobs"]
    exact = spread(rank, inputs, torch.float32, "logprobs")["logprobs"]
    assert not torch.equal(rounded, exact)  # type: ignore[arg-type]


@check
def sets_that_a_sampler_kept(rank: Rank) -> None:
    """Rows with ids on one rank only, rows that keep everything, targets outside their set."""
    inputs = head_inputs(N, D, V, ignored=True)
    kept = torch.randint(0, V, (N, 6), generator=torch.Generator().manual_seed(2))
    kept[:, 5] = inputs.targets.clamp(min=0)
    kept[::5, 1:5] = -1
    kept[1::5] = -1
    for row in (2, 9):
        kept[row] = kept[row].remainder(rank.shards.sizes[0])
        inputs.targets[row] = kept[row, 0]
    parts = "logprobs+lse"
    compare(rank, inputs, torch.float32, parts, kept_ids=kept)
    compare(rank, inputs, torch.float32, parts, kept_ids=kept.int().flip(1), softcap=4.0)
    inputs.targets[4] = next(v for v in range(V) if v not in kept[4].tolist())
    ours = spread(rank, inputs, torch.float32, "logprobs", kept_ids=kept)
    assert ours["logprobs"][4] == -torch.inf  # type: ignore[index]
    assert ours["dhidden"].isfinite().all()  # type: ignore[union-attr]
    compare(rank, inputs, torch.float32, "lse+entropy", kept_ids=kept)


@check
def weight_gradient_into_a_buffer(rank: Rank) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = head_inputs(N, D, V, dtype=dtype, ignored=True)
        hidden = inputs.hidden.clone().requires_grad_()
        weight = rank.part(inputs.weight)
        assert weight is not None
        weight.requires_grad_()
        buffer = torch.ones(weight.shape)
        results = linear_logprobs_with_stats(
            hidden, weight, inputs.targets, shards=rank.shards, weight_grad=buffer
        )
        terms = zip(results, upstream_of(N), strict=True)
        torch.stack([(term * up).sum() for term, up in terms]).sum().backward()
        assert weight.grad is None
        parts = "logprobs+entropy+lse"
        truth = whole(inputs, torch.float64, parts)
        near = whole(inputs, dtype, parts, plain=dtype == torch.bfloat16)
        for name, our, true, pl in (
            ("dhidden", hidden.grad, truth["dhidden"], near["dhidden"]),
            ("buffer", buffer - 1, truth["dweight"], near["dweight"]),
        ):
            assert our is not None and true is not None and pl is not None
            our = rank.among(our, true) if name == "buffer" else our
            assert_close_to_truth(our, true, pl, name)


@check
def coefficients_known_in_advance(rank: Rank) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = head_inputs(N, D, V, dtype=dtype, bias=True, ignored=True)
        coefficients = inputs.coefficients.clone()
        coefficients[5] = 0.0
        inputs.hidden[5] = torch.nan  # left out, whatever it holds
        left_out = inputs.targets.where(coefficients != 0, -100)
        options: dict[str, Any] = {"temperature": temperatures(), "softcap": 6.0}
        reached = []
        for how in ("without lse", "lse", "buffer"):
            leaves = [
                leaf(t, dtype)
                for t in (inputs.hidden, rank.part(inputs.weight), rank.part(inputs.bias))
            ]
            hidden, weight, bias = leaves
            assert hidden is not None and weight is not None
            buffer = torch.zeros(weight.shape) if how == "buffer" else None
            lse = None
            if how != "without lse":
                with torch.no_grad():
                    lse = linear_logprobs_with_stats(
                        hidden, weight, left_out, shards=rank.shards, bias=bias, **options
                    ).lse
            total = weighted_logprob_sum(
                hidden, weight, inputs.targets, coefficients, lse=lse,
                shards=rank.shards, bias=bias, weight_grad=buffer, **options,
            )  # fmt: skip
            (3.0 * total).backward()
            assert lse is None or not lse.requires_grad
            rank.assert_same_on_all(total, hidden.grad)  # type: ignore[arg-type]
            assert (weight.grad is None) == (buffer is not None)
            dweight = weight.grad if buffer is None else buffer
            reached.append((total.detach(), hidden.grad, dweight, bias.grad))  # type: ignore[union-attr]
        inputs.targets.copy_(left_out)
        exact = [whole_sum(inputs, torch.float64, coefficients, options)]
        exact.append(whole_sum(inputs, dtype, coefficients, options))
        for results in reached:
            for index, our in enumerate(results):
                true, pl = exact[0][index], exact[1][index]
                if index == 0:  # one number, whose error may be 0 by chance
                    scale = float((coefficients * exact[0][4]).abs().sum())
                    assert abs(float(our) - float(true)) <= 2.0**-20 * scale
                    continue
                assert our is not None
                our = rank.among(our, true) if index >= 2 else our
                assert_close_to_truth(our.to(dtype), true, pl, NAMES[index + 2])


def whole_sum(
    inputs: Any, dtype: torch.dtype, coefficients: Tensor, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """total, the gradients of 3 * total, logprobs, by plain torch."""
    leaves = [leaf(t, dtype) for t in (inputs.hidden, inputs.weight, inputs.bias)]
    hidden, weight, bias = leaves
    assert hidden is not None and weight is not None
    logprobs, _, _ = plain_linear_logprobs(hidden, weight, inputs.targets, bias=bias, **options)
    total = logprobs @ coefficients.to(logprobs.dtype)
    gradients = torch.autograd.grad(3.0 * total, [t for t in leaves if t is not None])
    return total.detach(), *gradients, logprobs.detach()


@check
def repeats_and_second_backward_are_bitwise_equal(rank: Rank) -> None:
    inputs = head_inputs(N, D, V, dtype=torch.bfloat16)
    first, second = (spread(rank, inputs, torch.bfloat16, "logprobs+entropy") for _ in range(2))
    for name in ("logprobs", "entropy", "lse", "dhidden", "dweight"):
        assert torch.equal(first[name], second[name])  # type: ignore[arg-type]
    hidden, weight = leaf(inputs.hidden, torch.bfloat16), rank.part(inputs.weight)
    assert hidden is not None and weight is not None
    total = linear_logprobs(hidden, weight, inputs.targets, shards=rank.shards).sum()
    (once,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (twice,) = torch.autograd.grad(total, hidden)
    assert torch.equal(once, twice)


@check
def a_token_does_not_depend_on_its_neighbours(rank: Rank) -> None:
    inputs = head_inputs(N, D, V)
    weight = rank.part(inputs.weight)
    assert weight is not None
    every = linear_logprobs_with_stats(inputs.hidden, weight, inputs.targets, shards=rank.shards)
    hidden, targets = torch.cat([inputs.hidden] * 3), torch.cat([inputs.targets] * 3)
    more = linear_logprobs_with_stats(hidden, weight, targets, shards=rank.shards)
    for few, many in zip(every, more, strict=True):
        for copy in many.split(N):
            # The matrix product of the library may add in another order for another N.
            torch.testing.assert_close(copy, few, rtol=1e-5, atol=1e-5)


@check
def autocast_as_linear(rank: Rank) -> None:
    inputs = head_inputs(N, D, V)
    low = head_inputs(N, D, V, dtype=torch.bfloat16)
    weight, low_weight = rank.part(inputs.weight), rank.part(low.weight)
    assert weight is not None and low_weight is not None
    hidden = inputs.hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_logprobs(hidden, weight, inputs.targets, shards=rank.shards)
    ours.sum().backward()
    low_hidden = low.hidden.requires_grad_()
    exact = linear_logprobs(low_hidden, low_weight, low.targets, shards=rank.shards)
    exact.sum().backward()
    assert torch.equal(ours, exact)
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    assert torch.equal(hidden.grad, low_hidden.grad.float())  # type: ignore[union-attr]


@check
def no_tokens(rank: Rank) -> None:
    inputs = head_inputs(0, D, V)
    ours = spread(rank, inputs, torch.float32, "logprobs+entropy+lse")
    assert ours["logprobs"].shape == (0,)  # type: ignore[union-attr]
    assert ours["dhidden"].shape == (0, D)  # type: ignore[union-attr]
    assert not ours["dweight"].any()  # type: ignore[union-attr]
    every = head_inputs(N, D, V)
    every.targets[:] = -100
    ours = spread(rank, every, torch.float32, "logprobs")
    assert not ours["dhidden"].any() and not ours["dweight"].any()  # type: ignore[union-attr]


@check
def one_collective_each_way(rank: Rank) -> None:
    inputs = head_inputs(N, D, V)
    hidden, weight = leaf(inputs.hidden, torch.float32), rank.part(inputs.weight)
    assert hidden is not None and weight is not None
    calls: list[str] = []

    @contextlib.contextmanager
    def counted() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in ("all_gather", "all_reduce", "all_gather_into_tensor", "broadcast"):
                real = getattr(dist, name)

                def call(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
                    calls.append(name)
                    return real(*args, **kwargs)

                stack.enter_context(mock.patch.object(dist, name, call))
            yield

    with counted():
        results = linear_logprobs_with_entropy(hidden, weight, inputs.targets, shards=rank.shards)
        assert calls == ["all_gather"]
        (results.logprobs + results.entropy).sum().backward()
        assert calls == ["all_gather", "all_reduce"]
        # Frozen hidden states: nothing to reduce.
        calls.clear()
        frozen = inputs.hidden.detach()
        linear_logprobs(
            frozen, weight.requires_grad_(), inputs.targets, shards=rank.shards
        ).sum().backward()
        assert calls == ["all_gather"]


def stacked(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(results) if isinstance(results, tuple) else results


@check
def the_names_in_parallel_are_these_functions(rank: Rank) -> None:
    """agro_kernels.parallel.linear_logprobs(..., shards): by position or keyword, the same bits."""
    inputs = head_inputs(N, D, V, ignored=True)
    weight = rank.part(inputs.weight)
    assert weight is not None
    tensors = inputs.hidden, weight, inputs.targets
    for name in (
        "linear_logprobs", "linear_logprobs_with_entropy", "linear_logprobs_with_stats",
        "weighted_logprob_sum",
    ):  # fmt: skip
        more = (inputs.coefficients,) if name == "weighted_logprob_sum" else ()
        function = getattr(agro_kernels, name)
        expected = function(*tensors, *more, shards=rank.shards, softcap=5.0)
        ours = getattr(parallel, name)(*tensors, *more, rank.shards, softcap=5.0)
        again = getattr(parallel, name)(*tensors, *more, shards=rank.shards, softcap=5.0)
        assert type(ours) is type(expected)
        for results in (ours, again):
            assert torch.equal(stacked(results), stacked(expected))


@check
def sizes_are_gathered_or_given(rank: Rank) -> None:
    weight = rank.part(head_inputs(N, D, V).weight)
    assert weight is not None
    found = VocabularyShards.of(weight, rank.shards.group)
    assert found == rank.shards
    assert found.vocabulary == V and found.start == rank.rows.start


@check
def shards_that_do_not_fit_are_refused_on_every_rank(rank: Rank) -> None:
    group, first = rank.shards.group, rank.shards.rank == 0
    sizes = tuple(rank.shards.sizes)
    ranks = len(sizes)
    cases = [
        (torch.zeros(4, 8 if first else 7), ValueError, "the same D on every rank, got \\(8, 7"),
        (torch.zeros(0 if first else 4, 8), ValueError, "V_r > 0 on every rank, got V_r = \\(0, 4"),
        (torch.zeros(4) if first else torch.zeros(4, 8), ValueError, "V_r = \\(0, 4"),
        (
            torch.zeros(4, 8, dtype=torch.bfloat16 if first else torch.float32),
            TypeError,
            "got torch.bfloat16, torch.float32",
        ),
        (torch.zeros(4, 8, dtype=torch.int64), TypeError, "no float dtype, no float dtype"),
    ]
    for weight, error, message in cases:
        with pytest.raises(error, match=message):
            VocabularyShards.of(weight, group)
    assert ranks == dist.get_world_size(group)


@check
def wrong_arguments_are_named(rank: Rank) -> None:
    """The same on every rank, before anything is sent."""
    inputs = head_inputs(N, D, V)
    weight = rank.part(inputs.weight)
    assert weight is not None
    arguments: dict[str, Any] = {
        "hidden": inputs.hidden,
        "weight": weight,
        "targets": inputs.targets,
        "shards": rank.shards,
    }
    outside = inputs.targets.clone()
    outside[4] = V
    mesh = dist.device_mesh.DeviceMesh.from_group(rank.shards.group, "cpu")
    sharded = dist.tensor.DTensor.from_local(weight, mesh, [dist.tensor.Shard(0)], run_check=False)
    kept = torch.full((N, 2), V)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"targets": outside}, ValueError, rf"targets: .*\[0, {V}\).*got {V} at position 4"),
        ({"weight": weight[:-1] if len(weight) > 1 else torch.cat([weight] * 2)}, ValueError,
         "weight: expected .* rows, as shards.sizes says of rank"),
        ({"shards": rank.shards.sizes}, TypeError,
         r"shards: expected agro_kernels.parallel.VocabularyShards or None, got tuple"),
        ({"weight": sharded}, TypeError, r"weight: .*got a DTensor; pass weight.to_local\(\)"),
        ({"weight": weight.double()}, TypeError, "weight: expected torch.float32 as hidden"),
        ({"kept_ids": kept}, ValueError, f"kept_ids: expected ids below {V}, got {V}"),
        ({"round_logits": "int8"}, ValueError, "round_logits: "),
        ({"weight_grad": torch.zeros(1, 1)}, ValueError, "weight_grad: expected the shape"),
        ({"softcap": -1.0}, ValueError, "softcap: "),
        ({"temperature": 0.0}, ValueError, "temperature: "),
        ({"bias": torch.zeros(V)}, ValueError, "bias: "),
    ]  # fmt: skip
    for changed, error, message in cases:
        with pytest.raises(error, match=message):
            linear_logprobs(**{**arguments, **changed})
    coefficients = torch.ones(N)
    with pytest.raises(ValueError, match="coefficients: expected the shape"):
        weighted_logprob_sum(**arguments, coefficients=coefficients[1:])
    with pytest.raises(ValueError, match="lse: expected the shape"):
        weighted_logprob_sum(**arguments, coefficients=coefficients, lse=coefficients[1:])


# --- The processes --------------------------------------------------------------------------------


def process(rank: int, folder: str) -> None:
    """Run every check in every group that this rank is in; write {group size: {check: failure}}."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=4,
        timeout=datetime.timedelta(seconds=60),
    )
    outcome: Outcome = {}
    try:
        run_checks(rank, outcome)
    finally:  # a failure here makes spawn end the other processes, which may be waiting for it
        Path(folder, f"rank{rank}.json").write_text(json.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()


def run_checks(rank: int, outcome: Outcome) -> None:
    """Fill outcome, up to and including the first failure, which is raised."""
    for size, sizes in SIZES.items():
        group = dist.new_group(list(range(size)))
        if rank >= size:
            with pytest.raises(ValueError, match="group: expected a group that this process"):
                VocabularyShards.of(torch.zeros(2, 3), group)
            continue
        view = Rank(VocabularyShards(sizes, rank, group))
        checks = outcome[str(size)] = {}
        for name, function in CHECKS.items():
            try:
                function(view)
            except Exception:
                checks[name] = traceback.format_exc()
                raise
            checks[name] = ""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """What each of the four processes wrote down."""
    folder = tmp_path_factory.mktemp("ranks")
    ended_badly = ProcessRaisedException, ProcessExitedException
    with contextlib.suppress(*ended_badly):  # how, is in the files
        torch.multiprocessing.spawn(process, args=(str(folder),), nprocs=4)
    files = [folder / f"rank{rank}.json" for rank in range(4)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize("name", CHECKS)
def test_on_several_processes(outcomes: list[Outcome], name: str, ranks: int) -> None:
    for rank in range(ranks):
        failure = outcomes[rank].get(str(ranks), {}).get(name, "not reached")
        assert not failure, f"rank {rank} of {ranks}: {failure}"


def test_inside_compile_the_error_says_so() -> None:
    torch._dynamo.reset()
    inputs = head_inputs(N, D, V)
    shards = VocabularyShards((V,), 0)
    compiled = torch.compile(linear_logprobs, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="expected a call outside torch.compile"):
        compiled(inputs.hidden, inputs.weight, inputs.targets, shards=shards)


def test_without_a_process_group_the_error_says_so() -> None:
    with pytest.raises(ValueError, match=re.escape("torch.distributed.init_process_group first")):
        VocabularyShards.of(torch.zeros(2, 3))
