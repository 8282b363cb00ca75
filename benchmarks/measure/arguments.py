"""The arguments of a benchmark's command, and the device that it gets."""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch


def parser_of(docstring: str | None) -> ArgumentParser:
    """One whose --help shows a module's docstring as it stands there."""
    return ArgumentParser(description=docstring, formatter_class=RawDescriptionHelpFormatter)


def add_numbers(parser: ArgumentParser, **defaults: int) -> None:
    """Options that take a whole number, with these defaults: micro_batch=32 is `--micro-batch`."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)


def lacks_gpu(command: str, next_step: str, *, smoke: bool) -> bool:
    """Whether a command for a GPU has none, which it then says; with --smoke it needs none."""
    lacking = not smoke and not torch.cuda.is_available()
    if lacking:
        print(f"{command}: torch finds no GPU here{next_step}", file=sys.stderr)
    return lacking


def kernels_device(*, smoke: bool) -> str:
    """Where Triton's kernels run: with --smoke on the CPU, by the interpreter. To be asked before
    they are imported."""
    if not smoke:
        return "cuda"
    os.environ["TRITON_INTERPRET"] = "1"
    return "cpu"
