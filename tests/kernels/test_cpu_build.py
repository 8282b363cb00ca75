"""Building and installing the native library: what the archives hold, and what happens without."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.kernels import sanitize

ROOT = Path(__file__).parents[2]
LIBRARY = "agro_kernels/_cpu/_native.so"
DATA = {".yaml", ".css", ".j2", ".typed"}  # what is in the package beside the modules
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

CALL = (
    "import warnings, torch\n"
    "from agro_kernels._cpu import linear_logprobs, native\n"
    "from agro_kernels.head import Head\n"
    "with warnings.catch_warnings(record=True) as caught:\n"
    "    warnings.simplefilter('always')\n"
    "    for _ in range(2):\n"
    "        head = Head.of(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))\n"
    "        linear_logprobs.linear_logprobs_fwd(head, False)\n"
    "library = native.load()\n"
    "print(native.__file__)\n"
    "print(len(caught), *(w.message for w in caught))\n"
    "print(library and library.agro_available_isas().decode())\n"
)


def run(command: list[str | Path], folder: Path, **environment: str) -> str:
    """stdout and stderr together, of a command that must succeed."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CXXFLAGS", "LDFLAGS")}
    done = subprocess.run(
        command,
        cwd=folder,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the project's sources, without anything built."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "agro_kernels", "agro_train"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def pip(*arguments: str | Path) -> list[str | Path]:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", arguments[0], *options, *arguments[1:]]


@pytest.fixture
def old_compiler(tmp_path: Path) -> Path:
    """One that knows no option of x86's vector instructions, and so has less to compile."""
    old = tmp_path / "old-compiler"
    old.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" -mavx512bf16 "*|*" -mavx2 "*) echo unknown option >&2; exit 1;; esac\n'
        f'exec {COMPILER} "$@"\n'
    )
    old.chmod(0o755)
    return old


@needs_compiler
def test_wheel_made_from_the_source_archive_holds_the_library(
    sources: Path, old_compiler: Path, tmp_path: Path
) -> None:
    run([sys.executable, "setup.py", "-q", "sdist"], sources)
    (archive,) = (sources / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        in_archive = {Path(*Path(name).parts[1:]) for name in packed.getnames()}
    native_sources = [path for path in (ROOT / "csrc").iterdir() if path.suffix in (".h", ".cpp")]
    assert {path.relative_to(ROOT) for path in native_sources} <= in_archive
    built = {"CXX": str(old_compiler), "CXXFLAGS": "-O0"}
    run(pip("wheel", "-w", tmp_path, archive), tmp_path, **built)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]  # one file for every Python
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as names:
        held = names.namelist()
        names.extract(LIBRARY, tmp_path)
    assert LIBRARY in held
    data = [path for path in (ROOT / "agro_train").rglob("*") if path.suffix in DATA]
    assert {path.suffix for path in data} == DATA
    assert {path.relative_to(ROOT).as_posix() for path in data} <= set(held)
    assert not [name for name in held if name.startswith(("csrc", "tests"))]
    if sys.platform == "linux" and shutil.which("nm"):
        symbols = run(["nm", "-D", "--defined-only", tmp_path / LIBRARY], tmp_path)
        names_of = {line.split()[2].split("@")[0] for line in symbols.splitlines() if " T " in line}
        assert names_of and all(name.startswith("agro_") for name in names_of)


def test_install_without_a_compiler_succeeds_and_says_so(sources: Path, tmp_path: Path) -> None:
    compiler, target = "/nonexistent", tmp_path / "target"
    said = run(pip("install", "-v", "--target", target, sources), tmp_path, CXX=compiler)
    assert "agro_kernels._cpu._native" in said and "failed" in said and compiler in said
    assert (target / "agro_kernels" / "_cpu" / "native.py").exists()
    assert not (target / LIBRARY).exists()
    said = run([sys.executable, "-c", CALL], tmp_path, PYTHONPATH=str(target))
    where, warned, isas = said.splitlines()
    assert Path(where).is_relative_to(target)
    assert warned.startswith("1 ") and "compiler" in warned
    assert isas == "None"


@needs_compiler
def test_instruction_set_that_the_compiler_lacks_is_left_out(
    sources: Path, old_compiler: Path
) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    said = run(command, sources, CXX=str(old_compiler), CXXFLAGS="-O0")
    assert f"built {LIBRARY} with" in said or "built build" in said
    said = run([sys.executable, "-c", CALL], sources, PYTHONPATH=str(sources))
    where, warned, isas = said.splitlines()
    assert Path(where).is_relative_to(sources)
    assert warned == "0"
    assert isas.split(",")[-1] == "scalar" and "avx" not in isas


def test_build_that_fails_leaves_no_older_library(sources: Path) -> None:
    (sources / LIBRARY).write_text("of an older build")
    run([sys.executable, "setup.py", "build_ext", "--inplace"], sources, CXX="false")
    assert not (sources / LIBRARY).exists()


@pytest.mark.skipif(sanitize.preloaded() is None, reason="needs a compiler with libasan")
def test_sanitizers_find_nothing() -> None:
    done = sanitize.run(cases=40, seed=100_000)
    assert done.returncode == 0, done.stdout
    assert "40 cases, 0 failed" in done.stdout
