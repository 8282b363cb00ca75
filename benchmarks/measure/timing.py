"""How time and memory are measured, and what the machine is: the same way in every benchmark."""

import ctypes
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from agro_kernels._cpu import native

# Larger than the L2 cache of any GPU. Written before each timed call, so that the call's inputs are
# not in the cache.
FLUSH_BYTES = 256 * 1024 * 1024
# The CPU features that decide which kernels run, of the many flags that a CPU has.
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16",
                "asimd", "bf16", "sve")  # fmt: skip
# The environment of a process whose freed blocks above 64 kB return to the system at once, so that
# what is in RAM is what is alive. glibc reads it when the process starts.
RETURNS_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
                        "MALLOC_ARENA_MAX": "1"}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """n calls, in seconds. p20 and p80 are the 20th and 80th percentile."""

    n: int
    median_s: float
    min_s: float
    p20_s: float
    p80_s: float


def summary(times: Sequence[float]) -> Timing:
    """The median and spread of times in seconds."""
    ordered = sorted(times)

    def percentile(part: float) -> float:
        position = part * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return Timing(
        len(ordered), statistics.median(ordered), ordered[0], percentile(0.2), percentile(0.8)
    )


def time_calls(
    function: Callable[[], object], repetitions: int, device: str = "cpu"
) -> list[float]:
    """Seconds of each call. On a GPU by its own events, with the L2 cache flushed in between."""
    return [time_call(function, device) for _ in range(repetitions)]


def time_call(function: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call."""
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1000.0


# --- Memory ---------------------------------------------------------------------------------------


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """The most memory in use during one call beyond what was in use before it, in bytes.

    On a CPU the memory is the whole process's, as Linux counts it (to about 1 MB); results are
    included. Run the function once before, or compiled code and caches are counted too.
    """
    if torch.device(device).type != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    reset_peak()
    before = resident_bytes()
    function()
    return high_water_bytes() - before


def reset_peak() -> None:
    """Resets the process's peak memory, after returning freed heap memory to the system."""
    ctypes.CDLL(None).malloc_trim(0)  # else a call that reuses freed memory seems to need none
    Path("/proc/self/clear_refs").write_text("5")


def keep_freed_memory() -> None:
    """From now on the process keeps the memory that it frees, as with a caching allocator.

    glibc by default returns every large block to the system, so that fresh pages are part of each
    call's time. What they cost varies: 0.2 to 2.5 s a gigabyte, within one minute, on a virtual
    machine that returns them to its host. Raises RuntimeError without glibc.
    """
    m_mmap_max, m_trim_threshold = -4, -1  # malloc.h
    no_map, no_trim = 0, -1  # M_MMAP_THRESHOLD ends at 2 GiB; gradients of weights are larger
    allocator = ctypes.CDLL(None)
    if not (allocator.mallopt(m_mmap_max, no_map) and allocator.mallopt(m_trim_threshold, no_trim)):
        raise RuntimeError("mallopt refused: keeping freed memory needs glibc's allocator")


def resident_bytes() -> int:
    """Memory of this process in RAM now, in bytes."""
    return _status_bytes("VmRSS")


def high_water_bytes() -> int:
    """The most memory of this process in RAM since `reset_peak`, in bytes."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory needs Linux")


# --- Machine --------------------------------------------------------------------------------------


def machine_facts(device: str = "cpu") -> dict[str, str]:
    """What a reader needs to repeat a measurement; a column each in every CSV."""
    facts = {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_or("triton", "none"),
        "threads": str(torch.get_num_threads()),
        "cpu": cpu_model(),
        "cpu_features": " ".join(cpu_features()),
    }
    if torch.device(device).type == "cpu":
        facts["ours_instruction_set"] = ours_instruction_set()
    else:
        facts |= gpu_facts()
    return facts


def commit() -> str:
    """Short hash of the checked-out commit, with a + if files differ from it; "unknown" outside."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def cpu_model() -> str:
    """Name, family and model of the CPU: hypervisors shorten the name to the vendor's."""
    fields = _cpuinfo()
    name = fields.get("model name", platform.processor() or platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']} model {fields['model']})"
    return f"{name}, {os.cpu_count()} cores"


def cpu_features() -> list[str]:
    """Those of CPU_FEATURES that this CPU has."""
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return [feature for feature in CPU_FEATURES if feature in flags]


def ours_instruction_set() -> str:
    """Which of the CPU kernels serves the head ops here; "torch" for the blocked torch path."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("agro::linear_logprobs_fwd", "CPU"):
        return "torch"
    library = native.load()
    return "torch" if library is None else str(library.agro_isa().decode())


def gpu_facts() -> dict[str, str]:
    """Name, driver, clocks and power limit of the current GPU."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    index = torch.cuda.current_device()
    facts = {"gpu": torch.cuda.get_device_name(index)}
    try:
        done = subprocess.run(
            [*command, f"--id={index}"], capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):  # ROCm has no nvidia-smi
        return facts | {"driver": str(torch.version.hip or "unknown")}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    names = ("driver", "sm_clock", "sm_clock_max", "memory_clock", "power_limit")
    return facts | dict(zip(names, values, strict=True))


def _cpuinfo() -> dict[str, str]:
    """The first core's entry of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    entry = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in entry.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def version_or(package: str, otherwise: str) -> str:
    """The installed version of a package, or `otherwise`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return otherwise
