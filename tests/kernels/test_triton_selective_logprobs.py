"""The Triton kernels of selective_logprobs against float64: interpreted, or run on a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not available on this platform")

from agro_kernels import reference
from agro_kernels._torch import selective_logprobs as torch_path
from agro_kernels._triton import selective_logprobs as kernels
from agro_kernels.logit_rows import LogitRows
from tests.conftest import SetSizes
from tests.kernels.test_selective_logprobs import logits_and_targets
from tests.numerics import assert_close_to_truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ODD = (13, 45)  # N, V: seven row blocks and three tiles of the blocks below, both with a tail

pytestmark = [
    # NumPy, with which the interpreter computes, remarks on the NaN and inf rows of these tests.
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def small_blocks(set_sizes: SetSizes) -> None:
    set_sizes(kernels, BLOCK_V=16)


def upstream_of(targets: Tensor) -> Tensor:
    return torch.linspace(-2.0, 3.0, targets.numel(), device=targets.device).view(targets.shape)


def op_temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    if isinstance(temperature, Tensor):
        return 1.0, temperature.reshape(-1).float().to(DEVICE)
    return temperature, None


def ours(
    logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0, path=kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, dlogits for upstream_of) of the kernels."""
    logits, targets = logits.to(DEVICE), targets.to(DEVICE)
    given = LogitRows(logits, targets, *op_temperature(temperature), -100)
    logprobs, lse = path.selective_logprobs_fwd(given)
    return logprobs, lse, path.selective_logprobs_bwd(upstream_of(targets), given, lse)


