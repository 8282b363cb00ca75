"""What the commands that take a configuration say of it: train and plan."""

import textwrap
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable

from agro_train.keys import Key, as_text


def add_settings(parser: ArgumentParser, heading: str, keys: Iterable[Key]) -> None:
    """CONFIG and key=value, and below the arguments of --help these keys."""
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.description = textwrap.fill(parser.description or "", 100)
    parser.epilog = f"{heading}:\n\n{as_text(keys)}"
    parser.add_argument("settings", nargs="*", metavar="CONFIG | key=value")
