"""Builds csrc into agro_kernels/_cpu/_native.so. Everything else about the package is in
pyproject.toml.

The library has a plain C interface and is loaded with ctypes, so the build needs a C++17 compiler
and nothing of torch or Python, and one file serves every version of both. Each instruction set is
a source file of its own with its own flags; one whose flags the compiler lacks is left out. Without
a compiler the package installs without the library, and the blocked torch path serves the CPU.

CXX, CXXFLAGS and LDFLAGS are read from the environment, CXXFLAGS after the flags below.
"""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# -ffp-contract=off: where a product and a sum are fused is said in the source, never left to the
# optimiser, so that every compiler gives the same bits.
FLAGS = (
    "-std=c++17 -O3 -fPIC -pthread -fvisibility=hidden -fno-math-errno -ffp-contract=off"
).split()
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c".split()


class InstructionSet(NamedTuple):
    """csrc/isa_<name>.cpp; agro_cpu.cpp learns by AGRO_HAVE_<NAME> that it is linked in."""

    name: str
    flags: list[str]
    probe: str  # compiles if the compiler knows the flags and the target has the instructions


INSTRUCTION_SETS = [
    InstructionSet(
        "avx512bf16",
        [*AVX512, "-mavx512bf16"],
        "#include <immintrin.h>\n"
        "__m512 f(__m512 c, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(c, a, b); }\n",
    ),
    InstructionSet(
        "avx512",
        AVX512,
        "#include <immintrin.h>\n"
        "__m512 f(__m512 a, __m256i h) { return _mm512_fmadd_ps(a, a, _mm512_cvtph_ps(h)); }\n",
    ),
    InstructionSet(
        "avx2",
        ["-mavx2", "-mfma", "-mf16c"],
        "#include <immintrin.h>\n"
        "__m256 f(__m256 a, __m128i h) { return _mm256_fmadd_ps(a, a, _mm256_cvtph_ps(h)); }\n",
    ),
    InstructionSet(
        "neon",
        [],
        "#include <arm_neon.h>\n#ifndef __aarch64__\n#error 64-bit ARM only\n#endif\n"
        "float32x4_t f(float32x4_t a) { return vfmaq_f32(a, a, a); }\n",
    ),
]


def find_compiler() -> list[str]:
    """The command of the C++ compiler: CXX, or the first usual name that exists."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CompileError("no C++ compiler: CXX is not set, and there is no c++, g++ or clang++")


def run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error}") from error
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{shlex.join(command)}\n{error.stderr}") from error


class BuildNative(build_ext):
    """Compiles the C++ sources without Python's headers, its flags or its file name suffix."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def copy_extensions_to_source(self) -> None:
        # A build that failed leaves nothing behind that looks like its result.
        for ext in self.extensions:
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        """Raises CompileError, which setuptools turns into a warning: the extension is optional."""
        library = Path(self.get_ext_fullpath(ext.name))
        library.unlink(missing_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp, "csrc")
        objects.mkdir(parents=True, exist_ok=True)
        compiler = find_compiler()
        more_flags = shlex.split(os.environ.get("CXXFLAGS", ""))

        def compile_source(source: Path, flags: list[str]) -> str:
            target = str(objects / f"{source.stem}.o")
            run([*compiler, *FLAGS, *flags, *more_flags, "-c", str(source), "-o", target])
            return target

        probe = objects / "probe.cpp"
        probe.write_text("int main() { return 0; }\n")
        compile_source(probe, [])  # a compiler that cannot even do this lacks no instruction set
        flags_of: dict[str, list[str]] = {"scalar": []}  # instruction set: its flags
        for name, flags, text in INSTRUCTION_SETS:
            probe.write_text(text)
            try:
                compile_source(probe, flags)
            except CompileError:
                continue
            flags_of[name] = flags
        have = [f"-DAGRO_HAVE_{name.upper()}" for name in flags_of]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = []
            for source in map(Path, ext.sources):
                name = source.stem.removeprefix("isa_")
                if name == source.stem:
                    compiled.append(pool.submit(compile_source, source, have))
                elif name in flags_of:
                    compiled.append(pool.submit(compile_source, source, flags_of[name]))
            linked = [one.result() for one in compiled]
        ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
        run([*compiler, "-shared", "-pthread", *more_flags, *linked, *ldflags, "-o", str(library)])
        print(f"built {library} with {', '.join(flags_of)}")


class PlatformWheel(bdist_wheel):
    """One wheel a platform: no version of Python is in the library's name or in its symbols."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "agro_kernels._cpu._native",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
