"""What the compiler makes of every Triton kernel, for GPUs that are not here.

    python -m benchmarks.predict.compile_report [--target sm_90 ...] [--quick] [--csv PATH]

The launchers are called with tensors that have shapes and no memory; what they would launch is
compiled for the target, with its rows of tiles.py. No GPU is needed and nothing runs. One line a
case: registers and spilled bytes of a thread, shared memory of a program, how many programs a
multiprocessor holds at once, and how many of the instructions that make a kernel fast its code has:
matrix products (wgmma, tcgen05, mma.sync, mfma), hardware exp2, copies to shared memory that
bypass the registers (cp.async, TMA).

    target  case                             tile           loads      registers spilled_bytes ...
    sm_90   linear_logprobs_fwd entropy bf16 128x256x64 8 4 descriptor 255       0             ...
"""

import argparse
import contextlib
import csv
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton._utils import canonicalize_dtype
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from agro_kernels import kept_logits
from agro_kernels._triton import (
    agro_loss,
    head_gradients,
    launch,
    linear_logprobs,
    selective_logprobs,
    target_logprobs,
)
from agro_kernels.agro_options import AgroOptions, AgroTokens
from agro_kernels.backward import Backward
from agro_kernels.head import Head, Upstream
from agro_kernels.kept_logits import GPU_STEP, GPU_TILE, KeptLogits
from agro_kernels.many_targets import KnownEntries
from agro_kernels.tiles import keeps_logits
from benchmarks.measure.rows import column_names, texts

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
MATRIX_INSTRUCTIONS = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}
# Shared memory of a multiprocessor, in bytes; on NVIDIA's each program also costs 1 KB of it.
SHARED_BYTES = {
    "sm_80": 164 * 1024,
    "sm_90": 228 * 1024,
    "sm_100": 228 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}

# Llama 3's vocabulary and one that no tile divides; a large and a small hidden size, for which
# tiles.py has different rows.
NUM_TOKENS, VOCABULARY, RAGGED_VOCABULARY = 8192, 128256, 50257
HIDDEN_SIZES = (4096, 1024)
EXTRAS = frozenset({"bias", "token_temperature", "round_logits", "kept", "ragged"})
EVERYTHING = EXTRAS | {"softcap"}
# Name -> what the call has. "everything" comes without the softcap too, for which tiles.py may
# have another row, and first: of calls with the same tile --quick takes the first.
FWD_CALLS = {
    "everything": EVERYTHING | {"entropy"},
    "all but softcap": EXTRAS | {"entropy"},
    "logprobs": frozenset[str](),
    "entropy": frozenset({"entropy"}),
    "entropy ragged": frozenset({"entropy", "ragged"}),
    "softcap": frozenset({"entropy", "softcap"}),
    "kept": frozenset({"entropy", "kept"}),
    "keep": frozenset({"entropy", "keep"}),
    "keep ragged": frozenset({"entropy", "keep", "ragged"}),
}
BWD_CALLS = {
    "everything": EVERYTHING | {"dlogprobs", "dlse", "dentropy"},
    "all but softcap": EXTRAS | {"dlogprobs", "dlse", "dentropy"},
    "entropy": frozenset({"dlogprobs", "dentropy"}),
    "entropy ragged": frozenset({"dlogprobs", "dentropy", "ragged"}),
    "dlogprobs": frozenset({"dlogprobs"}),
    "dlogprobs ragged": frozenset({"dlogprobs", "ragged"}),
    "dlogprobs softcap": frozenset({"dlogprobs", "softcap"}),
    "dlogprobs kept": frozenset({"dlogprobs", "kept"}),
    "dlogprobs, all but softcap": EXTRAS | {"dlogprobs"},
    "dlogprobs, everything": EVERYTHING | {"dlogprobs"},
    "smoothed": frozenset({"dlogprobs", "dlse", "dsum"}),
    "smoothed, everything": EVERYTHING | {"dlogprobs", "dlse", "dsum"},
    "keep": frozenset({"dlogprobs", "dentropy", "keep"}),
    "keep ragged": frozenset({"dlogprobs", "dlse", "dentropy", "token_temperature"})
    | {"keep", "ragged"},
}
# What --quick compiles: the calls with most arguments, and what the trainer calls.
QUICK_CALLS = {"all but softcap", "everything", "dlogprobs", "keep"}


