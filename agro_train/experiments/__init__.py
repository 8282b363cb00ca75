"""The paper's experiments as commands, `agro reproduce NAME`: one file a figure."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch

FIGURES = ("fig1", "landscape", "fig2", "fig4", "fig5", "beyond", "smollm2")


def reproduce(figure: str, output_dir: Path, quick: bool) -> bool:
    """Runs a figure's experiment into output_dir and prints what it shows; True if all holds."""
    # Imported here: the command line needs the names alone, and a figure needs matplotlib.
    run = import_module(f"agro_train.experiments.{figure}").run
    output_dir.mkdir(parents=True, exist_ok=True)
    with one_thread():
        claims = run(output_dir, quick)
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
