"""The paper's experiments as commands, `agro reproduce NAME`: one file a figure."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch

from agro_train import durable
from agro_train.watch.environment import describe_program

FIGURES = ("fig1", "landscape", "fig2", "fig4", "fig5", "beyond", "ahead", "smollm2", "offline")


def reproduce(figure: str, output_dir: Path, quick: bool) -> bool:
    """Runs a figure's experiment into output_dir and prints what it shows; True if all holds.

    FIGURE_run.json beside its results says what made them: command, commit, versions, machine. Runs
    of a language model may be taken over from before; they have their own commits in their file.
    """
    # Imported here: the command line needs the names alone, and a figure needs matplotlib.
    run = import_module(f"agro_train.experiments.{figure}").run
    output_dir.mkdir(parents=True, exist_ok=True)
    made_by = describe_program(f"agro reproduce {figure}{' --quick' if quick else ''}")
    began = time.perf_counter()
    with one_thread():
        claims = run(output_dir, quick)
    made_by["seconds_now"] = round(time.perf_counter() - began)
    made_by["claims"] = {claim.text: claim.holds for claim in claims}
    text = json.dumps(made_by, indent=2) + "\n"
    durable.replace(output_dir / f"{figure}_run.json", text)
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}: {claim.text}")
    print(output_dir)
    return all(claim.holds for claim in claims)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: a second costs more than it does on tensors of a thousand numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