@dataclass(frozen=True)
class Case:
    """One kernel with its arguments' types and constants, as one call launches it."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: frozenset[str]  # arguments that are multiples of 16 (pointers: bytes)
    options: dict[str, int]  # num_warps, num_stages

    @property
    def tile(self) -> str:
        if not {"BLOCK_N", "BLOCK_V", "BLOCK_D"} <= self.constants.keys():
            return "-"
        blocks = "x".join(str(self.constants[f"BLOCK_{letter}"]) for letter in "NVD")
        return f"{blocks} {self.options['num_warps']} {self.options['num_stages']}"

    @property
    def identity(self) -> tuple[object, ...]:
        constants = tuple(sorted((name, str(value)) for name, value in self.constants.items()))
        return self.kernel.fn.__name__, tuple(self.signature.values()), constants, self.aligned


@dataclass(frozen=True)
class Row:
    """One line of the report. registers and spilled_bytes are of a thread."""

    target: str
    case: str
    tile: str  # BLOCK_N x BLOCK_V x BLOCK_D, warps, stages
    loads: str  # of the operands of the product: by descriptor (TMA) or by pointer
    registers: int
    spilled_bytes: int
    shared_bytes: int
    programs: int  # on a multiprocessor at once
    matrix: int
    exp2: int
    async_copies: int
    tma_copies: int
    serialised: int  # matrix products that wait for one another, by ptxas' own warnings


# --- What is launched -----------------------------------------------------------------------------


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel: triton.JITFunction) -> None:
        self.kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.launches.append(arguments)


def replaced_kernels(module: ModuleType, stack: contextlib.ExitStack) -> dict[str, Recorder]:
    """The kernels of a module by name, each replaced by its recorder until the stack is closed."""
    names = [name for name in vars(module) if name.endswith("_kernel")]
    recorders = {name: Recorder(getattr(module, name)) for name in names}
    for name, recorder in recorders.items():
        stack.enter_context(mock.patch.object(module, name, recorder))
    return recorders


@contextlib.contextmanager
def recorded(target: str) -> Iterator[dict[str, Recorder]]:
    """The head's kernels by name, while its launchers take a tensor without memory for a GPU's."""
    with contextlib.ExitStack() as stack:
        recorders = replaced_kernels(linear_logprobs, stack) | replaced_kernels(
            head_gradients, stack
        )
        architecture = target.replace("_", "")
        stack.enter_context(mock.patch.object(launch, "architecture", return_value=architecture))
        stack.enter_context(mock.patch.object(head_gradients, "add_product", return_value=None))
        stack.enter_context(mock.patch.object(head_gradients, "rounded_product", return_value=None))
        stack.enter_context(mock.patch.object(kept_logits, "CPU_TILE", GPU_TILE))
        yield recorders


def head_of(call: frozenset[str], dtype: torch.dtype, hidden_size: int, aligned: bool) -> Head:
    n, v = NUM_TOKENS, RAGGED_VOCABULARY if "ragged" in call else VOCABULARY

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = empty(v, hidden_size + (0 if aligned else 1), dtype=dtype)[:, :hidden_size]
    return Head(
        hidden=empty(n, hidden_size, dtype=dtype),
        weight=weight,
        targets=empty(n, dtype=torch.int64),
        bias=empty(v, dtype=dtype) if "bias" in call else None,
        temperature=0.7,
        token_temperature=empty(n) if "token_temperature" in call else None,
        softcap=30.0 if "softcap" in call else 0.0,
        ignore_index=-100,
        round_logits=torch.bfloat16 if "round_logits" in call else None,
        kept=empty(n, -(-v // 32), dtype=torch.int32) if "kept" in call else None,
    )


def kept_of(call: frozenset[str], head: Head) -> tuple[KeptLogits | None, Tensor | None]:
    """Room for all logits, and the rows of the tokens in it."""
    if "keep" not in call:
        return None, None
    n, columns = head.hidden.shape[0], head.weight.shape[0] // GPU_STEP * GPU_STEP
    logits = torch.empty(n, columns, dtype=torch.float16, device="meta")
    maxima = torch.empty(n, columns // GPU_TILE, device="meta")
    return KeptLogits(logits, maxima), torch.empty(n, dtype=torch.int64, device="meta")


def head_cases(target: str, quick: bool) -> list[Case]:
    """The kernels of linear_logprobs: every row of tiles.py, and every kind of call it is for."""
    cases: dict[tuple[object, ...], Case] = {}

    def add(name: str, recorder: Recorder) -> None:
        for arguments in recorder.launches[:1]:  # later ones differ in numbers only
            case = case_of(name, recorder.kernel, arguments)
            kind = "dlogprobs" in name, "keep" in name
            same = (case.kernel, case.tile, *kind) if quick else case.identity
            cases.setdefault(same, case)
        recorder.launches.clear()

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    with recorded(target) as kernels:
        for dtype, d, aligned in itertools.product(dtypes, HIDDEN_SIZES, (True, False)):
            suffix = canonicalize_dtype(dtype) + ("" if aligned else " unaligned")
            for name, call in FWD_CALLS.items():
                if unwanted(name, suffix, quick) or not possible(call, d, target):
                    continue
                head = head_of(call, dtype, d, aligned)
                linear_logprobs._statistics(head, "entropy" in call, *kept_of(call, head))
                add(f"linear_logprobs_fwd {name} {suffix}", kernels["linear_logprobs_fwd_kernel"])
                add("linear_logprobs_fwd_merge", kernels["linear_logprobs_fwd_merge_kernel"])
            for name, call in BWD_CALLS.items():
                if unwanted(name, suffix, quick) or not possible(call, d, target):
                    continue
                head = head_of(call, dtype, d, aligned)
                per_token = torch.empty(NUM_TOKENS, device="meta")
                upstream = Upstream(
                    dlogprobs=per_token if "dlogprobs" in call else None,
                    dlse=per_token if "dlse" in call else None,
                    dentropy=per_token if "dentropy" in call else None,
                    lse=per_token,
                    entropy=per_token if "dentropy" in call else None,
                    dsum=per_token if "dsum" in call else None,
                )
                kept, kept_rows = kept_of(call, head)
                backward = Backward(upstream, head, [True, True, False], None, kept)
                head_gradients.head_gradients(backward, kept_rows)
                # Of kept logits there is no product.
                kernel = "dlogits_of_kept" if "keep" in call else "linear_logprobs_bwd"
                add(f"{kernel} {name} {suffix}", kernels["linear_logprobs_bwd_kernel"])
    return list(cases.values())


def possible(call: frozenset[str], hidden_size: int, target: str) -> bool:
    """Whether the ops make such a call: they do not keep logits everywhere."""
    if "keep" not in call:
        return True
    v = RAGGED_VOCABULARY if "ragged" in call else VOCABULARY
    return keeps_logits(target.replace("_", ""), hidden_size, v, softcap="softcap" in call)


def unwanted(call: str, suffix: str, quick: bool) -> bool:
    """fp16 has the instructions of bf16, and fp32 one row: of both only the largest calls.

    Of fp32 nothing is kept.
    """
    if quick and (call not in QUICK_CALLS or suffix not in ("bf16", "fp32")):
        return True
    return not suffix.startswith("bf16") and "everything" not in call


def case_of(name: str, kernel: triton.JITFunction, arguments: dict[str, Any]) -> Case:
    """A launch's arguments by type, specialised as Triton's JIT does it."""
    options: dict[str, int] = {
        key: arguments.pop(key) for key in ("num_warps", "num_stages") if key in arguments
    }
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    aligned = set()
    for parameter in kernel.params:
        value = arguments[parameter.name]
        specialised = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, TensorDescriptor):
            dtype, block = canonicalize_dtype(value.base.dtype), value.block_shape
            signature[parameter.name] = f"tensordesc<{dtype}{list(block)}>".replace(" ", "")
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{canonicalize_dtype(value.dtype)}"
            aligned.add(parameter.name)
        elif isinstance(value, float):
            signature[parameter.name] = parameter.annotation_type or "fp32"
        else:
            signature[parameter.name] = "i32"
            if specialised and value % 16 == 0:
                aligned.add(parameter.name)
    return Case(name, kernel, signature, constants, frozenset(aligned), options)


def agro_cases() -> list[Case]:
    """The kernels of agro_loss, all options on, for a batch of fp32 numbers."""
    num_tokens, num_sequences = 1000, 18

    def empty(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    options = AgroOptions(
        beta=0.1,
        lr_weight=1.0,
        lr_cap=True,
        on_policy=empty(num_sequences, torch.bool),
        lr_baseline=None,
        importance_weights=empty(num_sequences),
        num_groups=torch.empty((), dtype=torch.float64, device="meta"),
        scale=1.0,
        sampling_logprobs=empty(num_sequences),
        taper=0.0,
        row_taper=empty(num_sequences),
    )
    sums, tokens = empty(num_sequences), empty(num_tokens)
    groups = empty(num_sequences, torch.int64)
    cu_seqlens = empty(num_sequences + 1, torch.int32)
    with contextlib.ExitStack() as stack:
        kernels = replaced_kernels(agro_loss, stack)
        agro_loss.agro_coefficients(sums, sums, sums, groups, options)
        of_tokens = AgroTokens(tokens, tokens, sums, groups, cu_seqlens)
        _, coefficients = agro_loss.agro_loss_fwd(of_tokens, options)
        agro_loss.agro_loss_bwd(empty(1), coefficients, cu_seqlens, num_tokens, torch.float32)
        return [
            case_of(name, kernel.kernel, kernel.launches[0]) for name, kernel in kernels.items()
        ]


def known_entries_cases() -> list[Case]:
    """The kernel that writes the entries of many targets a token, for each dtype."""
    known = KnownEntries(
        torch.empty(NUM_TOKENS, 32, dtype=torch.int64, device="meta"),
        torch.empty(NUM_TOKENS, 32, device="meta"),
    )
    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        dlogits = torch.empty(NUM_TOKENS, 8192, dtype=dtype, device="meta")
        with contextlib.ExitStack() as stack:
            kernels = replaced_kernels(head_gradients, stack)
            head_gradients._write_known(dlogits, 0, known)
        recorder = kernels["write_known_entries_kernel"]
        name = f"write_known_entries_kernel {canonicalize_dtype(dtype)}"
        cases.append(case_of(name, recorder.kernel, recorder.launches[0]))
    return cases


def target_logprobs_cases() -> list[Case]:
    """The kernel of the logits of given ids, with every option and with none, for each dtype."""
    cases = []
    for dtype, (name, call) in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32),
        {"everything": EVERYTHING, "logprobs": frozenset[str]()}.items(),
    ):
        head, lse = (
            head_of(call, dtype, HIDDEN_SIZES[0], True),
            torch.empty(NUM_TOKENS, device="meta"),
        )
        with contextlib.ExitStack() as stack:
            recorder = replaced_kernels(target_logprobs, stack)["target_logprobs_kernel"]
            if call:
                ids = torch.empty(NUM_TOKENS, 32, dtype=torch.int64, device="meta")
                target_logprobs.many_target_logprobs(head, ids, lse)
            else:
                target_logprobs.target_logprobs(head, lse)
        name = f"target_logprobs_kernel {name} {canonicalize_dtype(dtype)}"
        cases.append(case_of(name, recorder.kernel, recorder.launches[0]))
    return cases


def other_cases() -> list[Case]:
    """The kernels beside the head's two, of agro_loss and of selective_logprobs."""
    return (
        known_entries_cases()
        + target_logprobs_cases()
        + agro_cases()
        + [
            Case(name, kernel, signature, constants, frozenset(), {})
            for name, kernel, signature, constants in selective_logprobs.compile_cases()
        ]
    )


