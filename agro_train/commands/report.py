"""`agro report`: one HTML page about a run."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from agro_train.commands.plot import check_run
from agro_train.watch.report import write_report

DESCRIPTION = (
    "Write one HTML page about a run that needs no other file. A finished run has one already."
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="output folder of a run")
    parser.add_argument("--output", metavar="FILE", help="default: RUN/report.html")


def run(options: Namespace) -> int:
    folder = Path(options.run_folder)
    check_run(folder, "report")
    print(write_report(folder, Path(options.output) if options.output else None))
    return 0
