"""The command `agro`: which commands there are, and what is shown of an error.

A user's mistake is one sentence and exit status 2; Ctrl-C and SIGTERM are one and 130 or 143. Any
other error keeps its traceback: it is a bug, and a sentence would hide where.
"""

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from agro_train.durable import no_room
from agro_train.interrupt import Interrupted, Interrupts
from agro_train.keys import nearest
from agro_train.refusal import Refusal

SHELLS = ("bash", "zsh")  # whose Tab key is served


class Command(NamedTuple):
    summary: str
    module: str  # of agro_train.commands; imported only for this command, as most import torch
    passes_on: bool = False  # whether what follows its arguments are another program's options


COMMANDS = {
    "train": Command("train a model", "train"),
    "plan": Command("predict the memory, disk and time that a run takes", "plan"),
    "rollout": Command("record completions of a model, a dataset for recorded=", "record"),
    "score": Command("write rewards into a copy of a rollouts file", "score"),
    "eval": Command("evaluate a run, a checkpoint or a model", "evaluate"),
    "export": Command("write a run's model as transformers loads it", "export"),
    "plot": Command("draw and compare runs", "plot"),
    "report": Command("write a run's page: curves, configuration, completions", "report"),
    "serve": Command("start a vLLM server that a run samples from", "serve", passes_on=True),
    "reproduce": Command("run an experiment of the paper", "reproduce"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        with Interrupts():
            options = parse(list(sys.argv[1:] if arguments is None else arguments))
            status: int = options.run(options)
    except Interrupted as error:
        return tell(str(error), error.status)
    except KeyboardInterrupt:
        return tell("interrupted", 128 + signal.SIGINT)
    except Refusal as error:
        return tell(str(error), 2)
    except Exception as error:
        if (reason := no_room(error)) is None:
            raise
        return tell(f"disk: expected room to write, got {reason!r}; make room and start again", 2)
    return status


def parse(words: list[str]) -> argparse.Namespace:
    """The chosen command's options; `run` among them is what takes them. Ends the process, as
    argparse does, after --help and --version and for arguments that no command has."""
    parser = argparse.ArgumentParser(
        prog="agro", description="Fine-tune a language model with AGRO."
    )
    parser.add_argument("-V", "--version", action="version", version=f"agro {installed_version()}")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        help='for the shell\'s Tab key: eval "$(agro --print-completion bash)"',
    )
    parsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        parsers.add_parser(name, help=command.summary)
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if words[0] not in COMMANDS:
        if words[0].startswith("--print-completion"):
            return _completion(parser, parsers.choices, words)
        if words[0].startswith("-"):
            parser.parse_args(words)  # --help, --version, and what is wrong with any other option
        parser.error(
            f"expected a command first, got {words[0]!r}; {nearest(words[0], COMMANDS)}agro alone "
            "lists them all"
        )
    command, chosen = COMMANDS[words[0]], parsers.choices[words[0]]
    _fill(chosen, command)
    if command.passes_on:
        return chosen.parse_args(words[1:])
    return chosen.parse_intermixed_args(words[1:])  # settings may stand after an option, too


def _completion(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, argparse.ArgumentParser],
    words: list[str],
) -> argparse.Namespace:
    """Options that print the completion of every command's arguments."""
    asked = argparse.ArgumentParser(prog="agro")
    asked.add_argument("--print-completion", choices=SHELLS, required=True)
    shell = asked.parse_args(words).print_completion

    def show(_: argparse.Namespace) -> int:
        for name, command in COMMANDS.items():
            _fill(commands[name], command)
        print(import_module("agro_train.completion").script(parser, shell))
        return 0

    return argparse.Namespace(run=show)


def _fill(parser: argparse.ArgumentParser, command: Command) -> None:
    """Gives a command's parser what its module says of it."""
    module = import_module(f"agro_train.commands.{command.module}")
    parser.description = module.DESCRIPTION
    parser.set_defaults(run=module.run)
    module.add_arguments(parser)


def installed_version() -> str:
    try:
        return version("agro")
    except PackageNotFoundError:  # run from its sources
        return "(not installed)"


def tell(sentence: str, status: int) -> int:
    """Prints the sentence that a command ends with, and returns the exit status."""
    print(f"agro: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
