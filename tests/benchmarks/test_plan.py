"""The plan of a small model beside the memory that its step really takes."""

from pathlib import Path

from benchmarks.measure.rows import read_csv
from benchmarks.trainer import plan


def test_a_plan_is_within_a_tenth_of_what_a_step_takes(tmp_path: Path) -> None:
    assert plan.main(["--cases", "smoke", "--results", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "bench_plan.csv")
    assert [row["stage"] for row in rows] == ["update", "sampling"]
    # What a small model samples with is hardly more than the code that sampling loads.
    assert abs(float(rows[0]["apart"])) <= 0.1, rows
