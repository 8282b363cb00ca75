"""The console: what a step measured, the time left, and completions, whatever they hold."""

import io
import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from agro_train.types import Rollout
from agro_train.watch.display import Display, best_and_worst
from tests.train.models import rollout

METRICS = {
    "reward": 0.5314,
    "kl": 0.0121,
    "entropy": 1.203,
    "completions/mean_length": 12.34,
    "completions/clipped_ratio": 0.25,
    "tokens_per_s": 1234.0,
    "memory_gb": 1.5,
    "time_s": 2.5,
    "skipped": 0.0,
}
NASTY = (
    "[/asy] [red]x\x1b[2J\r\ud800 \N{CJK UNIFIED IDEOGRAPH-6F22}"
    + "\N{CJK UNIFIED IDEOGRAPH-5B57}" * 300
)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what rich itself writes to a terminal


def scored(*rewards: float | None, text: str = "") -> list[Rollout]:
    return [
        replace(rollout(f"g{number}", [1], [2], reward), completion=f"{number}{text}")
        for number, reward in enumerate(rewards)
    ]


def shown(
    width: int, terminal: bool, action: Callable[[Display], None], encoding: str = "utf-8"
) -> str:
    """What a display writes to a console of `width` columns."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    with Display(0, 20, samples_every=2, console=console) as display:
        action(display)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_line_a_step_where_output_is_no_terminal() -> None:
    def steps(display: Display) -> None:
        display.evaluation(1, {"eval_accuracy": 0.75})
        for step in (1, 2):
            display.step(step, METRICS, scored(0.0, 1.0))

    lines = shown(60, False, steps).splitlines()  # a log file's width is nobody's
    assert lines[0] == "held-out after 1 steps: accuracy 0.750"
    assert lines[1:] == [
        f"step {step}/20  reward 0.531  kl 0.012  entropy 1.203  length 12.3  cut off 25%  "
        "1234 tokens/s  1.50 GB  held-out 0.750  2.5 s"
        for step in (1, 2)
    ]


def test_terminal_shows_progress_numbers_and_completions() -> None:
    def steps(display: Display) -> None:
        display.evaluation(0, {"eval_accuracy": 0.75})
        for step in (1, 2):
            text = f" of {step}" + " and so on" * 50
            display.step(step, METRICS, scored(0.0, 1.0, 0.25, text=text))

    printed = CONTROL.sub("", shown(100, True, steps))
    for number in ("2/20", "left", "reward 0.531", "kl 0.012", "cut off 25%", "held-out 0.750"):
        assert number in printed
    assert "Completions of step 2" in printed and "Completions of step 1" not in printed
    rows = re.findall(r"(best|worst)\s*\S\s*(\S+)\s*\S+\s*\S\s*(\d) of 2", printed)
    assert rows == [("best", "1", "1"), ("best", "0.25", "2"), ("worst", "0", "0")]
    table = [
        line for line in printed.splitlines() if line.startswith("\N{BOX DRAWINGS LIGHT VERTICAL}")
    ]
    assert len(table) == len(rows)  # one line each, however long the text


def test_time_left_is_known_where_a_step_takes_minutes() -> None:
    now = [0.0]
    display = Display(0, 10)
    display.progress.get_time = lambda: now[0]
    for step in (1, 2, 3):
        now[0] += 120.0
        display.progress.update(display.task, completed=step)
    assert display.progress.tasks[0].time_remaining == pytest.approx(7 * 120.0)


@pytest.mark.parametrize("width", [20, 60, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_completion_breaks_the_console(width: int, encoding: str) -> None:
    """Markup is text, nothing moves the cursor or clears the screen, nothing is wider than the
    terminal, and what it has no letter for is replaced.
    """
    nasty = scored(0.0, 1.0, text=NASTY)
    old = replace(nasty[0], temperature=0.0, reward=None)

    def everything(display: Display) -> None:
        display.say(f"summary {NASTY[:30]}")
        display.step(2, {**METRICS, "reward": math.nan, "skipped": 1.0}, nasty)
        display.before_and_after([old], nasty)

    terminal = shown(width, True, everything, encoding)
    assert "\x1b[2J" not in terminal
    plain = CONTROL.sub("", terminal)
    assert all(cell_len(line) <= width for part in plain.split("\n") for line in part.split("\r"))
    if width == 200:
        assert "[/asy] [red]x" in plain and "reward nan" in plain


def test_best_and_worst_are_different_and_have_rewards() -> None:
    best, worst = best_and_worst(scored(0.5, None, 1.0, math.nan, 0.0), 2)
    assert ([r.reward for r in best], [r.reward for r in worst]) == ([1.0, 0.5], [0.0])
    assert best_and_worst(scored(None), 2) == ([], [])
    same = [rollout(group, [1], [2], 1.0) for group in "aab"]
    best, worst = best_and_worst(same, 2)
    assert [r.group for r in best] == ["a", "b"] and [r.group for r in worst] == ["a"]
    with_an_answer = [replace(same[0], source="demonstration"), *same[1:]]
    best, worst = best_and_worst(with_an_answer, 2)
    assert [*best, *worst] == same[1:]
