"""Loading of the native library: which one is accepted, which instruction set, and what is said."""

import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agro_kernels import kept_logits
from agro_kernels._cpu import linear_logprobs as cpu
from agro_kernels._cpu import native
from agro_kernels._torch import linear_logprobs as blocked
from tests.numerics import head_inputs

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

OTHER_MACHINES = "avx2" if platform.machine() in ("aarch64", "arm64") else "neon"


@pytest.fixture(autouse=True)
def loaded_afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test loads the library anew and leaves it as it was."""
    library = native.load()
    isa = None if library is None else library.agro_isa().decode()
    native.load.cache_clear()
    monkeypatch.delenv("AGRO_CPU_ISA", raising=False)
    yield
    monkeypatch.undo()
    native.load.cache_clear()
    if library is not None and isa is not None:
        native.choose_isa(library, isa)


def forward() -> tuple[Tensor, Tensor]:
    """(logprobs by the op, logprobs by the blocked torch path)."""
    head = head_inputs(7, 9, 33).head()
    ours, theirs = (module.linear_logprobs_fwd(head, False)[0] for module in (cpu, blocked))
    return ours, theirs


def built(folder: Path, source: str) -> Path:
    """A shared library made of a few lines of C++."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    path, library = folder / "small.cpp", folder / "small.so"
    path.write_text(source)
    subprocess.run([COMPILER, "-shared", "-fPIC", path, "-o", library], check=True)
    return library


def test_library_is_there_where_a_compiler_is() -> None:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    assert native.LIBRARY_PATH.exists(), "pip install says with -v why csrc was not built"
    assert native.load() is not None


def test_interface_is_the_one_of_the_header() -> None:
    header = (ROOT / "csrc" / "agro_cpu.h").read_text()
    version = re.search(r"#define AGRO_INTERFACE_VERSION (\d+)", header)
    assert version is not None
    assert int(version[1]) == native.INTERFACE_VERSION
    declared = set(re.findall(r"AGRO_API [\w *]+[ *](agro_\w+)\(", header))
    assert declared == {*native._SIGNATURES, "agro_interface_version"}
    structs = {"head": native.Head, "kept": native.Kept, "entries": native.Entries}
    for name, ours in structs.items():
        struct = f"agro_{name}"
        fields = re.search(rf"typedef struct {struct} \{{(.*?)\}} {struct};", header, flags=re.S)
        assert fields is not None
        names = [
            name
            for line in re.sub(r"/\*.*?\*/", "", fields[1], flags=re.S).split(";")
            for name in re.findall(r"(\w+)\s*(?:,|$)", line.strip())
        ]
        assert names == [field[0] for field in ours._fields_]
    tile = re.search(r"#define AGRO_KEPT_TILE (\d+)", header)
    assert tile is not None
    assert int(tile[1]) == kept_logits.CPU_STEP


@pytest.mark.parametrize("why", ["missing", "older", "another", "text"])
def test_library_that_cannot_serve_is_refused_with_one_warning(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "missing":
        path, message = tmp_path / "_native.so", "No such file"
    elif why == "older":
        source = 'extern "C" int agro_interface_version() { return 0; }'
        path, message = built(tmp_path, source), "version 0 .* needs version"
    elif why == "another":
        path, message = built(tmp_path, "int unrelated;"), "not the library that csrc is built into"
    else:
        path, message = tmp_path / "_native.so", "file too short|invalid ELF header"
        path.write_text("text")
    monkeypatch.setattr(native, "LIBRARY_PATH", path)
    with pytest.warns(UserWarning, match=message) as warned:
        ours, theirs = forward()
        forward()
    assert len(warned) == 1
    assert "compiler" in str(warned[0].message)
    assert torch.equal(ours, theirs)


def test_none_is_the_torch_path_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGRO_CPU_ISA", "none")
    monkeypatch.setattr(native, "LIBRARY_PATH", Path("/nonexistent"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = forward()
    assert native.load() is None
    assert torch.equal(ours, theirs)


def test_named_instruction_set_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.load()
    if library is None:
        pytest.skip("needs the native library")
    available = library.agro_available_isas().decode().split(",")
    assert available[-1] == "scalar"
    for name in available:
        native.load.cache_clear()
        monkeypatch.setenv("AGRO_CPU_ISA", name)
        forward()
        assert library.agro_isa().decode() == name


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "scalar,avx2", OTHER_MACHINES])
def test_instruction_set_that_cannot_run_is_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.load() is None:
        pytest.skip("needs the native library")
    native.load.cache_clear()
    monkeypatch.setenv("AGRO_CPU_ISA", name)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"AGRO_CPU_ISA: .*scalar.* none .*got '{name}'"):
            forward()


def test_statuses_are_errors() -> None:
    native.check_status(native.OK, "op")
    with pytest.raises(MemoryError, match="op: .* fewer tokens"):
        native.check_status(native.OUT_OF_MEMORY, "op")
    with pytest.raises(RuntimeError, match="op: .* refused"):
        native.check_status(native.BAD_ARGUMENT, "op")
