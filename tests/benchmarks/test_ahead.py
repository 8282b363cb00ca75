"""The benchmark of sampling ahead: its rows, on latencies of milliseconds."""

import csv
from pathlib import Path

from benchmarks.trainer import ahead


def test_a_row_a_latency_and_staleness(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert ahead.main(["--update-s", "0.002", "--steps", "8", "--out", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    asked = [(row["generation_per_update"], row["varies_by"], int(row["k"])) for row in rows]
    assert len(set(asked)) == len(rows) == 32
    for row in rows:
        latency = float(row["generation_per_update"])
        if row["varies_by"] == "0.0":
            assert float(row["lock_step"]) == round((1 + latency) / max(1, latency), 4)
        if row["k"] == "0":  # nothing is hidden, whatever the clock adds
            assert float(row["ratio"]) > 0.99 * float(row["lock_step"])
            assert float(row["wait_s"]) == float(row["idle_s"]) == 0.0