# --- What the compiler reports --------------------------------------------------------------------


def compiled(case: Case, target: str) -> Any:
    source = ASTSource(
        fn=case.kernel,
        signature=case.signature,
        constexprs=case.constants,
        attrs={
            (case.kernel.arg_names.index(argument),): [["tt.divisibility", 16]]
            for argument in case.aligned
        },
    )
    return triton.compile(source, target=TARGETS[target], options=case.options)


def compile_case(case: Case, target: str) -> Row:
    """Compile one case and read the compiler's own numbers back."""
    kernel = compiled(case, target)
    if "cubin" in kernel.asm:
        code = kernel.asm["ptx"]
        registers, spilled_bytes = cubin_usage(kernel.asm["cubin"])
    else:
        code = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.findall(rf"\.{key}:\s*(\d+)", code)[0])
            for key in ("vgpr_count", "vgpr_spill_count")
        )
        spilled_bytes = 4 * spills
    by_descriptor = any(kind.startswith("tensordesc") for kind in case.signature.values())
    return Row(
        target=target,
        case=case.name,
        tile=case.tile,
        loads="descriptor" if by_descriptor else "pointer",
        registers=registers,
        spilled_bytes=spilled_bytes,
        shared_bytes=kernel.metadata.shared,
        programs=programs_at_once(target, registers, kernel.metadata),
        matrix=code.count(MATRIX_INSTRUCTIONS[target]),
        exp2=code.count("ex2.approx") + code.count("v_exp_f32"),
        async_copies=len(re.findall(r"cp\.async\.c[ag]|_load_\w+ .*\blds\b", code)),
        tma_copies=code.count("cp.async.bulk.tensor"),
        serialised=serialised_products(kernel) if target == "sm_90" else 0,
    )


