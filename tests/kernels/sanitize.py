"""The native CPU kernels under the address and undefined-behaviour sanitizers.

    python -m tests.kernels.sanitize --cases 2000

builds csrc with them into a temporary folder and runs that many random calls of
`fuzz_linear_logprobs` through the binding of the package, in a process into which the address
sanitizer is loaded first: reads and writes beyond torch's tensors are found like those beyond the
kernels' own buffers.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = "-O0 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def preloaded() -> str | None:
    """The compiler's libasan and libstdc++, for LD_PRELOAD; None where it has no libasan.

    libasan looks for the functions of libstdc++ that it wraps when it starts, before Python has
    loaded it.
    """
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        try:
            command = [*compiler(), f"-print-file-name={name}"]
            found.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        except FileNotFoundError:
            return None
    return " ".join(found) if os.path.isabs(found[0]) else None  # the bare name: there is none


def build_library(folder: Path, **environment: str) -> Path:
    """The library of csrc, built in `folder` with these variables set."""
    build = [sys.executable, "setup.py", "-q", "build_ext"]
    subprocess.run(
        [*build, "--build-lib", folder, "--build-temp", folder],
        cwd=ROOT,
        env=os.environ | environment,
        check=True,
    )
    return folder / "agro_kernels/_cpu/_native.so"


def run(cases: int, seed: int) -> subprocess.CompletedProcess[str]:
    """The fuzzing process, ended; its output is in stdout."""
    preload = preloaded()
    if preload is None:
        raise SystemExit("the compiler has no libasan.so: install it, or set CXX to g++")
    with tempfile.TemporaryDirectory() as folder:
        library = build_library(Path(folder), CXXFLAGS=FLAGS)
        fuzz = [sys.executable, "-m", "tests.kernels.fuzz_linear_logprobs"]
        options = ["--cases", str(cases), "--seed", str(seed), "--library", library]
        return subprocess.run(
            [*fuzz, *options],
            cwd=ROOT,
            # Python's own memory at exit is no leak of ours.
            env=os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    arguments = parser.parse_args()
    done = run(arguments.cases, arguments.seed)
    print(done.stdout, end="")
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
