"""The public ops inside torch.compile, under autocast, and called from several threads at once."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from agro_kernels import (
    agro_coefficients,
    agro_loss,
    linear_agro_loss,
    linear_logprobs,
    linear_logprobs_with_entropy,
    linear_logprobs_with_stats,
    selective_logprobs,
    tail_probability,
    weighted_logprob_sum,
)
from agro_kernels.backward import Backward
from agro_kernels.head import Head, Upstream
from agro_kernels.ops.buffer_locks import in_turn
from tests.numerics import head_inputs

D, V = 16, 70
LENGTHS = [3, 4, 2, 3]  # of four sequences, two groups of two

# Inductor imports a module of torch that torch itself calls deprecated.
inductor = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)


class Inputs:
    """n tokens of every op's arguments, all counted; four sequences where an op needs them."""

    def __init__(self, n: int, dtype: torch.dtype = torch.float32) -> None:
        made = head_inputs(n, D, V, dtype=dtype, bias=True)
        assert made.bias is not None
        self.targets, self.coefficients = made.targets, made.coefficients
        self.leaves = tuple(
            tensor.detach().clone().requires_grad_()
            for tensor in (made.hidden, made.weight, made.bias)
        )
        self.temperature = torch.linspace(0.5, 1.5, n)
        self.kept_ids = torch.cat([made.targets[:, None], torch.randint(0, V, (n, 3))], 1)
        self.ref_logprobs = -torch.rand(n)
        self.cu_seqlens = torch.tensor([0, 3, 7, 9, n])
        self.rewards, self.groups = torch.tensor([1.0, 0.0, 1.0, 0.5]), torch.tensor([7, 7, 2, 2])


def plain(inputs: Inputs) -> Tensor:
    hidden, weight, bias = inputs.leaves
    return (inputs.coefficients * linear_logprobs(hidden, weight, inputs.targets, bias=bias)).sum()


def with_entropy(inputs: Inputs) -> Tensor:
    hidden, weight, bias = inputs.leaves
    logprobs, entropy = linear_logprobs_with_entropy(
        hidden * 1.5, weight, inputs.targets, bias=bias, temperature=inputs.temperature, softcap=9.0
    )
    return (inputs.coefficients * logprobs - 0.1 * entropy).sum()


def engine_options(inputs: Inputs) -> Tensor:
    hidden, weight, bias = inputs.leaves
    results = linear_logprobs_with_stats(
        hidden, weight, inputs.targets, bias=bias, round_logits="bf16", kept_ids=inputs.kept_ids
    )
    return (results.logprobs + 0.2 * results.lse).sum()


def keeping(inputs: Inputs) -> Tensor:
    """Logits kept for the backward pass, of up to 30 tokens. (None would be another graph.)"""
    hidden, weight, bias = inputs.leaves
    results = linear_logprobs_with_stats(
        hidden, weight, inputs.targets, bias=bias, keep_logits_bytes=30 * (V * 4 + 2 * 4)
    )
    return (results.logprobs + 0.2 * results.entropy).sum()


def many_targets(inputs: Inputs) -> Tensor:
    """Four ids a token, one of them twice, and the probability of all others."""
    hidden, weight, bias = inputs.leaves
    ids = torch.cat([inputs.kept_ids, inputs.targets[:, None]], 1)
    results = linear_logprobs_with_stats(hidden, weight, ids, bias=bias, softcap=9.0)
    tail = tail_probability(results.logprobs, ids)
    return (results.logprobs.sum(1) + 0.2 * results.lse + tail.log()).sum()


def weighted(inputs: Inputs) -> Tensor:
    hidden, weight, bias = inputs.leaves
    lse = linear_logprobs_with_stats(
        hidden.detach(), weight.detach(), inputs.targets, bias=bias.detach(), temperature=0.7
    ).lse
    return 2 * weighted_logprob_sum(
        hidden, weight, inputs.targets, inputs.coefficients, lse=lse, bias=bias, temperature=0.7
    )


def from_logits(inputs: Inputs) -> Tensor:
    hidden, weight, bias = inputs.leaves
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return selective_logprobs(logits, inputs.targets, temperature=inputs.temperature).sum()