def serialised_products(kernel: Any) -> int:
    """How often ptxas says of a kernel that its wgmma are serialised (C7515).

    Each product then waits for the one before, and nothing else shows it: a kernel so compiled is
    right, and slow.
    """
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        said = subprocess.run(
            [ptxas, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        )
    return (said.stdout + said.stderr).count("C7515")


def programs_at_once(target: str, registers: int, metadata: Any) -> int:
    """Programs of a kernel that fit a multiprocessor (AMD: compute unit) together.

    NVIDIA: 65536 registers, dealt to a warp of 32 threads in units of 256; 64 warps; on sm_100 512
    columns of tensor memory. AMD: four SIMDs with 512 registers a lane, in units of 8, and 8 waves.
    """
    warps: int = metadata.num_warps
    if target.startswith("gfx"):
        waves = 4 * min(8, 512 // (-(-registers // 8) * 8))
        programs = waves // warps
        shared: int = metadata.shared
    else:
        programs = min(65536 // (-(-registers // 8) * 256), 64) // warps
        shared = metadata.shared + 1024
        tensor_memory = getattr(metadata, "tmem_size", 0) or 0
        if tensor_memory:
            programs = min(programs, 512 // tensor_memory)
    return min(programs, SHARED_BYTES[target] // shared) if shared else programs


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread, by the cuobjdump in Triton's wheel.

    Our kernels keep no array on the stack: whatever is there are spilled registers.
    """
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.findall(r"REG:(\d+)", usage)[0]), int(re.findall(r"STACK:(\d+)", usage)[0])


def main() -> None:
    """Compiles every case for every target; a line each as soon as it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="only the largest calls")
    parser.add_argument("--csv", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    rows = []
    widths = [7, 50, 16, 10, *(max(len(name), 6) for name in column_names(Row)[4:])]
    print_line(column_names(Row), widths)
    for target in arguments.target:
        cases = head_cases(target, arguments.quick)
        if not arguments.quick or target == arguments.target[0]:
            cases += other_cases()
        for case in cases:
            rows.append(compile_case(case, target))
            print_line(texts(rows[-1]), widths)
    if arguments.csv is not None:
        write_csv(rows, arguments.csv)
    slow = [f"{row.target} {row.case}" for row in rows if row.serialised > 0]
    if slow:
        parser.exit(1, f"serialised wgmma: {', '.join(slow)}\n")


def print_line(cells: Sequence[str], widths: Sequence[int]) -> None:
    """One line of the table."""
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    print(" ".join(padded), flush=True)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The same table as a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(column_names(Row))
        writer.writerows(texts(row) for row in rows)


if __name__ == "__main__":
    main()
