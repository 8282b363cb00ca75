"""Writes the measured numbers of README.md, docs/ and this folder's README from their files.

    python -m benchmarks.pages [--check]

Each page's markers (markers.py says what they are) name a source: a CSV file of benchmarks/results,
by head.py and trainer.py, or what `agro reproduce` left in docs/experiments/results, by
experiments.py. With --check nothing is written; pages whose numbers are others are named, and the
exit status is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import experiments, head, trainer
from benchmarks.pages.markers import Sources, rewritten

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
)
SOURCES = Sources(
    {**head.TABLES, **trainer.TABLES, **experiments.TABLES},
    {**head.NUMBERS, **trainer.NUMBERS, **experiments.NUMBERS},
)


def current(page: Path) -> str:
    """The page as its numbers' files have it."""
    try:
        return rewritten(page.read_text(encoding="utf-8"), SOURCES)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{page.relative_to(ROOT)}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    others = 0
    for page in PAGES:
        text = current(page)
        if text == page.read_text(encoding="utf-8"):
            continue
        others += 1
        print(f"{page.relative_to(ROOT)}: {'other numbers' if check else 'written'}")
        if not check:
            page.write_text(text, encoding="utf-8")
    return int(check and others > 0)


if __name__ == "__main__":
    sys.exit(main())
