"""The plans of docs/planning.md, made again: predictions, no measurement.

    python -m benchmarks.predict.plan [--check]

Replaces each table of the page, between `<!-- agro plan WORDS -->` and `<!-- end -->`, by what
`agro plan WORDS --markdown` prints. With --check nothing is written, and the exit status is 1 where
the page has another one.
"""

import re
import sys
from pathlib import Path

from agro_train.commands.plan import predict
from agro_train.plan.tables import as_markdown
from benchmarks.measure.arguments import parser_of

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
BLOCK = re.compile(r"<!-- agro plan (.*?) -->\n.*?<!-- end -->", flags=re.S)


def block(words: str) -> str:
    """The page's text for one command line."""
    text = as_markdown(predict(words.split()))
    return f"<!-- agro plan {words} -->\n\n{text}\n<!-- end -->"


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    before = PAGE.read_text(encoding="utf-8")
    after = BLOCK.sub(lambda found: block(found[1]), before)
    if not check:
        PAGE.write_text(after, encoding="utf-8")
    return int(check and before != after)


if __name__ == "__main__":
    sys.exit(main())
