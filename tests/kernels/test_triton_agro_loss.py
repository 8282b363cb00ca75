"""The Triton kernels of the AGRO ops against the torch path: interpreted, or run on a GPU."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not available on this platform")

from agro_kernels import reference
from agro_kernels._torch import agro_loss as torch_path
from agro_kernels._triton import agro_loss as kernels
from agro_kernels.agro_loss import agro_coefficients, agro_loss
from agro_kernels.agro_options import AgroOptions, AgroTokens
from tests.conftest import SetSizes
from tests.kernels.test_agro_loss import BETA, OPTIONS, Batch
from tests.numerics import assert_close_to_truth

KERNELS = {name for name in vars(kernels) if name.endswith("_kernel")}
options = pytest.mark.parametrize("name", OPTIONS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def small_blocks(set_sizes: SetSizes) -> None:
    """So that eighteen sequences and forty tokens take several blocks of everything."""
    set_sizes(kernels, BLOCK_T=4, BLOCK_I=4, BLOCK_J=8, BLOCK_B=8)


def on_device(values: tuple, device: str = DEVICE) -> tuple:
    """The tensors among them, and those in records, moved."""
    moved = (
        type(v)(*on_device(v, device))
        if isinstance(v, (AgroOptions, AgroTokens))
        else v.to(device)
        if isinstance(v, Tensor)
        else v
        for v in values
    )
    return tuple(moved)


def assert_same(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """Both are float64 inside and differ by the order of their sums only."""
    for value, expected in zip(ours, exact, strict=True):
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value.cpu(), expected.cpu(), rtol=1e-12, atol=1e-14)


def spoiled(batch: Batch) -> Batch:
    """With invalid rows of every kind, one of which leaves its group too small."""
    batch.rewards[0] = math.nan
    batch.logprobs[batch.cu_seqlens[3]] = -math.inf
    batch.ref_logprobs[batch.cu_seqlens[5]] = -math.inf
    batch.weights[7], batch.weights[8] = -1.0, math.inf
    return batch


@options
@pytest.mark.parametrize("op", ["agro_coefficients", "agro_loss_fwd"])
@pytest.mark.parametrize("prepare", [lambda batch: batch, spoiled], ids=["valid", "invalid-rows"])
def test_op_matches_torch_path(name: str, op: str, prepare) -> None:
    batch = prepare(Batch())
    rows = batch.sums if op == "agro_coefficients" else (batch.tokens,)
    arguments = (*rows, batch.op_options(name))
    ours = getattr(kernels, op)(*on_device(arguments))
    assert_same(ours, getattr(torch_path, op)(*arguments))


LR_OPTIONS = [
    {"lr_weight": weight, "lr_cap": cap, "lr_baseline": baseline, "on_policy": on_policy}
    for weight, cap, baseline, on_policy in itertools.product(
        (1.0, 0.3), (False, True), (None, 0.0, 0.4), (None, "some", "none")
    )
]
TAPERS = (None, 1.0, 0.0, "by row", math.inf)
DENOMINATORS = itertools.cycle([(None, 1.0), (0.0, 2.5), (7.0, 0.5)])  # num_groups, scale


@pytest.mark.parametrize("prepare", [lambda batch: batch, spoiled], ids=["valid", "invalid-rows"])
def test_combinations_of_options_match_the_reference(prepare, set_sizes: SetSizes) -> None:
    # One program each: half the time.
    set_sizes(kernels, BLOCK_T=16, BLOCK_I=32, BLOCK_J=32, BLOCK_B=32)
    batch = prepare(Batch())
    rows = {"some": batch.on_policy, "none": torch.zeros_like(batch.on_policy), None: None}
    weighted = [{"importance_weights": weights} for weights in (batch.weights, 0 * batch.weights)]
    for given, (num_groups, scale), taper in zip(
        [*weighted, *LR_OPTIONS], DENOMINATORS, itertools.cycle(TAPERS), strict=False
    ):
        named = {"num_groups": num_groups, "scale": scale, **given}
        named["on_policy"] = rows[named.get("on_policy")]
        if taper is not None:
            named |= {"sampling_logprobs": batch.sampling_logprobs}
            named |= {"taper": batch.row_taper if taper == "by row" else taper}
        # The reference says None for "auto".
        public = {name: value for name, value in named.items() if value is not None}
        record = AgroOptions.of(batch.rewards, beta=BETA, **public)
        loss, coefficients = kernels.agro_loss_fwd(*on_device((batch.tokens, record)))
        exact = (
            reference.agro_loss(*batch.tokens, beta=BETA, **named).detach(),
            reference.agro_coefficients(*batch.sums, beta=BETA, **named),
        )
        assert_same((loss, coefficients), exact)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_groups_of_any_integer_type(dtype: torch.dtype) -> None:
    batch = Batch()
    rewards, logprobs, ref_logprobs, groups = batch.sums
    names = groups.unique(return_inverse=True)[1]
    names = (names * 37 % 120 + torch.iinfo(dtype).max - 120).to(dtype)  # the last ids of the type
    record = batch.op_options("capped")
    ours = kernels.agro_coefficients(*on_device((rewards, logprobs, ref_logprobs, names, record)))
    assert_same(ours, torch_path.agro_coefficients(*batch.sums, record))


def test_groups_spread_over_all_blocks(set_sizes: SetSizes) -> None:
    """Groups of one to more than a block of rows, the members far apart, ids beyond 32 bits."""
    set_sizes(kernels, BLOCK_I=16, BLOCK_J=16)
    generator = torch.Generator().manual_seed(5)
    num_rows = 75
    groups = (torch.rand(num_rows, generator=generator) ** 3 * 30).long() * 10**12 - 7
    sums = torch.randn(3, num_rows, generator=generator, dtype=torch.float64)
    on_policy = torch.rand(num_rows, generator=generator) < 0.5
    record = AgroOptions.of(sums[0], beta=BETA, lr_weight=1.0, lr_cap=True, on_policy=on_policy)
    arguments = (*sums, groups, record)
    ours = kernels.agro_coefficients(*on_device(arguments))
    assert_same(ours, torch_path.agro_coefficients(*arguments))
    counts = groups.unique(return_counts=True)[1]
    assert counts.min() == 1 and counts.max() > 16


def test_log_ratios_are_formed_token_by_token() -> None:
    """Two sums of millions of nats differ by a thousandth: their difference would have lost it."""
    logprobs = torch.full((6,), -1e9, dtype=torch.float64)
    ref_logprobs = logprobs - 1e-3 * torch.tensor([1.0, 1, 1, 2, 2, 2], dtype=torch.float64)
    rewards, groups = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    tokens = AgroTokens(logprobs, ref_logprobs, rewards, groups, torch.tensor([0, 3, 6]))
    record = AgroOptions.of(rewards, beta=1.0)
    _, ours = kernels.agro_loss_fwd(*on_device((tokens, record)))
    first, second = (logprobs - ref_logprobs).view(2, 3).sum(1)
    exact = torch.stack([first - second, second - first]) / 2
    torch.testing.assert_close(ours.cpu(), exact, rtol=1e-12, atol=0.0)


def test_launchers_look_at_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device item(), tolist(), nonzero(), bool() and cpu() all raise."""
    launched = []

    class Launch:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(**arguments) -> None:
                assert set(arguments) == set(self.kernel.arg_names)
                launched.append(self.kernel.fn.__name__)

            return launch

    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Launch(getattr(kernels, name)))
    batch = Batch()

    def on_meta(*values) -> tuple:
        return on_device(values, "meta")

    for name in OPTIONS:
        kernels.agro_coefficients(*on_meta(*batch.sums, batch.op_options(name)))
        _, coefficients = kernels.agro_loss_fwd(*on_meta(batch.tokens, batch.op_options(name)))
        dloss, cu_seqlens = on_meta(torch.tensor(1.0), batch.cu_seqlens)
        kernels.agro_loss_bwd(dloss, coefficients, cu_seqlens, 41, torch.float32)
    assert set(launched) == KERNELS
    with pytest.raises(RuntimeError):  # so the device does what it is trusted with
        dloss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_match_torch_path(dtype: torch.dtype) -> None:
    batch = Batch()
    logprobs, ref_logprobs, rewards, groups, cu_seqlens = batch.tokens
    floats = (logprobs.to(dtype), ref_logprobs.to(dtype), rewards.to(dtype))
    tokens = AgroTokens(*floats, groups.int(), cu_seqlens.long())
    arguments = (tokens, batch.op_options("on-policy"))
    loss, coefficients = kernels.agro_loss_fwd(*on_device(arguments))
    exact_loss, exact_coefficients = torch_path.agro_loss_fwd(*arguments)
    assert_same((coefficients,), (exact_coefficients,))
    torch.testing.assert_close(loss.cpu(), exact_loss, rtol=2**-23, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_gradients_match_torch_path(dtype: torch.dtype) -> None:
    batch = Batch()
    num_tokens, num_rows = len(batch.logprobs), len(batch.rewards)
    coefficients = torch.linspace(-1, 1, num_rows, dtype=torch.float64)
    arguments = (torch.tensor(1.5), coefficients, batch.cu_seqlens, num_tokens)
    ours = kernels.agro_loss_bwd(*on_device(arguments), dtype)
    truth = torch_path.agro_loss_bwd(*arguments, torch.float64)
    # The interpreter cuts bf16 off where a GPU rounds, so equality is too much to ask.
    assert_close_to_truth(ours, truth, torch_path.agro_loss_bwd(*arguments, dtype))
    assert ours.dtype == dtype


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_tiny_batches_match_torch_path(num_rows: int) -> None:
    logprobs, ref_logprobs, rewards = torch.randn(
        3, num_rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    groups, cu_seqlens = torch.zeros(num_rows).long(), torch.arange(num_rows + 1)
    tokens = AgroTokens(logprobs, ref_logprobs, rewards, groups, cu_seqlens)
    arguments = (tokens, Batch().op_options("capped"))
    ours = kernels.agro_loss_fwd(*on_device(arguments))
    exact = torch_path.agro_loss_fwd(*arguments)
    assert_same(ours, exact)
    backward = (torch.tensor(1.0), exact[1], cu_seqlens, num_rows, torch.float64)
    assert_same(
        (kernels.agro_loss_bwd(*on_device(backward)),), (torch_path.agro_loss_bwd(*backward),)
    )


def test_a_sequence_with_impossible_bounds_is_dropped() -> None:
    """The values cannot be checked without waiting for the device, so no address may trust them."""
    batch = Batch()
    wrong = batch.cu_seqlens.clone()
    wrong[-1] = len(batch.logprobs) + 1000
    tokens = batch.tokens._replace(cu_seqlens=wrong)
    arguments = (tokens, batch.op_options("off-policy"))
    loss, coefficients = kernels.agro_loss_fwd(*on_device(arguments))
    batch.rewards[-1] = math.nan
    exact = torch_path.agro_loss_fwd(batch.tokens, batch.op_options("off-policy"))
    assert_same((loss, coefficients), exact)


def test_tokens_after_the_last_sequence_get_no_gradient() -> None:
    arguments = (torch.tensor(1.0), torch.ones(2).double(), torch.tensor([0, 2, 3]), 7)
    ours = kernels.agro_loss_bwd(*on_device(arguments), torch.float32)
    assert ours.tolist() == [1.0] * 3 + [0.0] * 4


def test_noncontiguous_inputs_match_torch_path() -> None:
    batch = Batch()
    arguments = (*batch.sums, batch.op_options("mixed"))

    def strided(values: tuple) -> tuple:
        """Every tensor (B,) as a column of a matrix."""
        columns = (
            type(v)(*strided(v))
            if isinstance(v, AgroOptions)
            else torch.stack([v, v], 1)[:, 0]
            if isinstance(v, Tensor) and v.ndim == 1
            else v
            for v in values
        )
        return tuple(columns)

    assert_same(
        kernels.agro_coefficients(*strided(on_device(arguments))),
        torch_path.agro_coefficients(*arguments),
    )


def test_repeat_is_bitwise_equal() -> None:
    batch = Batch()
    arguments = on_device((batch.tokens, batch.op_options("on-policy")))
    first, second = (kernels.agro_loss_fwd(*arguments) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


COMPILE = """
import json
from benchmarks.predict.compile_report import agro_cases, compiled

ptx = {case.name: compiled(case, "sm_90").asm["ptx"] for case in agro_cases()}
print(json.dumps({name: ".f64" in code for name, code in ptx.items()}))
"""


def test_kernels_compile_for_sm_90() -> None:
    """In a process of its own, because interpreted kernels cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    in_float64 = json.loads(done.stdout)
    assert in_float64.keys() == KERNELS
    assert all(in_float64.values()), in_float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_cuda_tensors_are_served_without_a_host_synchronisation() -> None:
    batch = Batch()
    tokens = on_device(batch.tokens)
    logprobs = tokens[0].requires_grad_()
    sums = on_device(batch.sums)
    sampled, exponents = on_device((batch.sampling_logprobs, batch.row_taper))

    def step() -> None:
        for taper in (0.0, 1.0, exponents):
            options = {"num_groups": 3, "sampling_logprobs": sampled, "taper": taper}
            agro_loss(logprobs, *tokens[1:], beta=BETA, **options).backward()
            agro_coefficients(*sums, beta=BETA, **options)

    step()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