def loss(inputs: Inputs) -> Tensor:
    hidden, weight, bias = inputs.leaves
    logprobs = linear_logprobs(hidden, weight, inputs.targets, bias=bias)
    rows = (inputs.rewards, inputs.groups, inputs.cu_seqlens)
    return agro_loss(logprobs, inputs.ref_logprobs, *rows, beta=0.3, lr_weight=1.0, lr_cap=True)


def whole_loss(inputs: Inputs) -> Tensor:
    hidden, weight, bias = inputs.leaves
    rows = (inputs.rewards, inputs.groups, inputs.cu_seqlens)
    return linear_agro_loss(
        hidden, weight, inputs.targets, inputs.ref_logprobs, *rows, beta=0.3, bias=bias
    )


def known_coefficients(inputs: Inputs) -> Tensor:
    """The trainer's step: a pass for the sums, coefficients, and the weighted sum."""
    hidden, weight, bias = inputs.leaves
    with torch.no_grad():
        logprobs, _, lse = linear_logprobs_with_stats(hidden, weight, inputs.targets, bias=bias)
    zeros = torch.zeros(4, dtype=torch.float64)
    owner = torch.bucketize(torch.arange(len(logprobs)), inputs.cu_seqlens[1:], right=True)
    sums = zeros.index_add(0, owner, (logprobs - inputs.ref_logprobs).double())
    found = agro_coefficients(inputs.rewards, sums, zeros, inputs.groups, beta=0.3).coefficients
    return weighted_logprob_sum(
        hidden, weight, inputs.targets, found[owner].float(), lse=lse, bias=bias
    )


PROGRAMS = [
    plain,
    with_entropy,
    engine_options,
    keeping,
    many_targets,
    weighted,
    from_logits,
    loss,
    whole_loss,
    known_coefficients,
]
Program = Callable[[Inputs], Tensor]
programs = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)


def value_and_gradients(program: Program, inputs: Inputs) -> tuple[Tensor, ...]:
    value = program(inputs)
    return value.detach(), *torch.autograd.grad(value, inputs.leaves)


def assert_bitwise(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# --- torch.compile --------------------------------------------------------------------------------


@programs
def test_compiled_without_graph_breaks_equals_eager(program: Program) -> None:
    """AOT autograd traces forward and backward; the ops run as they are, so bit for bit."""
    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    inputs = Inputs(12)
    assert_bitwise(value_and_gradients(compiled, inputs), value_and_gradients(program, inputs))


@programs
def test_other_numbers_of_tokens_do_not_recompile(program: Program) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend=counter)
    for n in (12, 19, 30):
        inputs = Inputs(n)
        assert_bitwise(value_and_gradients(compiled, inputs), value_and_gradients(program, inputs))
        if n == 12:
            # Not 1: tracing starts again, and leaves an empty graph, where it meets a float.
            compiled_once = counter.frame_count
    assert counter.frame_count == compiled_once


def with_number(inputs: Inputs, number: float) -> Tensor:
    """Every number that may differ from step to step: temperatures, and the options of the loss."""
    hidden, weight, bias = inputs.leaves
    head: Any = {"bias": bias, "temperature": number}
    logprobs = linear_logprobs(hidden, weight, inputs.targets, **head)
    rows = (inputs.rewards, inputs.groups, inputs.cu_seqlens)
    options: Any = {"beta": number, "lr_weight": number, "lr_baseline": number, "taper": number}
    options |= {"scale": 1 / number, "sampling_logprobs": -inputs.rewards}
    value = agro_loss(logprobs, inputs.ref_logprobs, *rows, **options)
    value = value + weighted_logprob_sum(
        hidden, weight, inputs.targets, inputs.coefficients, lse=inputs.coefficients, **head
    )
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return value + selective_logprobs(logits, inputs.targets, temperature=number).sum()


