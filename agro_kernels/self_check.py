"""What runs here, who serves which op, how exact it is and how fast: `python -m agro_kernels`.

Seconds on a CPU; on a GPU also the compilation of its kernels. The numbers are a probe on one small
shape: benchmarks/ measures.
"""

import os
import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agro_kernels import reference
from agro_kernels._cpu import native
from agro_kernels.linear_logprobs import linear_logprobs
from agro_kernels.ops.dispatch import triton_import_error

BESIDE = ("numpy", "transformers", "accelerate", "peft", "trl", "vllm")  # shown where installed
VARIABLES = ("AGRO_CPU_ISA", "OMP_NUM_THREADS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
TORCH_PATH = "blocked torch path"

# The law of tests/numerics.py: an error of ours is at most SLACK times that of plain torch in the
# same dtype, and EPS times the largest element of the truth more. A test holds the two together.
SLACK = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
EPS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    tokens: int
    hidden_size: int
    vocabulary: int


ACCURACY = Shape(64, 128, 1000)
SPEED = {"cpu": Shape(128, 512, 8192), "cuda": Shape(4096, 2048, 32768)}


class Accuracy(NamedTuple):
    """Largest errors against float64: of log-probabilities in nats, and of the gradients of hidden
    and weight as shares of their largest element; the same of plain torch; whether ours are within
    the law."""

    logprobs: float
    gradients: float
    plain_logprobs: float
    plain_gradients: float
    within: bool


def main() -> int:
    """Prints the report. 1 where an error is larger than the law allows, else 0."""
    lines, right = report()
    print("\n".join(lines))
    return 0 if right else 1


def report() -> tuple[list[str], bool]:
    """The lines, and whether every error is within the law."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    lines, right = software(), True
    for device in devices:
        lines += ["", device, *(f"  {line}" for line in served_by(device))]
        for dtype in SLACK:
            try:
                found = accuracy(device, dtype)
            except Exception as error:  # the report of a broken installation is wanted most of all
                lines.append(f"  {_short(dtype)} failed: {type(error).__name__}: {error}")
                right = False
                continue
            right = right and found.within
            lines.append(
                f"  {_short(dtype)} logprobs err by {found.logprobs:.1e} nats (plain torch "
                f"{found.plain_logprobs:.1e}), gradients by {found.gradients:.1e} of their largest "
                f"({found.plain_gradients:.1e}): {'right' if found.within else 'WRONG'}"
            )
        if right:
            lines += [f"  {line}" for line in speed(device)]
    lines += ["", "all right" if right else "NOT right: report it with all of the above"]
    return lines, right


def software() -> list[str]:
    """Versions and machine, one line each: a name and its value."""
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    rows = {
        "agro": _version("agro") or "(not installed, run from its sources)",
        "torch": torch.__version__,
        "triton": _version("triton") or "(not installed)",
        "beside": ", ".join(f"{name} {v}" for name in BESIDE if (v := _version(name))) or "nothing",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpu": f"{_cpu_name()}, {threads}",
        "gpu": _gpu(),
        "set": ", ".join(f"{k}={os.environ[k]}" for k in VARIABLES if k in os.environ) or "nothing",
    }
    return [f"{name:7} {value}" for name, value in rows.items()]


def served_by(device: str) -> list[str]:
    """Who computes which op on the device."""
    fast, why = TORCH_PATH, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is said below
        if device == "cpu":
            library = native.load()
            if library is not None:
                built = library.agro_available_isas().decode().replace(",", ", ")
                fast = f"native kernels, {library.agro_isa().decode()} (built in and runs: {built})"
            elif os.environ.get("AGRO_CPU_ISA") == "none":
                why = "AGRO_CPU_ISA is none"
            else:
                why = "the native library is not built, or cannot be loaded"
        else:
            error = triton_import_error()
            fast, why = ("Triton", "") if error is None else (fast, f"triton: {error}")
    if fast == TORCH_PATH:
        head, rest = f"{fast}, for {why}", fast
    elif device == "cpu":
        head, rest = f"{fast}; {TORCH_PATH} for float64, round_logits and kept_ids", TORCH_PATH
    else:
        head, rest = f"{fast}; {TORCH_PATH} for float64", fast
    return [
        f"linear_logprobs, weighted_logprob_sum: {head}",
        f"selective_logprobs, agro_coefficients, agro_loss: {rest}",
    ]


def accuracy(device: str, dtype: torch.dtype) -> Accuracy:
    """Ours and plain torch on one set of numbers, beside float64."""
    hidden, weight, targets = _inputs(ACCURACY, device, dtype)
    truth = _with_gradients(_true_logprobs, hidden.double(), weight.double(), targets)
    ours = _with_gradients(linear_logprobs, hidden, weight, targets)
    plain = _with_gradients(_plain_logprobs, hidden, weight, targets)
    within, errors, plain_errors = True, [], []
    for result, true, usual in zip(ours, truth, plain, strict=True):
        error = float((result.double() - true).abs().nan_to_num(nan=torch.inf).max())
        plain_error = float((usual.double() - true).abs().max())
        largest = float(true.abs().max())
        allowed = SLACK[result.dtype] * plain_error + EPS[result.dtype] * largest
        within = within and error <= allowed
        errors.append((error, error / largest))
        plain_errors.append((plain_error, plain_error / largest))
    return Accuracy(
        logprobs=errors[0][0],
        gradients=max(share for _, share in errors[1:]),
        plain_logprobs=plain_errors[0][0],
        plain_gradients=max(share for _, share in plain_errors[1:]),
        within=within,
    )


def speed(device: str) -> list[str]:
    """Forward and backward beside plain torch, which stores the logits: the best of three each."""
    shape = SPEED[device]
    n, d, v = shape
    lines = [f"forward and backward of {n} tokens, hidden size {d}, vocabulary {v}:"]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = _inputs(shape, device, dtype)
        ours, plain = (
            _seconds(function, *inputs) for function in (linear_logprobs, _plain_logprobs)
        )
        rate = 4 * 2 * n * d * v / ours / 1e9  # four matrix products
        lines.append(
            f"  {_short(dtype)} {ours * 1e3:.1f} ms, {rate:.0f} GFLOP/s; plain torch "
            f"{plain * 1e3:.1f} ms"
        )
    return lines


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets; the logits have a standard deviation of about 3."""
    generator = torch.Generator().manual_seed(0)
    n, d, v = shape
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator) * (3.0 / d**0.5)
    targets = torch.randint(v, (n,), generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def _with_gradients(
    logprobs: Logprobs, hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probabilities, and the gradients of their mean with respect to hidden and weight."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    results = logprobs(*leaves, targets)
    dhidden, dweight = torch.autograd.grad(results.mean(), leaves)
    return results.detach(), dhidden, dweight


def _true_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return reference.linear_logprobs_with_stats(hidden, weight, targets)[0]


def _plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def _seconds(logprobs: Logprobs, hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    times = []
    for _ in range(4):  # the first one compiles, and makes the buffers
        _wait(hidden)
        began = time.perf_counter()
        _with_gradients(logprobs, hidden, weight, targets)
        _wait(hidden)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    major, minor = torch.cuda.get_device_capability()
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return f"{torch.cuda.get_device_name()}, capability {major}.{minor}, {runtime}"
