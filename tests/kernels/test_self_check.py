"""`python -m agro_kernels`: what it says is so, and wrong numbers are found."""

import re
from typing import Any

import pytest
import torch

from agro_kernels import linear_logprobs, self_check
from agro_kernels._cpu import native
from agro_kernels.self_check import Shape
from tests import numerics


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(self_check, "SPEED", {"cpu": Shape(8, 16, 64)})


def test_law_is_that_of_the_tests() -> None:
    for dtype in self_check.SLACK:
        assert self_check.SLACK[dtype] == numerics.SLACK[dtype]
        assert self_check.EPS[dtype] == numerics.EPS[dtype]


def test_report_of_a_sound_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert self_check.main() == 0
    said = capsys.readouterr().out
    assert f"torch   {torch.__version__}\n" in said
    assert re.findall(r"^  (\w+) logprobs err by .*: right$", said, flags=re.M) == [
        "fp32",
        "bf16",
        "fp16",
    ]
    assert "tokens, hidden size 16, vocabulary 64:" in said
    assert re.search(r"^    bf16 [\d.]+ ms, \d+ GFLOP/s; plain torch [\d.]+ ms$", said, re.M)
    assert said.endswith("\nall right\n")


def test_path_that_serves_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.load()
    head, rest = self_check.served_by("cpu")
    assert rest.endswith("agro_loss: blocked torch path")
    if library is not None:
        assert f"native kernels, {library.agro_isa().decode()} (" in head
    monkeypatch.setattr(native, "load", lambda: None)
    head, _ = self_check.served_by("cpu")
    assert "blocked torch path, for the native library is not built" in head
    monkeypatch.setenv("AGRO_CPU_ISA", "none")
    head, _ = self_check.served_by("cpu")
    assert head.endswith("blocked torch path, for AGRO_CPU_ISA is none")


def test_path_that_serves_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "triton_import_error", lambda: None)
    head, rest = self_check.served_by("cuda")
    assert head.endswith(": Triton; blocked torch path for float64")
    assert rest.endswith(": Triton")
    monkeypatch.setattr(self_check, "triton_import_error", lambda: ImportError("none here"))
    head, rest = self_check.served_by("cuda")
    assert head.endswith(": blocked torch path, for triton: none here")
    assert rest.endswith(": blocked torch path")


def test_wrong_numbers_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(self_check, "linear_logprobs", lambda *args: linear_logprobs(*args) * 1.001)
    assert self_check.main() == 1
    said = capsys.readouterr().out
    assert "fp32 logprobs" in said and said.count("WRONG") >= 1
    assert said.endswith("\nNOT right: report it with all of the above\n")


def test_error_is_part_of_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(self_check, "linear_logprobs", broken)
    assert self_check.main() == 1
    assert "  bf16 failed: RuntimeError: no such kernel\n" in capsys.readouterr().out