def test_other_numbers_do_not_recompile() -> None:
    """Two graphs, as torch makes them itself: of the first number, and of all the others."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(with_number, fullgraph=True, backend=counter)
    inputs = Inputs(12)
    for number in (1.0, 0.5, 0.6, 0.7, 0.8, 0.9):
        ours = value_and_gradients(lambda one, x=number: compiled(one, x), inputs)  # type: ignore[misc]
        expected = value_and_gradients(lambda one, x=number: with_number(one, x), inputs)  # type: ignore[misc]
        assert_bitwise(ours, expected)
    assert counter.frame_count == 2


def rows_that_count(inputs: Inputs, mask: Tensor) -> Tensor:
    hidden, weight, bias = inputs.leaves
    head: Any = {"bias": bias, "temperature": inputs.temperature[mask]}
    chosen, targets = hidden[mask], inputs.targets[mask]
    coefficients = inputs.coefficients[mask]
    stats = linear_logprobs_with_stats(chosen, weight, targets, **head)
    value = linear_logprobs(chosen, weight, targets, **head).square().sum() + stats.entropy.sum()
    value = value + weighted_logprob_sum(chosen, weight, targets, coefficients, **head)
    lse = stats.lse.detach()
    return value + weighted_logprob_sum(chosen, weight, targets, coefficients, lse=lse, **head)


def test_a_number_of_rows_that_depends_on_the_data_is_one_graph() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    inputs = Inputs(12)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(rows_that_count, fullgraph=True, backend=counter)
        for count in (3, 7, 12, 1, 0):
            mask = torch.arange(12) < count
            ours = value_and_gradients(lambda one, m=mask: compiled(one, m), inputs)  # type: ignore[misc]
            expected = value_and_gradients(lambda one, m=mask: rows_that_count(one, m), inputs)  # type: ignore[misc]
            assert_bitwise(ours, expected)
    assert counter.frame_count == 1


@inductor
@pytest.mark.parametrize(
    "program", [engine_options, known_coefficients], ids=lambda program: program.__name__
)
def test_inductor_equals_eager(program: Program) -> None:
    """The whole compiler: what surrounds the ops is fused, the ops are called."""
    torch._dynamo.reset()
    inputs = Inputs(12)
    compiled = torch.compile(program, fullgraph=True)
    ours = value_and_gradients(compiled, inputs)
    for a, b in zip(ours, value_and_gradients(program, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_a_buffer_for_the_gradient_is_refused_inside_compile() -> None:
    torch._dynamo.reset()
    inputs = Inputs(12)
    hidden, weight, _ = inputs.leaves

    def program(hidden: Tensor) -> Tensor:
        buffer = torch.zeros(V, D)
        return linear_logprobs(hidden, weight, inputs.targets, weight_grad=buffer)

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="weight_grad: expected a call outside torch.compile"):
        compiled(hidden)


# --- Autograd -------------------------------------------------------------------------------------


@programs
def test_backward_twice_gives_the_same(program: Program) -> None:
    inputs = Inputs(12)
    value = program(inputs)
    first = torch.autograd.grad(value, inputs.leaves, retain_graph=True)
    second = torch.autograd.grad(value, inputs.leaves)
    assert_bitwise(first, second)


# --- torch.autocast -------------------------------------------------------------------------------


# with_entropy multiplies hidden before the op, in fp32 under autocast and else in bf16.
@pytest.mark.parametrize("program", [one for one in PROGRAMS if one is not with_entropy])
def test_autocast_is_the_program_in_bf16(program: Program) -> None:
    """As F.linear: the head's inputs are rounded, its results and their gradients are fp32."""
    inputs, rounded = Inputs(12), Inputs(12, torch.bfloat16)
    rounded.coefficients, rounded.kept_ids = inputs.coefficients, inputs.kept_ids
    rounded.ref_logprobs = inputs.ref_logprobs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = program(inputs)
    gradients = torch.autograd.grad(value, inputs.leaves)
    expected, *of_rounded = value_and_gradients(program, rounded)
    assert value.dtype == torch.float32
    assert torch.equal(value.detach(), expected)
    for ours, other in zip(gradients, of_rounded, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, other.float())


# --- Threads --------------------------------------------------------------------------------------


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of all calls, made at the same time by a thread each."""
    start = threading.Barrier(len(calls))
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = calls[index]()
        except BaseException as error:  # raised again in the thread of the test
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@programs
def test_threads_do_not_disturb_each_other(program: Program) -> None:
    """Forward in the threads, backward in them and in autograd's own."""
    inputs = [Inputs(n) for n in (12, 19, 12, 30)]
    calls = [lambda one=one: value_and_gradients(program, one) for one in inputs]  # type: ignore[misc]
    expected = [call() for call in calls]
    for ours, theirs in zip(in_threads(calls), expected, strict=True):
        assert_bitwise(ours, theirs)


