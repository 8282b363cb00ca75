"""Numbers of the ops beside their peers, from the CSV files of `benchmarks.head`.

What a marker may narrow them by, each one value or several: of a CPU `csv` (bench_cpu, if nothing
is said), `entropy` (no), `form`, `dtype`, `shape`, `provider`, `precision` of fp32, `logits` (yes:
those that store them) and `which` (fastest: of each case, of what is left of its peers; faster:
those that are faster than ours); of the GPU `form`, `tokens`, `provider`, `logits` and
`which=fastest`. `not` leaves providers out, and some words stand for several values, see WORDS.
"""

from collections.abc import Callable, Iterator, Sequence

from benchmarks.head import gpu_rows, tables
from benchmarks.head.cpu_rows import Row, median_s
from benchmarks.head.job import FLOOR_KEPT
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure.rows import RESULTS, parsed, read_csv
from benchmarks.pages.markers import Numbers, Query, Table

WORDS = {
    ("form", "gradients"): ["forward_backward", "known_coefficients", "frozen_weight"],
    ("of", "logprobs"): ["logprob_error"],
    ("of", "entropies"): ["entropy_error"],
    ("of", "gradients"): ["dhidden_error", "dweight_error"],
    ("of", "dhidden"): ["dhidden_error"],
    ("of", "dweight"): ["dweight_error"],
}

Pair = tuple[Row, Row]
"""A peer and ours, to be compared."""


def cpu_rows(name: str, query: Query) -> list[Row]:
    """Of one file, those of peers in fp32 at the precision asked for."""
    rows = [parsed(Row, line) for line in read_csv(RESULTS / f"{name}.csv")]
    return [
        row
        for row in rows
        if row.provider == "ours" or row.dtype != "fp32" or _is(query, "precision", row.precision)
    ]


def _files(query: Query) -> Sequence[str]:
    return query.get("csv", ["bench_cpu"])


def _entropy(query: Query) -> str:
    (entropy,) = query.get("entropy", ["no"])
    return entropy


def cpu_table(query: Query) -> list[str]:
    (name,) = _files(query)
    return tables.table(cpu_rows(name, query), _entropy(query))


def cpu_peers(query: Query) -> list[str]:
    (name,) = _files(query)
    return tables.peers_table(cpu_rows(name, query), _entropy(query))


def cpu_keeping(query: Query) -> list[str]:
    (name,) = query.get("csv", ["bench_cpu_keeping"])
    return tables.keeping_table(cpu_rows(name, query), _entropy(query))


def gpu_table(_: Query) -> list[str]:
    return tables.gpu_table(_gpu_rows())


# --- A CPU ----------------------------------------------------------------------------------------


def cpu_cases(query: Query) -> Iterator[tables.Compared]:
    for name in _files(query):
        for case in tables.compared(cpu_rows(name, query), _entropy(query)):
            if all(_is(query, name, getattr(case, name)) for name in ("form", "dtype", "shape")):
                yield case


def cpu_pairs(query: Query) -> Iterator[Pair]:
    """Each peer of each case that the query leaves, as the tables compare it with ours: at the
    faster precision, where it ran under two, in turns where it took any."""
    for case in cpu_cases(query):
        rows = [
            row
            for row in case.peers
            if _is(query, "provider", row.provider) and _is(query, "logits", row.stores_logits)
        ]
        which = query.get("which")
        if which == ["fastest"] and rows:
            yield tables.fastest(rows), case.ours()
            continue
        for name in dict.fromkeys(row.provider for row in rows):
            peer = tables.fastest([row for row in rows if row.provider == name])
            ours = case.ours(peer)
            if which != ["faster"] or median_s(peer) < median_s(ours):
                yield peer, ours


def cpu_time(query: Query) -> list[float]:
    """Peers' times over ours."""
    return [median_s(peer) / median_s(ours) for peer, ours in cpu_pairs(query)]


def cpu_saved(query: Query) -> list[float]:
    """The share of our time that peers do not take."""
    return [1 - over for over in cpu_time(query)]


