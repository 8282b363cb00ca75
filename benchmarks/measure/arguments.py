"""The arguments of a benchmark's command."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter


def parser_of(docstring: str | None) -> ArgumentParser:
    """One whose --help shows a module's docstring as it stands there."""
    return ArgumentParser(description=docstring, formatter_class=RawDescriptionHelpFormatter)
