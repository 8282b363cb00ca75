"""The command `agro`: which commands there are, and what is shown of an error.

A user's mistake is one sentence and exit status 2. Any other error keeps its traceback: it is a
bug, and a sentence would hide where.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from agro_train.durable import no_room
from agro_train.refusal import Refusal


class Command(NamedTuple):
    summary: str
    module: str  # of agro_train.commands; imported only for this command, as most import torch
    passes_on: bool = False  # whether what follows its arguments are another program's options


COMMANDS = {
    "train": Command("train a model", "train"),
    "rollout": Command("record completions of a model, a dataset for recorded=", "record"),
    "score": Command("write rewards into a copy of a rollouts file", "score"),
    "eval": Command("evaluate a run, a checkpoint or a model", "evaluate"),
    "plot": Command("draw and compare runs", "plot"),
    "report": Command("write a run's page: curves, configuration, completions", "report"),
    "serve": Command("start a vLLM server that a run samples from", "serve", passes_on=True),
    "reproduce": Command("run an experiment of the paper", "reproduce"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(list(sys.argv[1:] if arguments is None else arguments))
    try:
        status: int = options.run(options)
    except Refusal as error:
        return refuse(str(error))
    except Exception as error:
        if (reason := no_room(error)) is None:
            raise
        return refuse(f"disk: expected room to write, got {reason!r}; make room and start again")
    return status


def parse(words: list[str]) -> argparse.Namespace:
    """The chosen command's options; `run` among them is what takes them. Ends the process, as
    argparse does, after --help and --version and for arguments that no command has."""
    parser = argparse.ArgumentParser(
        prog="agro", description="Fine-tune a language model with AGRO."
    )
    parser.add_argument("-V", "--version", action="version", version=f"agro {installed_version()}")
    parsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        parsers.add_parser(name, help=command.summary)
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if words[0] not in COMMANDS:
        parser.parse_args(words)
        parser.error(f"expected a command first, got {words[0]!r}")
    command, chosen = COMMANDS[words[0]], parsers.choices[words[0]]
    import_module(f"agro_train.commands.{command.module}").add_arguments(chosen)
    if command.passes_on:
        return chosen.parse_args(words[1:])
    return chosen.parse_intermixed_args(words[1:])  # settings may stand after an option, too


def installed_version() -> str:
    try:
        return version("agro")
    except PackageNotFoundError:  # run from its sources
        return "(not installed)"


def refuse(sentence: str) -> int:
    print(f"agro: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
