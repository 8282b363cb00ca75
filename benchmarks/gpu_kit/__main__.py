"""Ten minutes on one GPU, without a network: is it right, how fast, how much memory?

    python3 -m benchmarks.gpu_kit [--budget-s 600] [--out FOLDER] [--parts NAME ...]
    python3 -m benchmarks.gpu_kit --dry       every part on tiny shapes on the CPU, in seconds
    python3 -m benchmarks.gpu_kit --gather    where there is a network: wheels to carry along
    python3 -m benchmarks.gpu_kit --list      the parts, in order

From the repository's root, or with it as PYTHONPATH; `make gpu`, `make gpu-dry` and `make
gpu-wheels` are the same. torch and triton are the machine's own, and so is whatever else it has;
what it lacks comes from --wheels. csrc need not be compiled. Where Triton's kernels do not run (it
wants a C compiler and Python's headers), the reason is recorded and the blocked torch path measured
in their place.

Method. The parts run in order of worth, each in a process of its own with a time limit; one that
fails is recorded with its last lines, and the others go on. When the budget is spent, the part in
hand is ended, what it has reported counts, and later ones are skipped, by name. The runs are
`agro train`'s own setup and steps on a model of a known shape whose random weights are made on the
GPU; every completion has the same length. The first step, which compiles kernels, is not timed.
TRL's trainer gets the same model, prompts, lengths and micro-batches where the package is there.

gpu_kit.json and gpu_kit.csv, in one folder with the logs, have a step's time split (generate,
score, update), tokens a second, FLOP/s and their share of the datasheet's (MFU; counted are the
products that no trainer can avoid), peak memory by phase beside the plan's, and the card's name,
clocks and versions. What the columns mean: benchmarks/gpu_kit/results.py.
"""

from __future__ import annotations  # for the sentence about an older Python

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from benchmarks.gpu_kit.parts import Part

ROOT = Path(__file__).parents[2]
OLDEST = (3, 11)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a part failed or was ended, 2 for what cannot work."""
    if sys.version_info < OLDEST:  # the machine's own may be older
        print(f"benchmarks.gpu_kit: python3: expected 3.11 or newer, got {sys.version.split()[0]}")
        return 2
    from agro_train.refusal import Refusal

    options = parse(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Refusal as error:
        print(f"benchmarks.gpu_kit: {error}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from benchmarks.gpu_kit.packages import WHEELS

    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_kit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--budget-s", type=float, default=600.0, help="seconds in all (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="a new folder (runs/gpu-kit-DATE)")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these alone, and the machine's")
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="(%(default)s)")
    parser.add_argument(
        "--python",
        default=f"{sys.version_info[0]}.{sys.version_info[1]}",
        help="with --gather: the GPU machine's version of Python (%(default)s)",
    )
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--dry", action="store_true")
    does.add_argument("--gather", action="store_true")
    does.add_argument("--list", action="store_true")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """What the command line asks for. Raises Refusal for what cannot work, before any work."""
    from benchmarks.gpu_kit import packages
    from benchmarks.gpu_kit.parts import table

    parts = table(dry=options.dry)
    if options.list:
        for part in parts:
            print(f"{part.name:24s}at most {part.limit_s:3.0f} s   {part.about}")
        return 0
    if options.gather:
        packages.gather(options.wheels, options.python)
        print(f"{options.wheels}: {len(list(options.wheels.glob('*.whl')))} wheels")
        return 0
    began = time.monotonic()
    chosen = choose(options.parts, parts)
    packages.check(["torch"], options.wheels)
    check_gpu(dry=options.dry)
    packages.add(options.wheels)
    packages.check(packages.requirements(), options.wheels)
    folder = new_folder(options.out, dry=options.dry)
    prepare_environment(dry=options.dry)

    from benchmarks.gpu_kit.kit import Kit

    kit = Kit(folder, dry=options.dry, began=began, budget_s=options.budget_s)
    signal.signal(signal.SIGTERM, _end)  # so that the part in hand is ended, too
    try:
        for part in chosen:
            kit.run(part)
    finally:
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        print(f"{folder}: gpu_kit.json, gpu_kit.csv, logs/", flush=True)
    return kit.status()


def choose(names: Sequence[str] | None, parts: Sequence[Part]) -> list[Part]:
    """The parts of these names and the machine's; None: all. Raises Refusal for an unknown one."""
    from agro_train.refusal import Refusal
    from benchmarks.gpu_kit.parts import MACHINE

    if names is None:
        return list(parts)
    known = [part.name for part in parts]
    if unknown := [name for name in names if name not in known]:
        raise Refusal(f"--parts: expected some of {', '.join(known)}, got {unknown[0]}")
    return [part for part in parts if part.name in (MACHINE, *names)]


def prepare_environment(*, dry: bool) -> None:
    """For this process and all that it starts: the repository is found, nothing asks a network."""
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
    if dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not (ROOT / "agro_kernels" / "_cpu" / "_native.so").exists():
        os.environ.setdefault("AGRO_CPU_ISA", "none")  # else its absence is a warning


def check_gpu(*, dry: bool) -> None:
    """Raises Refusal where torch finds no GPU."""
    import torch

    from agro_train.refusal import Refusal

    if not dry and not torch.cuda.is_available():
        raise Refusal(
            f"GPU: expected one that torch {torch.__version__} finds, got none; run it on a "
            "machine with one, or add --dry to run the same code on this CPU"
        )


def new_folder(given: Path | None, *, dry: bool) -> Path:
    """An empty folder that can be written to. Raises Refusal where there is none."""
    from agro_train.refusal import Refusal, writing_to

    name = f"gpu-kit-{'dry-' if dry else ''}{datetime.now():%Y%m%d-%H%M%S}"
    folder = (given or ROOT / "runs" / name).absolute()
    with writing_to(folder, "--out"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "logs").mkdir()
        except FileExistsError as error:
            raise Refusal(f"--out: expected a new or empty folder, got {folder}") from error
    return folder


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
