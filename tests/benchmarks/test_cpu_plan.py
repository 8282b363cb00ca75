"""Which processes of the CPU benchmark run, without running one."""

import dataclasses
from collections.abc import Mapping

import pytest

from benchmarks.head.cpu import parse
from benchmarks.head.cpu_plan import OUT_OF_TIME, Options, Plan
from benchmarks.head.cpu_rows import Case, Row, row_of
from benchmarks.head.job import Measured
from benchmarks.measure.shapes import CPU_SHAPES
from tests.benchmarks.timed import timed_row


def followed(
    options: Options, case: Case, rows: list[Row], seconds: Mapping[str, float | None]
) -> list[list[str]]:
    """The labels of each group that runs, if a process takes these seconds; None: out of time.

    Adds the rows of the case to `rows`.
    """
    groups = []
    while jobs := Plan(options, case, rows).next_jobs():
        labels = [job.label() for job in jobs]
        groups.append(labels)
        for job in jobs:
            took = seconds[job.label()]
            if took is None:
                rows.append(row_of(Measured(job, status=OUT_OF_TIME)))
            else:
                others = [label for label in labels if label != job.label()]
                rows.append(row_of(Measured(job, times_s=[took]), others))
    return groups


def test_finalists_are_the_fastest_on_the_first_shape() -> None:
    options = parse(["--finalists", "1"])
    times = {"torch": 3.0, "torch_compile": 1.0, "checkpointed_loop": 5.0, "torch_lce": 9.0}
    rows = [timed_row(CPU_SHAPES["A"], *time) for time in times.items()]
    on_b = Case(CPU_SHAPES["B"], "bf16", "forward", False)
    # The fastest, and the fastest of those that do not store the logits.
    assert Plan(options, on_b, rows).finalists() == [
        ("torch_compile", "highest"),
        ("checkpointed_loop", "highest"),
    ]
    # The fastest on the first shape is expected to be it here too, and goes into its turns.
    expected = Plan(options, on_b, rows).expected_fastest()
    assert expected is not None
    assert expected.label() == "torch_compile"
    on_a = Plan(options, dataclasses.replace(on_b, shape=CPU_SHAPES["A"]), rows)
    assert on_a.finalists() is None
    assert on_a.expected_fastest() is None
    assert Plan(options, dataclasses.replace(on_b, dtype="fp32"), rows).finalists() is None
    # Two rows of a peer, alone and in turns, are one finalist.
    rows.append(timed_row(CPU_SHAPES["A"], "torch_compile", 1.1))
    two = Plan(dataclasses.replace(options, finalists=2), on_b, rows)
    names = [name for name, _ in two.finalists() or []]
    assert names == ["torch_compile", "torch", "checkpointed_loop"]
    # By default everybody runs, and the fastest on the first shape still goes into its turns.
    everybody = Plan(dataclasses.replace(options, finalists=None), on_b, rows)
    assert everybody.finalists() is None
    expected = everybody.expected_fastest()
    assert expected is not None
    assert expected.label() == "torch_compile"


def test_precisions_that_are_asked_for() -> None:
    peers = ["--providers", "torch", "checkpointed_loop"]
    on_b = Case(CPU_SHAPES["B"], "fp32", "forward", False)

    def labels(*arguments: str) -> list[str]:
        options = parse([*peers, *arguments])
        plan = Plan(options, on_b, [])
        bf16 = Plan(options, dataclasses.replace(on_b, dtype="bf16"), [])
        # They multiply in bf16.
        assert [job.precision for job, reason in bf16.peers() if not reason] == ["highest"] * 2
        found = [job.label() for job, reason in plan.peers() if not reason]
        return found + ([f"floor@{plan.floor_precision()}"] if "--precisions" in arguments else [])

    both = ["torch", "torch@medium", "checkpointed_loop", "checkpointed_loop@medium"]
    assert labels() == both
    only = ["torch@medium", "checkpointed_loop@medium", "floor@medium"]
    assert labels("--precisions", "medium") == only
    assert labels("--precisions", "medium", "--smoke") == only


@pytest.mark.parametrize("loop_s", [2.0, 0.5])
def test_a_peer_faster_than_the_expected_one_takes_turns_as_well(loop_s: float) -> None:
    times = {"torch_compile": 1.0, "checkpointed_loop": loop_s, "floor": 0.9, "ours": 0.8}
    rows = [timed_row(CPU_SHAPES["A"], "torch_compile", 1.0)]
    rows += [timed_row(CPU_SHAPES["A"], "checkpointed_loop", 3.0)]
    on_b = Case(CPU_SHAPES["B"], "bf16", "forward", False)
    turns = [["checkpointed_loop"], ["ours", "torch_compile", "floor"]]
    if loop_s < 1.0:
        turns.append(["ours", "checkpointed_loop", "floor"])
    assert followed(parse(["--finalists", "1"]), on_b, rows, times) == turns


def test_the_floor_takes_turns_at_the_precision_that_is_faster_on_the_first_shape() -> None:
    options = parse(["--providers", "torch"])
    times = {"torch": 3.0, "torch@medium": 2.0, "floor": 1.5, "floor@medium": 1.0, "ours": 1.1}
    on_a = Case(CPU_SHAPES["A"], "fp32", "forward", False)
    rows: list[Row] = []
    turns = ["ours", "torch@medium", "floor@medium"]
    alone = [["torch"], ["torch@medium"], ["floor"], ["floor@medium"]]
    assert followed(options, on_a, rows, times) == [*alone, turns]
    # There the floors are not compared again, and the expected peer does not run alone.
    on_b = dataclasses.replace(on_a, shape=CPU_SHAPES["B"])
    assert followed(options, on_b, rows, times) == [["torch"], turns]
    # Without the first shape they are compared where they are needed.
    on_c = dataclasses.replace(on_a, shape=CPU_SHAPES["C"])
    assert followed(options, on_c, [], times) == [*alone, turns]


def test_what_the_time_budget_leaves_out_is_asked_for_once() -> None:
    options = parse(["--providers", "torch"])
    on_a = Case(CPU_SHAPES["A"], "bf16", "forward", False)
    turns = ["ours", "torch", "floor"]
    times = {"torch": 1.0, "ours": None, "floor": None}
    assert followed(options, on_a, [], times) == [["torch"], turns]
    nobody = dict.fromkeys(times)
    assert followed(options, on_a, [], nobody) == [["torch"], ["ours", "floor"]]


def test_known_coefficients_are_compared_with_the_peers_forward_and_backward() -> None:
    row = timed_row(CPU_SHAPES["A"], "torch", 2.0, form="forward_backward")
    case = Case(CPU_SHAPES["A"], "bf16", "known_coefficients", False)

    def reason_against_torch(rows: list[Row]) -> str | None:
        peers = Plan(parse([]), case, rows).peers()
        return next(reason for job, reason in peers if job.label() == "torch")

    assert Plan(parse([]), case, [row]).fastest_peer() is row
    assert "see forward_backward" in (reason_against_torch([row]) or "")
    # Nothing stands for it: it runs.
    assert reason_against_torch([]) is None
