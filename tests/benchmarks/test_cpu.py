"""The CPU benchmark from end to end on a tiny shape, and its CSV."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.head import cpu
from benchmarks.head.cpu_plan import PEERS
from benchmarks.head.cpu_rows import Case, Table
from benchmarks.head.providers.base import FORMS
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure.rows import read_csv
from benchmarks.measure.shapes import CPU_SHAPES
from tests.benchmarks.timed import timed_row

ROOT = Path(__file__).parents[2]


def rows_of(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "bench_cpu.csv")


def test_bench_cpu_smoke(tmp_path: Path) -> None:
    # As a command: its processes import its main module, and pytest takes long to import.
    command = [sys.executable, "-m", "benchmarks.head.cpu", "--smoke", "--threads", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows, printed = rows_of(tmp_path), done.stdout
    cases = {(row["dtype"], row["form"], row["entropy"]) for row in rows}
    assert cases == {("fp32", form, "no") for form in FORMS} | {("bf16", "forward_backward", "yes")}
    for dtype, form, entropy in cases:
        case = [
            row
            for row in rows
            if (row["dtype"], row["form"], row["entropy"]) == (dtype, form, entropy)
        ]
        # Every peer has a row in every case, if only to say why it has no time.
        assert {row["provider"] for row in case} == {"ours", "floor", *PEERS}
        ours = next(row for row in case if row["provider"] == "ours")
        assert ours["status"] == "ok"
        assert ours["n"] == "2"
        assert "floor" in ours["in_turn_with"]
        floor = next(row for row in case if row["provider"] == "floor" and row["in_turn_with"])
        assert float(ours["relative"]) == pytest.approx(
            float(ours["median_s"]) / float(floor["median_s"]), rel=1e-3
        )
        assert float(ours["peak_mb"]) >= 0
        assert ours["instruction_set"]
        assert ours["commit"]
        assert ours["dhidden_error"] != ""
        assert (ours["entropy_error"] != "") == (entropy == "yes")
        for row in case:
            assert (row["median_s"] != "") == (row["status"] == "ok"), row
    for name in PEERS:
        reason = PROVIDERS[name].missing()
        assert reason is None or f"{name}: {reason}" in printed
        assert reason is None or {r["status"] for r in rows if r["provider"] == name} == {reason}


def test_bench_cpu_lists_what_the_budget_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    options = ["--smoke", "--out", str(tmp_path), "--budget-minutes", "0", "--providers", "torch"]
    assert cpu.main(options) == 0
    rows = rows_of(tmp_path)
    assert {row["provider"] for row in rows} == {"ours", "floor", "torch"}
    assert {row["status"] for row in rows} == {"not run: time budget"}


def test_bench_cpu_refuses_few_repetitions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cpu.parse(["--repetitions", "6"])
    assert "at least 7" in capsys.readouterr().err


def test_append_keeps_the_rows_of_other_cases(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    facts = cpu.facts_of(cpu.parse([]))
    first = Table(path, facts | {"cpu": "another"})
    first.new = [timed_row(CPU_SHAPES[name], "torch", 2.0) for name in "AB"]
    first.write()
    on_b = Case(CPU_SHAPES["B"], "bf16", "forward", False)
    options = cpu.parse(["--shapes", "B", "--dtypes", "bf16", "--forms", "forward"])
    second = Table(path, facts)
    second.keep_other_cases({case.key() for case in cpu.cases(options)})
    # That of B is to be measured again.
    assert [row.case() for row in second.rows] == [first.new[0].case()]
    second.new.append(timed_row(on_b.shape, "torch", 3.0))
    second.write()
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]
    found = [(row["shape"], row["cpu"] == "another", row["n"]) for row in read_csv(path)]
    assert found == [("A", True, "1"), ("B", False, "1")]
