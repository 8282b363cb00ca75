"""The run that takes the head's time on a GPU apart: its code, on a CPU, on a tiny shape."""

from pathlib import Path

import pytest
import torch

from benchmarks.head import gpu_parts
from benchmarks.measure.clocks import Clocks
from benchmarks.measure.rows import read_csv


def test_smoke_run_writes_every_part(tmp_path: Path) -> None:
    assert gpu_parts.main(["--smoke", "--results", str(tmp_path)]) == 0
    folder = tmp_path / "parts_cpu"
    activity = read_csv(folder / "parts_activity.csv")
    assert len(activity) == 6
    for row in activity:
        assert row["status"] == "ok", row
        assert float(row["ms"]) > 0 and float(row["tflops"]) > 0
        assert row["commit"] and row["flop_per_clock"] == ""  # a CPU's clock is not read
    turns = read_csv(folder / "parts_turns.csv")
    assert {row["part"] for row in turns} == set(gpu_parts.PART_NAMES)
    shipped = [row for row in turns if row["choice"] in ("shipped", "none kept", "launched")]
    assert len(shipped) == 4
    for row in turns:
        if row["status"] != "ok":
            assert row["part"] in ("keeping", "sums", "graphs") and row["median_ms"] == ""
            reasons = ("not installed: ", "not for cpu", "a CPU has no", "these kernels keep")
            assert row["status"].startswith(reasons), row
            continue
        ratio = float(row["median_ms"]) / float(row["floor_ms"])
        assert float(row["over_floor"]) == pytest.approx(ratio, rel=1e-3)
        assert float(row["difference"]) < 2e-2, row  # bf16 results, in other orders of sums
    assert all(float(row["difference"]) == 0.0 for row in shipped)


def test_what_there_is_no_time_for_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_parts.main(["--smoke", "--minutes", "-1", "--results", str(tmp_path)]) == 0
    assert "left out, as -1.0 minutes are over: smoke" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_sentence_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_parts.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "--smoke" in captured.err


def test_folder_is_named_after_the_gpu() -> None:
    assert gpu_parts.folder_name({"gpu": "NVIDIA H100 80GB HBM3"}) == "parts_nvidia_h100_80gb_hbm3"


def test_clocks_are_medians_of_what_lies_in_the_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks("cpu")
    lines = ["1600, 690.5", "1500, 700.5", "[N/A], [N/A]", "1400, 650.0"]
    for second, line in enumerate(lines):
        monkeypatch.setattr("time.perf_counter", lambda now=second: float(now))
        clocks.add(line)
    assert clocks.between([(-0.5, 1.5)]) == (1550.0, 695.5)
    assert clocks.between([(2.5, 9.0), (-1.0, 0.5)]) == (1500.0, 670.25)
    assert clocks.between([(5.0, 6.0)]) == (None, None)
