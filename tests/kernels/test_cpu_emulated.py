"""NEON, compiled for 64-bit ARM and run in an emulator where this machine is another one: the law.

Needs a cross compiler and qemu's user mode; on Debian `apt-get install g++-aarch64-linux-gnu
qemu-user`. An emulator proves the results, not the speed. On an ARM machine the other tests of the
CPU kernels run them natively.
"""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agro_kernels._cpu.linear_logprobs import DTYPES
from tests.kernels.sanitize import build_library
from tests.kernels.test_cpu_linear_logprobs import NAMES, SHAPES, by_plain_torch, upstream
from tests.numerics import HeadInputs, assert_close_to_truth, head_inputs

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # Debian's root of the ARM libraries

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None or shutil.which(EMULATOR) is None,
    reason=f"needs {COMPILER} and {EMULATOR}",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs call_native.cpp in the emulator, csrc linked to it."""
    folder = tmp_path_factory.mktemp("arm")
    library, binary = build_library(folder, CXX=COMPILER), folder / "call_native"
    source = Path(__file__).with_name("call_native.cpp")
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", source, library,
         f"-Wl,-rpath,{library.parent}", "-o", binary],
        check=True,
    )  # fmt: skip
    return [EMULATOR, "-L", LIBRARIES, str(binary)]


def raw(tensor: Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()


def by_emulator(
    program: list[str],
    inputs: HeadInputs,
    *,
    isa: str = "neon",
    threads: int = 1,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    kept_columns: int = 0,
) -> list[Tensor]:
    """logprobs, lse, entropy and the gradients by `upstream`."""
    hidden, weight, targets, bias = inputs.hidden, inputs.weight, inputs.targets, inputs.bias
    (n, d), v = hidden.shape, weight.shape[0]
    per_token = isinstance(temperature, Tensor)
    sizes = struct.pack(
        "8q2f", n, d, v, -100, DTYPES[hidden.dtype], threads, bias is not None, kept_columns,
        0.0 if per_token else temperature, softcap or 0.0,
    )  # fmt: skip
    temperatures = temperature if isinstance(temperature, Tensor) else torch.ones(n)
    arrays = [hidden, weight, bias, targets, temperatures, *upstream(n)]
    call = sizes + b"".join(map(raw, arrays))
    done = subprocess.run([*program, isa], input=call, capture_output=True, check=True)
    shapes = [(n,), (n,), (n,), (n, d), (v, d), (v,)][: 5 + (bias is not None)]
    dtypes = [torch.float32] * 3 + [hidden.dtype] * 3
    results, at = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=False):
        result = torch.empty(shape, dtype=dtype)
        part = done.stdout[at : at + result.numel() * result.element_size()]
        if part:
            result = torch.frombuffer(bytearray(part), dtype=dtype).reshape(shape)
        results.append(result)
        at += len(part)
    assert at == len(done.stdout)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept", [False, True], ids=["made again", "kept"])
def test_every_dtype_and_shape(
    program: list[str], shape: tuple[int, int, int], dtype: torch.dtype, kept: bool
) -> None:
    inputs = head_inputs(*shape, dtype=dtype, bias=True, ignored=True)
    ours = by_emulator(program, inputs, threads=2, kept_columns=shape[2] if kept else 0)
    truth = by_plain_torch(inputs, torch.float64)
    plain = by_plain_torch(inputs, dtype)
    for name, *results in zip(NAMES, ours, truth, plain, strict=True):
        assert_close_to_truth(*results, name)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_softcap_and_temperatures(program: list[str], softcap: float | None) -> None:
    inputs = head_inputs(37, 53, 301, dtype=torch.bfloat16)
    temperature = torch.linspace(0.5, 2.0, 37)
    options = {"temperature": temperature, "softcap": softcap}
    ours = by_emulator(program, inputs, temperature=temperature, softcap=softcap)
    truth = by_plain_torch(inputs, torch.float64, **options)
    plain = by_plain_torch(inputs, torch.bfloat16, **options)
    for name, *results in zip(NAMES[:5], ours, truth, plain, strict=True):
        assert_close_to_truth(*results, name)


def test_forward_has_the_same_bits_for_every_number_of_threads(program: list[str]) -> None:
    inputs = head_inputs(37, 53, 2000)
    one, three = (by_emulator(program, inputs, threads=threads) for threads in (1, 3))
    for name, left, right in zip(NAMES[:3], one, three, strict=False):
        assert torch.equal(left, right), name


def test_an_instruction_set_of_another_cpu_is_refused(program: list[str]) -> None:
    done = subprocess.run([*program, "avx2"], input=b"", capture_output=True, text=False)
    assert done.returncode == 2
    assert b"neon,scalar" in done.stderr
