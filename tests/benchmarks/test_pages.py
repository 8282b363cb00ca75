"""The pages have the numbers of the files that they name, and markers put them there."""

from pathlib import Path

import pytest

from benchmarks.pages import head
from benchmarks.pages.__main__ import PAGES, ROOT, current
from benchmarks.pages.markers import COMMENT, Sources, rewritten, styled

SOURCES = Sources(
    {"two": lambda query: ["| a | b |", "|---|---|", f"| {query['x'][0]} | 2 |"]},
    {"one": lambda _: [0.5], "range": lambda _: [1.234, 12.0], "three": lambda _: [1, 2, 3]},
)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page_has_the_numbers_of_its_files(page: Path) -> None:
    assert current(page) == page.read_text(encoding="utf-8"), "make tables writes them"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_markers_are_not_seen(page: Path) -> None:
    """A comment that begins a line ends the paragraph before it; in code it is text."""
    text = page.read_text(encoding="utf-8")
    for comment in COMMENT.finditer(text):
        if comment[0].startswith("<!-- n:"):
            line = text.rfind("\n", 0, comment.start()) + 1
            assert text[line : comment.start()].strip(), comment[0]
            assert "\n" not in comment[0] and "|" not in comment[0], comment[0]
            assert text.count("```", 0, comment.start()) % 2 == 0, comment[0]


def test_a_table_is_replaced_between_its_comments() -> None:
    text = "Before.\n\n<!-- table: two x=7 -->\nanything\n<!-- end -->\n\nAfter 5.\n"
    assert rewritten(text, SOURCES) == (
        "Before.\n\n<!-- table: two x=7 -->\n\n| a | b |\n|---|---|\n| 7 | 2 |\n\n<!-- end -->\n\n"
        "After 5.\n"
    )


def test_as_many_numbers_before_a_comment_are_replaced_as_its_source_has() -> None:
    text = "Of 3 runs of k2 0.1 to 7<!-- n: range -->, and 9.00<!-- n: one --> of 8.\n"
    want = "Of 3 runs of k2 1.2 to 12<!-- n: range -->, and 0.50<!-- n: one --> of 8.\n"
    assert rewritten(text, SOURCES) == want
    assert rewritten(want, SOURCES) == want


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1<!-- n: nothing -->", "expected one of one, range, three, got nothing"),
        ("8<!-- n: one --> and 1 to 2<!-- n: three -->", "expected as many numbers"),
        ("<!-- table: three -->\n<!-- end -->", "expected one of two, got three"),
    ],
)
def test_a_marker_that_cannot_be_served_is_named(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rewritten(text, SOURCES)


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("1.00", 1.3256, "1.33"),
        ("12", 0.6, "1"),
        ("5,220", 4202.7, "4,203"),
        ("2804", 2803.69, "2804"),
        ("999", 1000.2, "1,000"),
        ("+0.063", -0.0004, "+0.000"),
        ("-0.2", 0.25, "+0.2"),
        ("3e-5", 2.563e-5, "3e-5"),
        ("1.0e-5", 9.96e-6, "1.0e-5"),
    ],
)
def test_a_number_keeps_the_digits_that_the_page_gave_it(old: str, value: float, new: str) -> None:
    assert styled(old, value) == new


def test_a_peer_is_compared_as_in_the_tables() -> None:
    """The ratios of the table's columns, and no others."""
    shown = head.cpu_table({})
    fastest = [float(line.split("|")[6].strip(" ~*")) for line in shown[2:]]
    ratios = head.cpu_time({"which": ["fastest"]})
    assert [float(f"{ratio:.2f}") for ratio in ratios] == fastest
    without = head.cpu_time({"which": ["fastest"], "logits": ["no"]})
    assert [float(f"{ratio:.2f}") for ratio in without] == [
        float(line.split("|")[9].strip(" ~*")) for line in shown[2:]
    ]
    assert head.cpu_time({"which": ["faster"]}) == [r for r in head.cpu_time({}) if r < 1]