def by_autograd(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the reference, computed in dtype (16-bit logits: in fp32, as model code does)."""
    leaf = logits.detach().to(dtype).requires_grad_()
    logprobs = reference.selective_logprobs(leaf, targets, temperature=temperature)
    total = (logprobs * upstream_of(targets).to(logprobs.dtype)).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    scaled = (leaf.detach() if dtype == torch.float64 else leaf.detach().float()) / scale
    return logprobs.detach(), scaled.logsumexp(-1).where(targets != -100, 0.0), gradient


def check(logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0) -> None:
    results = ours(logits, targets, temperature)
    if isinstance(temperature, Tensor):  # what the op is given: fp32
        temperature = temperature.float()
    truth = by_autograd(logits, targets, temperature, torch.float64)
    plain = by_autograd(logits, targets, temperature, logits.dtype)
    for name, our, true, pl in zip(("logprobs", "lse", "dlogits"), results, truth, plain):  # noqa: B905
        assert our.dtype == (logits.dtype if name == "dlogits" else torch.float32)
        assert_close_to_truth(our, true.double(), pl, name)


@pytest.mark.parametrize("temperature", [1.0, 0.6, "per-token"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype: torch.dtype, temperature: float | str) -> None:
    logits, targets = logits_and_targets(*ODD, dtype=dtype)
    targets[3::4] = -100
    value = torch.linspace(0.5, 2.0, ODD[0]) if temperature == "per-token" else temperature
    check(logits, targets, value)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4, 16), (1, 1), (5, 3), (2, 64)], ids=str)
def test_other_shapes_match_float64(shape: tuple[int, int]) -> None:
    check(*logits_and_targets(*shape))


def test_int32_targets_match_int64_ones() -> None:
    logits, targets = logits_and_targets(*ODD)
    for a, b in zip(ours(logits, targets), ours(logits, targets.int()), strict=True):
        assert torch.equal(a, b)


def test_the_shipped_blocks_match_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    check(*logits_and_targets(6, 2500))


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 5, 9), (2, 3, 2, 9)], ids=str)
def test_any_number_of_axes(shape: tuple[int, ...]) -> None:
    logits, targets = logits_and_targets(*shape)
    per_token = torch.linspace(0.5, 2.0, targets.numel())
    results = ours(logits, targets, per_token)
    flat = ours(logits.reshape(-1, shape[-1]), targets.reshape(-1), per_token)
    for result, expected in zip(results, flat, strict=True):
        assert torch.equal(result.reshape(expected.shape), expected)
    assert [tuple(r.shape) for r in results] == [shape[:-1], shape[:-1], shape]


VIEWS = {
    "shifted": lambda logits: logits[:, :-1],
    "every second token": lambda logits: logits[:, ::2],
    "part of the vocabulary": lambda logits: logits[..., 2:21],
    "vocabulary first": lambda logits: logits.transpose(0, 2).contiguous().transpose(0, 2),
    "batch inside": lambda logits: logits.transpose(0, 1),
    "expanded": lambda logits: logits[:1].expand(4, -1, -1),
    "four axes": lambda logits: logits.unflatten(0, (2, 2)).transpose(1, 2),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_logits_match_contiguous_ones(view: str) -> None:
    logits, _ = logits_and_targets(4, 6, 25)
    logits = VIEWS[view](logits)
    targets = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    strided = ours(logits, targets)
    for a, b in zip(strided, ours(logits.contiguous(), targets), strict=True):
        assert torch.equal(a, b)
    assert strided[2].is_contiguous()


def test_a_shifted_view_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = logits_and_targets(3, 6, 20)
    seen = []
    kernel = kernels.selective_logprobs_fwd_kernel

    class Recorder:
        def __getitem__(self, grid):
            seen.append(grid)
            return lambda **arguments: (
                seen.append(arguments["logits_ptr"].data_ptr()),
                kernel[grid](**arguments),
            )

    monkeypatch.setattr(kernels, "selective_logprobs_fwd_kernel", Recorder())
    shifted = logits.to(DEVICE)[:, :-1]
    rest = (targets[:, 1:].to(DEVICE), 1.0, None, -100)
    kernels.selective_logprobs_fwd(LogitRows(shifted, *rest))
    assert seen[1] == shifted.data_ptr()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
def test_ignored_rows_and_rows_without_upstream_give_exact_zeros(garbage: float) -> None:
    logits, targets = logits_and_targets(*ODD)
    expected = ours(logits, targets)
    out, idle = torch.arange(13) % 3 == 0, torch.arange(13) % 3 == 1
    targets[out] = -100
    logits[out] = garbage
    logprobs, lse, dlogits = ours(logits, targets)
    for result, clean in zip((logprobs, lse, dlogits), expected, strict=True):
        assert torch.equal(result[~out], clean[~out])
        assert not result[out].any()
    logits[idle] = garbage
    upstream = upstream_of(targets.to(DEVICE)).masked_fill(idle.to(DEVICE), 0.0)
    given = LogitRows(logits.to(DEVICE), targets.to(DEVICE), 1.0, None, -100)
    dlogits = kernels.selective_logprobs_bwd(upstream, given, lse)
    assert torch.equal(dlogits[~out & ~idle], expected[2][~out & ~idle])
    assert not dlogits[out | idle].any()


def test_banned_tokens_give_no_nan() -> None:
    logits, targets = logits_and_targets(*ODD)
    logits[:, 5:40] = -torch.inf
    targets = targets % 5
    check(logits, targets)
    targets[2], targets[4] = 20, -100
    logprobs, _, dlogits = ours(logits, targets)
    assert torch.equal(logprobs == -torch.inf, torch.arange(13, device=DEVICE) == 2)
    assert dlogits.isfinite().all()
    logits[0] = -torch.inf
    logprobs, lse, _ = ours(logits, targets)
    assert logprobs[0].isnan() and lse[0] == -torch.inf
    assert logprobs[1:].isnan().sum() == 0


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
def test_tokens_masked_with_the_smallest_number_have_no_probability() -> None:
    logits, targets = logits_and_targets(*ODD)
    logits[:, 5:40] = torch.finfo(torch.float32).min
    check(logits, targets % 5)


def test_shifted_logits_keep_their_digits() -> None:
    logits, targets = logits_and_targets(*ODD)
    logits = logits.mul(1024).round() / 1024  # so that adding 1e4 is exact
    expected, _, _ = ours(logits, targets)
    shifted, _, _ = ours(logits + 1e4, targets)
    assert torch.equal(shifted, expected)


@pytest.mark.parametrize("target", [45, 1000, -1, -99])
def test_targets_outside_the_vocabulary_give_nan(target: int) -> None:
    """Looking at the values would stall the device, so they cannot be an error there."""
    logits, targets = logits_and_targets(*ODD)
    expected = ours(logits, targets)
    targets[5] = target
    results = ours(logits, targets)
    others = torch.arange(13) != 5
    assert results[0][5].isnan() and results[2][5].isnan().all()
    assert torch.equal(results[0][others], expected[0][others])
    assert torch.equal(results[2][others], expected[2][others])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits, targets = logits_and_targets(*ODD)
    expected, again = ours(logits, targets), ours(logits, targets)
    upstream = upstream_of(targets).to(DEVICE)
    for part in (slice(3, 4), slice(2, 9), slice(12, 13)):
        given = LogitRows(logits[part].to(DEVICE), targets[part].to(DEVICE), 1.0, None, -100)
        logprobs, lse = kernels.selective_logprobs_fwd(given)
        dlogits = kernels.selective_logprobs_bwd(upstream[part], given, lse)
        for ours_, all_rows in zip((logprobs, lse, dlogits), expected, strict=True):
            assert torch.equal(ours_, all_rows[part])
    for first, second in zip(expected, again, strict=True):
        assert torch.equal(first, second)


def test_matches_the_torch_path() -> None:
    """The two are exchanged by the device: the same zeros, infinities and shapes."""
    logits, targets = logits_and_targets(2, 5, 33)
    targets[0, 3], logits[1, 2, 4] = -100, -torch.inf
    per_token = torch.linspace(0.5, 2.0, 10)
    pairs = zip(
        ours(logits, targets, per_token),
        ours(logits, targets, per_token, path=torch_path),
        strict=True,
    )
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, rtol=2e-6, atol=2e-6)


COMPILE = """
import json, re, sys
import triton
from triton.compiler import ASTSource
from agro_kernels._triton.selective_logprobs import compile_cases
from benchmarks.predict.compile_report import TARGETS, cubin_usage

rows = []
for target in TARGETS:
    for name, kernel, signature, constexprs in compile_cases():
        # fp32 and an odd V, which need the most registers, on one target of each make.
        even = name.endswith("bf16")
        if not even and target not in ("sm_90", "gfx942"):
            continue
        multiples = ("V", "stride_logits_outer", "stride_logits_inner") if even else ()
        aligned = [
            i for i, argument in enumerate(kernel.arg_names)
            if signature[argument].startswith("*") or argument in multiples
        ]
        source = ASTSource(
            kernel, signature, constexprs, {(i,): [["tt.divisibility", 16]] for i in aligned}
        )
        asm = triton.compile(source, target=TARGETS[target]).asm
        if "cubin" in asm:
            spilled, vectors = cubin_usage(asm["cubin"])[1], asm["ptx"].count("ld.global.v4")
        else:
            spilled = int(re.findall(r"vgpr_spill_count:\\s*(\\d+)", asm["amdgcn"])[0])
            vectors = asm["amdgcn"].count("load_dwordx4")
        rows.append((target, name, even, spilled, vectors))
print(json.dumps(rows))
"""


def test_kernels_compile_without_spills_and_with_16_byte_loads() -> None:
    """In a process of its own, because interpreted kernels cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)  # target, kernel, V a multiple of 16, spilled bytes, loads
    assert {row[0] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942", "gfx950"}
    assert len(rows) == 5 * 2 + 2 * 2
    for target, name, even, spilled, vectors in rows:
        assert spilled == 0, (target, name, even, spilled)
        assert not even or vectors > 0, (target, name)
