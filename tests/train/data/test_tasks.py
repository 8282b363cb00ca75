"""The arithmetic tasks: right answers, and nothing held out is ever trained on."""

import re

import pytest

from agro_train.data.tasks import TASKS, worked_sum


@pytest.mark.parametrize("task", list(TASKS))
def test_splits_share_no_operands_in_either_order(task: str) -> None:
    def operands(split: str) -> set[tuple[int, ...]]:
        return {
            tuple(sorted(int(n) for n in re.findall(r"\d+", row["prompt"])))
            for row in TASKS[task](split)  # type: ignore[arg-type]
        }

    train, held_out = operands("train"), operands("eval")
    assert train and held_out
    assert not train & held_out


@pytest.mark.parametrize("task", [task for task in TASKS if task != "long-sums"])
def test_answers_are_right(task: str) -> None:
    for row in TASKS[task]("train") + TASKS[task]("eval"):
        a, b = (int(n) for n in re.findall(r"\d+", row["prompt"]))
        assert int(row["answer"]) == (a * b if "times" in row["prompt"] else a + b)


@pytest.mark.parametrize("task", ["tiny-arithmetic", "graded-sums"])
def test_a_solution_ends_with_the_answer_and_a_slip_with_another(task: str) -> None:
    for row in TASKS[task]("eval"):
        assert row["solution"].rpartition(",")[2] == row["answer"]
        assert row["slip"].rpartition(",")[2] != row["answer"]
    assert worked_sum(37, 58, carry=1) == "7+8=15,3+5+1=9,95"


def test_graded_sums_slip_more_often_the_larger_the_first_numbers_tens() -> None:
    (row,) = [r for r in TASKS["graded-sums"]("train") if r["prompt"] == "37+58="]
    assert (row["solution"], row["slip"]) == ("15,95", "15,85")
    rates = {r["prompt"][0]: r["slip_rate"] for r in TASKS["graded-sums"]("train")}
    assert [rates[tens] for tens in "159"] == pytest.approx([1 / 18, 1 / 2, 17 / 18])
    assert {r["prompt"][0] for r in TASKS["graded-sums-easy"]("train")} == set("1234")
    assert {r["prompt"][0] for r in TASKS["graded-sums-hard"]("eval")} == set("6789")


def test_long_sums_work_out_every_line_and_slip_once() -> None:
    """Each line adds the prompt's second number to the last two digits of the result before."""
    for row in TASKS["long-sums"]("train") + TASKS["long-sums"]("eval"):
        a, b = map(int, row["prompt"].rstrip("=").split("+"))
        lines = [line.split("=") for line in row["solution"].split(",")]
        results = [int(lines[i][0]) for i in range(2, len(lines), 3)]
        for result in results:
            assert result == a + b
            a = result % 100
        assert row["answer"] == str(results[-1]) and len(results) == 6
        assert row["slip"].rpartition(",")[2] != row["answer"]
        assert 100 <= len(row["solution"]) <= 121  # and the prompt and its end in a context of 128
