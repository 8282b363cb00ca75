"""Tables in Markdown from the CSV files of the CPU and the GPU benchmark.

    python -m benchmarks.head.tables [--csv benchmarks/results/bench_cpu.csv] [--entropy no]
        [--peers] [--precision highest]
    python -m benchmarks.head.tables --keeping [--csv ...] [--entropy no]
    python -m benchmarks.head.tables --gpu [--csv benchmarks/results/bench_linear_logprobs.csv]

A row a case: our time over the floor of the same turns (the matmul lower bound), the fastest peer's
over ours of the same turns, and that of the fastest peer that never materialises the (N, V) logits.
With --peers every peer's time over ours instead, each at the precision at which it is the fastest,
or of fp32 at --precision alone. A ~ marks a peer that did not take turns with ours, a * one that
was called once. With --keeping, of a run with `benchmarks.head.cpu --keeping ...`: ours without and
with kept logits, each its time, that over the products with the logits made once, and its memory
beyond inputs and results; and the fastest peer that stores the logits. With --gpu every peer's time
over ours, of the same turns, and its memory beyond inputs and results.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.head import gpu_rows
from benchmarks.head.cpu_plan import FORM_ORDER, PEERS, PRECISIONS
from benchmarks.head.cpu_rows import Row, median_s
from benchmarks.head.job import FLOOR, FLOOR_KEPT
from benchmarks.head.providers.base import FORM_TITLES
from benchmarks.head.providers.ours import KEEPING
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure.rows import RESULTS, parsed, read_csv
from benchmarks.measure.shapes import CPU_SHAPES

HEADINGS = (
    "case", "ours", "over the matmul lower bound", "beyond results",
    "fastest peer", "its time over ours", "beyond results",
    "fastest without logits", "its time over ours", "beyond results",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description="The benchmarks' CSV files as Markdown tables.")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--gpu", action="store_true", help="of the GPU benchmark")
    parser.add_argument("--entropy", choices=["no", "yes"], default="no")
    parser.add_argument("--peers", action="store_true", help="every peer's time over ours")
    parser.add_argument("--keeping", action="store_true", help="ours with kept logits")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the peers' fp32")
    options = parser.parse_args(arguments)
    of_cpu = options.peers or options.keeping or options.precision or options.entropy == "yes"
    if options.gpu and of_cpu:
        parser.error("--gpu: expected no other choice, got one that is for the CPU benchmark")
    name = "bench_linear_logprobs.csv" if options.gpu else "bench_cpu.csv"
    columns = read_csv(options.csv or RESULTS / name)
    if options.gpu:
        lines = gpu_table([parsed(gpu_rows.Row, line) for line in columns])
    else:
        shown = keeping_table if options.keeping else peers_table if options.peers else table
        rows = [parsed(Row, line) for line in columns]
        if options.precision is not None:
            rows = [row for row in rows if _is_at(row, options.precision)]
        lines = shown(rows, options.entropy)
    print("\n".join(lines))
    return 0


@dataclass(frozen=True)
class Compared:
    """A case that has ours and a peer, and its timed rows."""

    form: str
    dtype: str
    shape: str
    rows: Sequence[Row]

    @property
    def name(self) -> str:
        return f"{FORM_TITLES[self.form]}, {self.dtype}, {self.shape}"

    @property
    def peers(self) -> list[Row]:
        return [row for row in self.rows if row.provider in PEERS]

    @property
    def without_logits(self) -> list[Row]:
        return [row for row in self.peers if row.stores_logits == "no"]

    def ours(self, peer: Row | None = None) -> Row:
        """Of our rows that of the turns with the peer, else with the fastest peer."""
        first = fastest(self.peers)
        wanted = [(peer or first).label(), first.label()]
        return max(
            (row for row in self.rows if row.provider == "ours"),
            key=lambda row: [label in row.turns() for label in wanted],
        )


def table(rows: Sequence[Row], entropy: str) -> list[str]:
    """Lines of Markdown; a case in which ours or every peer was not timed has none."""
    return _markdown(HEADINGS, ([one.name, *_cells(one)] for one in compared(rows, entropy)))


def peers_table(rows: Sequence[Row], entropy: str) -> list[str]:
    """Lines of Markdown: a row a case, a column a peer that was timed in one of them."""
    cases = list(compared(rows, entropy))
    timed = {row.provider for one in cases for row in one.rows}
    peers = [name for name in PEERS if name in timed]

    def cells(one: Compared) -> Iterator[str]:
        yield f"{one.ours().median_s:.3g} s"
        for name in peers:
            same = [row for row in one.rows if row.provider == name]
            peer = fastest(same) if same else None
            yield "" if peer is None else _ratio(peer, one.ours(peer))

    headings = ["case", "ours", *(f"`{name}`" for name in peers)]
    return _markdown(headings, ([one.name, *cells(one)] for one in cases))


def keeping_table(rows: Sequence[Row], entropy: str) -> list[str]:
    """Lines of Markdown: a row a case, ours without and with kept logits over the products that are
    left once they are kept, and the fastest peer that stores them.

    A case may have been measured in several runs, where memory does not hold all its programs at
    once: each is over the products of its own run."""

    found = kept_cases(rows, entropy)
    shown = [name for name in KEEPING if any(name in case for case in found.values())]

    def cells(case: Mapping[str, Row], peer: Row | None) -> Iterator[str]:
        bound = median_s(case[FLOOR_KEPT])
        yield f"{bound:.3g} s"
        for name in ("ours", *shown):
            yield _over_bound(case[name], _kept_bound(rows, case[name])) if name in case else ""
        yield "" if peer is None else f"`{peer.label()}`, {_over_bound(peer, bound)}"

    headings = ["case", "the products without recomputing", "ours"]
    headings += [name.removeprefix("ours_").replace("_", " ") for name in shown]
    lines = ([name, *cells(case, storing(rows, case))] for name, case in found.items())
    return _markdown([*headings, "the fastest peer that stores the logits"], lines)


def kept_cases(rows: Sequence[Row], entropy: str) -> dict[str, dict[str, Row]]:
    """The cases in which the products without recomputing were timed, by name: what took turns with
    them, by provider."""
    found = {}
    for form in FORM_ORDER:
        for shape, dtype in dict.fromkeys((row.shape, row.dtype) for row in rows):
            key = (shape, dtype, form, entropy)
            timed = [row for row in rows if row.case() == key and row.median_s is not None]
            case = {row.provider: row for row in timed if row.in_turn_with}
            if FLOOR_KEPT in case:
                found[f"{FORM_TITLES[form]}, {dtype}, {shape}"] = case
    return found


def _kept_bound(rows: Sequence[Row], row: Row) -> float:
    """Seconds of the products without recomputing that took turns with this row."""
    return next(
        median_s(floor)
        for floor in rows
        if floor.provider == FLOOR_KEPT
        and floor.case() == row.case()
        and floor.turns() == row.turns()
    )


def storing(rows: Sequence[Row], case: Mapping[str, Row]) -> Row | None:
    """The fastest peer of one of `kept_cases` that stores the logits, whether or not it took
    turns."""
    key = case[FLOOR_KEPT].case()
    timed = [row for row in rows if row.case() == key and row.median_s is not None]
    peers = [row for row in timed if row.provider in PEERS and row.stores_logits == "yes"]
    return fastest(peers) if peers else None


def gpu_table(rows: Sequence[gpu_rows.Row]) -> list[str]:
    """Lines of Markdown: a row a case that has ours, a column a peer that was timed in one."""
    cases = gpu_cases(rows)
    timed_somewhere = {provider for timed in cases.values() for provider in timed}
    peers = [name for name in PROVIDERS if name in timed_somewhere - {"ours"}]

    def cells(case: tuple[str, int, str]) -> list[str]:
        timed, (head, tokens, form) = cases[case], case
        mine = timed["ours"]
        beside = [_gpu_cell(timed[name], mine) if name in timed else "" for name in peers]
        name = f"{FORM_TITLES[form]}, {head}, {tokens:,} tokens"
        return [
            name, f"{mine.median_ms:.3g} ms", f"{over(mine, timed[FLOOR]):.2f}",
            f"{mine.extra_mb:,.0f} MB", *beside,
        ]  # fmt: skip

    ordered = sorted(cases, key=lambda case: FORM_ORDER.index(case[2]))
    headings = ["case", "ours", "over the matmul lower bound", "beyond results"]
    return _markdown([*headings, *(f"`{name}`" for name in peers)], map(cells, ordered))


def gpu_cases(rows: Sequence[gpu_rows.Row]) -> dict[tuple[str, int, str], dict[str, gpu_rows.Row]]:
    """The rows of each case that has ours and the floor, by provider."""
    whole = [row for row in rows if row.phase == "whole" and row.median_ms is not None]
    cases = {
        case: {row.provider: row for row in whole if row.case() == case}
        for case in dict.fromkeys(row.case() for row in whole)
    }
    return {case: timed for case, timed in cases.items() if {"ours", FLOOR} <= set(timed)}


def _gpu_cell(peer: gpu_rows.Row, mine: gpu_rows.Row) -> str:
    return f"{over(peer, mine):.2f}, {peer.extra_mb:,.0f} MB"


def over(one: gpu_rows.Row, other: gpu_rows.Row) -> float:
    assert one.median_ms is not None
    assert other.median_ms is not None
    return one.median_ms / other.median_ms


def _is_at(row: Row, precision: str) -> bool:
    return row.provider == "ours" or row.dtype != "fp32" or row.precision == precision


def compared(rows: Sequence[Row], entropy: str) -> Iterator[Compared]:
    """Each case that has ours and a peer."""
    for form in FORM_ORDER:
        for dtype in ("bf16", "fp32"):
            for shape in CPU_SHAPES:
                case = [row for row in rows if row.case() == (shape, dtype, form, entropy)]
                if form == "known_coefficients":  # what has no form of its own
                    key = (shape, dtype, "forward_backward", entropy)
                    case += [row for row in rows if row.case() == key and row.provider != "ours"]
                timed = [row for row in case if row.median_s is not None]
                if {"ours"} < {row.provider for row in timed} & {"ours", *PEERS}:
                    yield Compared(form, dtype, shape, timed)


def _cells(one: Compared) -> list[str]:
    mine = one.ours()
    relative = "" if mine.relative is None else f"{mine.relative:.2f}"
    cells = [f"{mine.median_s:.3g} s", relative, _megabytes(mine)]
    for some in (one.peers, one.without_logits):
        if not some:
            cells += ["", "", ""]
            continue
        peer = fastest(some)
        cells += [f"`{peer.label()}`", _ratio(peer, mine), _megabytes(peer)]
    return cells


def fastest(rows: Sequence[Row]) -> Row:
    """Its row in turns where there is one, of the case itself before what stands for it."""
    first = min(rows, key=median_s)
    same = [row for row in rows if row.label() == first.label() and row.in_turn_with]
    return same[0] if same else first


def _ratio(peer: Row, mine: Row) -> str:
    """The peer's time over ours; ~ where they did not take turns, * where it was called once."""
    in_turn = peer.turns() == mine.turns() and peer.form == mine.form
    ratio = median_s(peer) / median_s(mine)
    return f"{'' if in_turn else '~'}{ratio:.2f}{'' if peer.n > 1 else '*'}"


def _over_bound(row: Row, bound: float) -> str:
    return f"{row.median_s:.3g} s, {median_s(row) / bound:.2f}, {_megabytes(row)}"


def _megabytes(row: Row) -> str:
    return "" if row.peak_mb is None else f"{row.peak_mb:.0f} MB"


def _markdown(headings: Sequence[str], rows: Iterator[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


if __name__ == "__main__":
    raise SystemExit(main())