def cpu_memory(query: Query) -> list[float]:
    """Peers' memory beyond inputs and results over ours."""
    return [_mb(peer) / _mb(ours) for peer, ours in cpu_pairs(query)]


def cpu_floor(query: Query) -> list[float]:
    """Our times over the bare products."""
    return [case.ours().relative or float("nan") for case in cpu_cases(query)]


def cpu_error(query: Query) -> list[float]:
    """The errors of columns, `of`, of the rows that the query leaves; `provider=peers`: of all but
    ours."""
    return [
        float(getattr(row, column))
        for name in _files(query)
        for row in cpu_rows(name, query)
        for column in _errors(query)
        if getattr(row, column) is not None
        and row.entropy == _entropy(query)
        and _is(query, "dtype", row.dtype)
        and _is_provider(query, row.provider)
    ]


def cpu_floors_apart(query: Query) -> list[float]:
    """The bare products' time in one file over that in another, `over`: those that the cases' ours
    took turns with."""

    def floors(name: str) -> dict[str, float]:
        of_file = cpu_cases({**query, "csv": [name]})
        return {one.name: median_s(one.ours()) / (one.ours().relative or 1.0) for one in of_file}

    here, there = (floors(name) for key in ("csv", "over") for name in query[key])
    return [here[case] / there[case] for case in here if case in there]


# --- Ours with kept logits ------------------------------------------------------------------------


def keeping(
    measure: Callable[[Row, dict[str, Row], Row], float],
    name: str = "ours_keeping_all",
    csv: str = "bench_cpu_keeping",
) -> Numbers:
    """Of each case that the query leaves: ours with kept logits, what took turns with it, and the
    fastest peer that stores them."""

    def numbers(query: Query) -> list[float]:
        rows = cpu_rows(csv, query)
        found = []
        for case in tables.kept_cases(rows, "no").values():
            peer, row = tables.storing(rows, case), case["ours"]
            left = all(_is(query, part, getattr(row, part)) for part in ("form", "dtype", "shape"))
            if peer is not None and left and name in case:
                found.append(measure(case[name], case, peer))
        return found

    return numbers


MOST = ("ours_keeping_most", "bench_cpu_keeping_most")  # provider, CSV


def _kept_time(ours: Row, _: dict[str, Row], peer: Row) -> float:
    return median_s(ours) / median_s(peer)


def _kept_memory(ours: Row, _: dict[str, Row], peer: Row) -> float:
    return _mb(ours) / _mb(peer)


def _kept_floor(ours: Row, case: dict[str, Row], _: Row) -> float:
    return median_s(ours) / median_s(case[FLOOR_KEPT])


# --- The GPU --------------------------------------------------------------------------------------


def _gpu_rows() -> list[gpu_rows.Row]:
    return [parsed(gpu_rows.Row, line) for line in read_csv(RESULTS / "bench_linear_logprobs.csv")]


def gpu(measure: Callable[[gpu_rows.Row, gpu_rows.Row], float | None]) -> Numbers:
    """Of each row that the query leaves and ours of the same turns."""

    def numbers(query: Query) -> list[float]:
        found = []
        for (_, tokens, form), timed in tables.gpu_cases(_gpu_rows()).items():
            if not (_is(query, "tokens", str(tokens)) and _is(query, "form", form)):
                continue
            left = [
                row
                for name, row in timed.items()
                if _is_provider(query, name) and _is(query, "logits", _stores(name))
            ]
            if "which" in query and left:  # the fastest
                left = [min(left, key=lambda row: row.median_ms or float("inf"))]
            values = (measure(row, timed["ours"]) for row in left)
            found += [value for value in values if value is not None]
        return found

    return numbers


def gpu_error(query: Query) -> list[float]:
    """The errors of columns, `of`."""
    return [
        value
        for column in _errors(query)
        for value in gpu(lambda row, _, column=column: getattr(row, column))(query)  # type: ignore[misc]
    ]


def _stores(provider: str) -> str:
    return "yes" if provider in PROVIDERS and PROVIDERS[provider].stores_logits else "no"


# --- All devices ----------------------------------------------------------------------------------


