"""The README's table of bench_cpu, from its CSV file.

    python -m benchmarks.tables [--csv benchmarks/results/bench_cpu.csv] [--entropy no]

A row a case: ours over the floor of the same turns, the fastest peer over ours of the same turns,
and the fastest peer that never holds the (N, V) logits. Where the latter ran alone, its time is
over ours of another minute, and a ~ says so; a * says that it was called once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.bench_cpu import RESULTS
from benchmarks.cpu_rows import FORM_ORDER, Row, median_s
from benchmarks.shapes import CPU_SHAPES
from benchmarks.turns import FLOOR

HEADINGS = (
    "case", "ours", "over the bare products", "beyond results",
    "fastest peer", "its time over ours", "beyond results",
    "fastest without logits", "its time over ours", "beyond results",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The README's table of bench_cpu.")
    parser.add_argument("--csv", type=Path, default=RESULTS / "bench_cpu.csv")
    parser.add_argument("--entropy", choices=["no", "yes"], default="no")
    options = parser.parse_args(arguments)
    rows = [Row.from_text(columns) for columns in plots.read_csv(options.csv)]
    print("\n".join(table(rows, options.entropy)))
    return 0


def table(rows: Sequence[Row], entropy: str) -> list[str]:
    """Lines of Markdown; a case in which ours was not timed has none."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for form in FORM_ORDER:
        for dtype in ("bf16", "fp32"):
            for shape in CPU_SHAPES:
                case = [row for row in rows if row.case() == (shape, dtype, form, entropy)]
                if form == "known_coefficients":  # what has no form of its own
                    key = (shape, dtype, "forward_backward", entropy)
                    case += [row for row in rows if row.case() == key and row.provider != "ours"]
                cells = _cells(case)
                if cells:
                    name = f"{plots.FORM_TITLES[form]}, {dtype}, {shape}"
                    lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def _cells(case: Sequence[Row]) -> list[str]:
    timed = [row for row in case if row.median_s is not None]
    ours = [row for row in timed if row.provider == "ours"]
    peers = [row for row in timed if row.provider not in ("ours", FLOOR)]
    if not ours or not peers:
        return []
    fastest = _fastest(peers)
    beside = [row for row in ours if fastest.label() in row.turns()]
    mine = (beside or ours)[0]
    assert mine.median_s is not None and mine.relative is not None
    cells = [f"{mine.median_s:.3g} s", f"{mine.relative:.2f}", _megabytes(mine)]
    without_logits = [row for row in peers if row.stores_logits == "no"]
    for peer in (fastest, _fastest(without_logits) if without_logits else None):
        if peer is None or peer.median_s is None:
            cells += ["", "", ""]
            continue
        in_turn = peer.turns() == mine.turns() and peer.form == mine.form
        ratio = f"{'' if in_turn else '~'}{peer.median_s / mine.median_s:.2f}"
        ratio += "" if peer.n > 1 else "*"
        cells += [f"`{peer.label()}`", ratio, _megabytes(peer)]
    return cells


def _fastest(rows: Sequence[Row]) -> Row:
    """Its row in turns where there is one, of the case itself before what stands for it."""
    first = min(rows, key=median_s)
    same = [row for row in rows if row.label() == first.label() and row.in_turn_with]
    return same[0] if same else first


def _megabytes(row: Row) -> str:
    return "" if row.peak_mb is None else f"{row.peak_mb:.0f} MB"


if __name__ == "__main__":
    raise SystemExit(main())
