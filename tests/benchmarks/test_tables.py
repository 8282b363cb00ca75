"""The Markdown tables: ours and the peers, compared within the same turns."""

import csv
import dataclasses
from pathlib import Path

import pytest

from benchmarks.head import gpu_rows, tables
from benchmarks.head.cpu_rows import Case, Row, Table, relate
from benchmarks.measure.rows import column_names, texts
from benchmarks.measure.shapes import CPU_SHAPES
from tests.benchmarks.timed import timed_row


def test_table_compares_within_the_same_turns() -> None:
    def turn(name: str, seconds: float, others: str) -> Row:
        return timed_row(CPU_SHAPES["B"], name, seconds, in_turn_with=others, peak_mb=12.0, n=7)

    rows = [
        turn("checkpointed_loop", 0.75, ""),
        turn("ours", 2.0, "torch_compile floor"),
        turn("torch_compile", 1.0, "ours floor"),
        turn("floor", 4.0, "ours torch_compile"),
        turn("ours", 0.6, "checkpointed_loop floor"),
        turn("checkpointed_loop", 0.9, "ours floor"),
        turn("floor", 0.5, "ours checkpointed_loop"),
    ]
    relate(rows, Case(CPU_SHAPES["B"], "bf16", "forward", False))
    *_, line = tables.table(rows, "no")
    # The fastest is the loop, which takes turns with the second process of ours.
    assert line.split("|")[1:-1] == [
        " forward, bf16, B ", " 0.6 s ", " 1.20 ", " 12 MB ",
        " `checkpointed_loop` ", " 1.50 ", " 12 MB ", " `checkpointed_loop` ", " 1.50 ", " 12 MB ",
    ]  # fmt: skip
    assert tables.table(rows, "yes")[2:] == []


def test_table_of_known_coefficients_takes_the_peers_own_turns() -> None:
    def timed(name: str, form: str, seconds: float, others: str) -> Row:
        changes = {"form": form, "in_turn_with": others, "relative": 1.0, "peak_mb": 3.0}
        return timed_row(CPU_SHAPES["A"], name, seconds, n=7 if others else 1, **changes)

    rows = [
        timed("torch_compile", "forward_backward", 1.0, "ours floor"),
        timed("torch", "forward_backward", 2.0, ""),
        timed("ours", "known_coefficients", 0.5, "torch_compile floor"),
        timed("torch_compile", "known_coefficients", 1.1, "ours floor"),
        timed("checkpointed_loop", "forward_backward", 4.0, ""),
    ]
    *_, line = tables.table(rows, "no")
    assert line.split("|")[5:7] == [" `torch_compile` ", " 2.20 "]
    # Alone, and called once.
    assert line.split("|")[8:10] == [" `checkpointed_loop` ", " ~8.00* "]
    headings, _, line = tables.peers_table(rows, "no")
    assert headings == "| case | ours | `torch` | `torch_compile` | `checkpointed_loop` |"
    assert line == "| known coefficients, bf16, A | 0.5 s | ~4.00* | 2.20 | ~8.00* |"
    # A slower peer that took turns with ours is over ours of those turns.
    rows += [
        timed("ours", "known_coefficients", 0.4, "torch floor"),
        timed("torch", "known_coefficients", 1.2, "ours floor"),
    ]
    rows.remove(next(row for row in rows if row.provider == "torch"))
    *_, line = tables.peers_table(rows, "no")
    assert line == "| known coefficients, bf16, A | 0.5 s | 3.00 | 2.20 | ~8.00* |"


def test_table_of_one_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(tmp_path / "rows.csv", {})
    ours, torch_row, medium = (
        timed_row(CPU_SHAPES["A"], name, seconds, dtype="fp32")
        for name, seconds in (("ours", 1.0), ("torch", 3.0), ("torch", 2.0))
    )
    table.new = [ours, torch_row, dataclasses.replace(medium, precision="medium")]
    table.write()
    for precision, ratio in (("highest", "~3.00"), ("medium", "~2.00")):
        arguments = ["--csv", str(table.path), "--peers", "--precision", precision]
        assert tables.main(arguments) == 0
        assert ratio in capsys.readouterr().out.splitlines()[-1]


def test_table_of_a_gpu_has_a_column_for_each_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(provider: str, tokens: int, ms: float | None, mb: float | None) -> gpu_rows.Row:
        return gpu_rows.Row(
            "llama3-8b", "forward", tokens, "whole", provider, False, "bf16", 4096, 128256,
            "ok" if ms else "out of memory", median_ms=ms, extra_mb=mb,
        )  # fmt: skip

    path = tmp_path / "rows.csv"
    rows = [
        timed("floor", 4096, 2.0, None), timed("ours", 4096, 2.5, 1.0),
        timed("torch", 4096, 5.0, 4200.0), timed("cce", 4096, 3.0, 0.0),
        timed("floor", 8192, 4.0, None), timed("ours", 8192, 5.0, 2.0),
        timed("torch", 8192, None, None),
        timed("ours", 99, 1.0, 1.0),  # no floor: half a case
    ]  # fmt: skip
    lines = [texts(row) for row in rows]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([column_names(gpu_rows.Row), *lines])
    assert tables.main(["--gpu", "--csv", str(path)]) == 0
    headings, _, *table = capsys.readouterr().out.splitlines()
    assert headings.endswith("| `torch` | `cce` |")
    assert table == [
        "| forward, llama3-8b, 4,096 tokens | 2.5 ms | 1.25 | 1 MB | 2.00, 4,200 MB | 1.20, 0 MB |",
        "| forward, llama3-8b, 8,192 tokens | 5 ms | 1.25 | 2 MB |  |  |",
    ]
    with pytest.raises(SystemExit):
        tables.main(["--gpu", "--peers"])
