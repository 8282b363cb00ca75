"""What the compiler makes of every Triton kernel, for GPUs that are not here.

    python -m benchmarks.compile_report [--target sm_90 ...] [--csv PATH]

Compiles each kernel with the tile sizes shipped for the target and prints one line a case:
registers and spilled bytes of a thread, shared memory of a program, and how many of the
instructions that make it fast the code holds: matrix products (wgmma, tcgen05, mma.sync, mfma),
hardware exp2, asynchronous copies to shared memory (cp.async; TMA). No GPU is needed; nothing runs.

    target  case                               tile           regs spill  shared   matrix exp2 ...
    sm_90   linear_logprobs_fwd entropy bf16   256x128x64 8 3  255     0  147456  8 wgmma  132 ...
"""

import argparse
import csv
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agro_kernels import configs
from agro_kernels._triton import agro_loss, head_gradients, linear_logprobs

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

# Optional arguments each case of a kernel leaves out (None at the launch).
FWD_CASES = {
    "logprobs": ("bias_ptr", "token_temperature_ptr", "softcap", "moment_ptr"),
    "entropy": ("bias_ptr", "token_temperature_ptr", "softcap"),
    "everything": (),
}
BWD_CASES = {
    "logprobs": ("bias_ptr", "token_temperature_ptr", "softcap", "dlse_ptr", "entropy_ptr",
                 "dentropy_ptr", "logprobs_ptr"),
    "weighted": ("bias_ptr", "token_temperature_ptr", "softcap", "dlse_ptr", "entropy_ptr",
                 "dentropy_ptr"),
    "entropy": ("bias_ptr", "token_temperature_ptr", "softcap", "dlse_ptr", "logprobs_ptr"),
    "everything": (),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kernel with its arguments' types and constants, as one call would launch it."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[str, ...]  # arguments that are multiples of 16 (pointers: bytes)
    config: configs.TileConfig | None  # None: the kernel has no tile of a product


@dataclass(frozen=True)
class Row:
    """One line of the report. registers and spilled_bytes are of a thread."""

    target: str
    case: str
    tile: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix: int
    exp2: int
    async_copies: int
    tma_copies: int


def head_cases(target: str) -> list[Case]:
    """The kernels of linear_logprobs with the rows of configs.py; fp32 in one variant each."""
    cases = []
    for name, kernel, variants in (
        ("linear_logprobs_fwd", linear_logprobs.linear_logprobs_fwd_kernel, FWD_CASES),
        ("linear_logprobs_bwd", head_gradients.linear_logprobs_bwd_kernel, BWD_CASES),
    ):
        for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
            config = configs.select(name, target.replace("_", ""), itemsize)
            for variant, absent in variants.items():
                if dtype == "fp32" and variant != "everything":
                    continue
                constants: dict[str, object] = dict.fromkeys(absent)
                constants |= {
                    "BLOCK_N": config.block_n,
                    "BLOCK_V": config.block_v,
                    "BLOCK_D": config.block_d,
                    "GROUP_N": config.group_n,
                    "EVEN_V": variant != "everything",
                    "EVEN_D": True,
                    "INPUT_PRECISION": "ieee",
                    "INTERPRETED": False,
                    "stride_hidden_d": 1,
                    "stride_weight_d": 1,
                }
                cases.append(
                    head_case(f"{name} {variant} {dtype}", kernel, constants, dtype, config)
                )
    constants = {"BLOCK_N": linear_logprobs.MERGE_BLOCK_N}
    merge = linear_logprobs.linear_logprobs_fwd_merge_kernel
    cases.append(head_case("linear_logprobs_fwd_merge", merge, constants, "bf16", None))
    return cases


def head_case(
    name: str,
    kernel: triton.JITFunction,
    constants: dict[str, object],
    dtype: str,
    config: configs.TileConfig | None,
) -> Case:
    in_dtype = ("hidden_ptr", "weight_ptr", "bias_ptr", "dlogits_ptr")
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "targets_ptr":
            signature[argument] = "*i64"
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{dtype if argument in in_dtype else 'fp32'}"
        else:
            signature[argument] = "fp32" if argument in ("temperature", "softcap") else "i32"
    multiples = ("V", "D", "stride_hidden_n", "stride_weight_v", "stride_dlogits_n")
    aligned = tuple(
        argument
        for argument, kind in signature.items()
        if kind.startswith("*") or (argument in multiples and kind != "constexpr")
    )
    return Case(name, kernel, signature, constants, aligned, config)


def loss_cases() -> list[Case]:
    """The kernels of agro_loss, all options on."""
    return [
        Case(name, kernel, signature, constants, aligned=(), config=None)
        for name, kernel, signature, constants in agro_loss.compile_cases()
    ]


def compile_case(case: Case, target: str) -> Row:
    """Compile one case and read the compiler's own numbers back."""
    source = ASTSource(
        fn=case.kernel,
        signature=case.signature,
        constexprs=case.constants,
        attrs={
            (case.kernel.arg_names.index(argument),): [["tt.divisibility", 16]]
            for argument in case.aligned
        },
    )
    config = case.config
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if "cubin" in compiled.asm:
        code = compiled.asm["ptx"]
        registers, spilled_bytes = cubin_usage(compiled.asm["cubin"])
    else:
        code = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.findall(rf"\.{key}:\s*(\d+)", code)[0])
            for key in ("vgpr_count", "vgpr_spill_count")
        )
        spilled_bytes = 4 * spills
    tile = "-"
    if config:
        tile = f"{config.block_n}x{config.block_v}x{config.block_d} w{config.num_warps}"
        tile += f" s{config.num_stages}"
    return Row(
        target=target,
        case=case.name,
        tile=tile,
        registers=registers,
        spilled_bytes=spilled_bytes,
        shared_bytes=compiled.metadata.shared,
        matrix=code.count(MATRIX_INSTRUCTIONS[target]),
        exp2=code.count("ex2.approx") + code.count("v_exp_f32"),
        async_copies=code.count("cp.async.cg") + code.count("cp.async.ca"),
        tma_copies=code.count("cp.async.bulk.tensor"),
    )


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--csv", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    rows = []
    names = [field.name for field in fields(Row)]
    widths = [7, 40, 17, *(max(len(name), 6) for name in names[3:])]
    print(" ".join(name.ljust(width) for name, width in zip(names, widths, strict=True)))
    for target in arguments.target:
        for case in head_cases(target) + loss_cases():
            rows.append(row := asdict(compile_case(case, target)))
            cells = zip(row.values(), widths, strict=True)
            print(" ".join(str(value).ljust(width) for value, width in cells), flush=True)
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