def test_threads_add_to_one_buffer_in_turn() -> None:
    """Eight graphs, their backward passes at the same time: no update is lost."""
    n, d, v = 64, 32, 5000
    weight, buffer = torch.randn(v, d, requires_grad=True), torch.zeros(v, d)
    hidden = [torch.randn(n, d, requires_grad=True) for _ in range(8)]
    targets = [torch.randint(0, v, (n,)) for _ in hidden]
    graphs = [
        linear_logprobs(one, weight, ids, weight_grad=buffer).sum()
        for one, ids in zip(hidden, targets, strict=True)
    ]
    in_threads([graph.backward for graph in graphs])
    expected = torch.zeros(v, d)
    for one, ids in zip(hidden, targets, strict=True):
        linear_logprobs(one, weight, ids, weight_grad=expected).sum().backward()
    torch.testing.assert_close(buffer, expected, rtol=1e-5, atol=1e-5)


def test_each_buffer_has_a_turn_of_its_own() -> None:
    """Views of one buffer wait for each other; another buffer waits for neither."""
    storage, other = torch.zeros(4, 3), torch.zeros(4, 3)
    inside: set[str] = set()
    together: list[set[str]] = []
    both_buffers = threading.Barrier(2, timeout=30)

    def adds(name: str, buffer: Tensor) -> None:
        inside.add(name)
        together.append(set(inside))
        if name in ("first", "other"):
            both_buffers.wait()
        inside.discard(name)

    kernel = in_turn(adds)
    views = {"first": storage, "second": storage[1:], "third": storage.view(12), "other": other}
    in_threads([lambda n=name, b=view: kernel(n, b) for name, view in views.items()])  # type: ignore[misc]
    shared = {"first", "second", "third"}
    assert all(len(names & shared) <= 1 for names in together)


@pytest.mark.parametrize("name", ["linear_logprobs", "selective_logprobs", "agro_loss"])
def test_triton_launchers_work_in_a_worker_thread(name: str) -> None:
    """One at a time: Triton's interpreter keeps its program index in a global."""
    pytest.importorskip("triton", reason="Triton is not available on this platform")
    calls: dict[str, Callable[[], Any]] = {
        "linear_logprobs": triton_linear_logprobs,
        "selective_logprobs": triton_selective_logprobs,
        "agro_loss": triton_agro_loss,
    }
    expected = calls[name]()
    for _ in range(2):
        (ours,) = in_threads([calls[name]])
        assert_bitwise(ours, expected)


def triton_linear_logprobs() -> tuple[Tensor, ...]:
    from agro_kernels._triton import linear_logprobs as kernels

    hidden, weight, bias = (leaf.detach() for leaf in Inputs(12).leaves)
    head = Head.of(hidden, weight, Inputs(12).targets, bias=bias, temperature=0.7)
    logprobs, lse, entropy = kernels.linear_logprobs_fwd(head, True)
    upstream = Upstream(logprobs, None, None, lse, None)
    gradients = kernels.linear_logprobs_bwd(Backward(upstream, head, [True, True, True]))
    return logprobs, lse, entropy, *gradients


def triton_selective_logprobs() -> tuple[Tensor, ...]:
    from agro_kernels._triton import selective_logprobs as kernels
    from agro_kernels.logit_rows import LogitRows

    hidden, weight, _ = (leaf.detach() for leaf in Inputs(12).leaves)
    given = LogitRows(hidden @ weight.T, Inputs(12).targets, 0.7, None, -100)
    logprobs, lse = kernels.selective_logprobs_fwd(given)
    return logprobs, lse, kernels.selective_logprobs_bwd(logprobs, given, lse)


def triton_agro_loss() -> tuple[Tensor, ...]:
    from agro_kernels._triton import agro_loss as kernels
    from agro_kernels.agro_options import AgroOptions, AgroTokens

    inputs = Inputs(12)
    logprobs = torch.linspace(-2.0, -0.1, 12)
    rows = (inputs.rewards, inputs.groups, inputs.cu_seqlens)
    options = AgroOptions.of(inputs.rewards, beta=0.3, lr_weight=1.0, lr_cap=True)
    zeros = torch.zeros(12)
    value, coefficients = kernels.agro_loss_fwd(AgroTokens(logprobs, zeros, *rows), options)
    dloss = torch.tensor(1.0)
    gradient = kernels.agro_loss_bwd(dloss, coefficients, inputs.cu_seqlens, 12, torch.float32)
    return value, coefficients, gradient
