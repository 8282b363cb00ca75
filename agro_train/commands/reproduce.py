"""`agro reproduce`: an experiment of the paper, with its tables, plots and claims."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from agro_train.experiments import FIGURES, reproduce
from agro_train.refusal import Refusal

DESCRIPTION = (
    "Run one of the paper's experiments, write its tables and plots to output_dir (default: "
    "runs/FIGURE), and print what it shows; exit status 1 if it does not show it."
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("figure", metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("settings", nargs="*", metavar="output_dir=DIR")
    parser.add_argument("--quick", action="store_true", help="small, in seconds")


def run(options: Namespace) -> int:
    if options.figure not in FIGURES:
        raise Refusal(f"figure: expected one of {', '.join(FIGURES)}, got {options.figure!r}")
    output_dir = f"runs/{options.figure}"
    for setting in options.settings:
        key, _, output_dir = setting.partition("=")
        if key != "output_dir" or not output_dir:
            raise Refusal(f"arguments: expected output_dir=DIR, got {setting!r}")
    return 0 if reproduce(options.figure, Path(output_dir), options.quick) else 1