def storing(on_gpu: Numbers, on_cpu: Numbers) -> Numbers:
    """Of the fastest that stores the logits, in every case of every file where it saves a
    product."""

    def numbers(_: Query) -> list[float]:
        query: Query = {
            "form": ["forward_backward", "frozen_weight"],
            "logits": ["yes"],
            "which": ["fastest"],
        }
        files = {"csv": ["bench_cpu", "bench_cpu_zen4", "bench_cpu_zen3"]}
        return [*on_gpu(query), *on_cpu({**query, **files})]

    return numbers


def _gpu_memory(peer: gpu_rows.Row, ours: gpu_rows.Row) -> float | None:
    return peer.extra_mb / ours.extra_mb if peer.extra_mb and ours.extra_mb else None


# --- What is left, and what is said of it ---------------------------------------------------------


def _asked(query: Query, name: str) -> list[str]:
    return [one for word in query[name] for one in WORDS.get((name, word), [word])]


def _errors(query: Query) -> list[str]:
    return _asked(query, "of")


def _is(query: Query, name: str, value: str) -> bool:
    return name not in query or value in _asked(query, name)


def _is_provider(query: Query, name: str) -> bool:
    if name in query.get("not", []):
        return False
    if query.get("provider") == ["peers"]:
        return not name.startswith(("ours", "floor"))
    return _is(query, "provider", name)


def _mb(row: Row) -> float:
    assert row.peak_mb is not None
    return row.peak_mb


def _one(values: Sequence[float]) -> list[float]:
    (value,) = values
    return [value]


SAID: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "one": _one,
    "low": lambda values: [min(values)],
    "high": lambda values: [max(values)],
    "range": lambda values: [min(values), max(values)],
}
"""By the last part of a number's name."""


def said(name: str, values: Numbers, scale: float = 1.0) -> dict[str, Numbers]:
    """The names of a source, one for each of SAID; scale: what its values are multiplied by."""

    def source(how: str) -> Numbers:
        return lambda query: [scale * value for value in SAID[how](values(query))]

    return {f"{name}.{how}": source(how) for how in SAID}


TABLES: dict[str, Table] = {
    "cpu": cpu_table,
    "cpu.peers": cpu_peers,
    "cpu.keeping": cpu_keeping,
    "gpu": gpu_table,
}

NUMBERS: dict[str, Numbers] = {
    **said("cpu.time", cpu_time),
    **said("cpu.memory", cpu_memory),
    **said("cpu.floor", cpu_floor),
    **said("cpu.floor.apart", cpu_floors_apart),
    **said("cpu.error", cpu_error),
    **said("cpu.error.percent", cpu_error, 100),
    **said("cpu.keeping.time", keeping(_kept_time)),
    **said("cpu.keeping.saved.percent", keeping(lambda *rows: 1 - _kept_time(*rows)), 100),
    **said("cpu.keeping.memory", keeping(_kept_memory)),
    **said("cpu.keeping.floor", keeping(_kept_floor)),
    **said("cpu.keeping.most.time", keeping(_kept_time, *MOST)),
    **said("cpu.keeping.most.memory", keeping(_kept_memory, *MOST)),
    **said("gpu.time", gpu(tables.over)),
    **said("gpu.ms", gpu(lambda row, _: row.median_ms)),
    **said("gpu.ms.three_quarters", gpu(lambda row, _: row.median_ms), 0.75),
    **said("gpu.tflops", gpu(lambda row, _: row.tflops)),
    **said("gpu.mb", gpu(lambda row, _: row.extra_mb)),
    **said("gpu.gb", gpu(lambda row, _: row.extra_mb), 1e-3),
    **said("storing.time", storing(gpu(tables.over), cpu_time)),
    **said(
        "storing.saved.percent", storing(gpu(lambda *pair: 1 - tables.over(*pair)), cpu_saved), 100
    ),
    **said("storing.memory", storing(gpu(_gpu_memory), cpu_memory)),
    **said("gpu.error", gpu_error),
    **said("gpu.error.percent", gpu_error, 100),
}
