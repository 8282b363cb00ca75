"""`agro plot`: the curves of a run, or of several against each other."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from agro_train.refusal import Refusal
from agro_train.run_folder import RunFolder
from agro_train.watch.plots import plot_comparison, plot_run

DESCRIPTION = (
    "Draw the curves of a run, or of several against each other. Runs whose configurations differ "
    "in nothing but seed and names are one curve, with a band from the lowest to the highest."
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument("--output", metavar="DIR", help="default: ./plots; RUN/plots for one")


def run(options: Namespace) -> int:
    runs = [Path(name) for name in options.runs]
    for folder in runs:
        check_run(folder, "plot")
    if len(runs) == 1 and options.output is None:
        written = plot_run(runs[0])
    else:
        written = plot_comparison(runs, Path(options.output or "plots"))
    for path in written:
        print(path)
    return 0


def check_run(folder: Path, command: str) -> None:
    """Raises Refusal where the folder has no record of a run."""
    if not RunFolder(folder).metrics.is_file():
        raise Refusal(
            f"{command}: expected the folder of a run, got {str(folder)!r}; it has no metrics"
        )
