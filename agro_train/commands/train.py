"""`agro train`: a configuration to its last step, or an interrupted run from its checkpoint."""

import gc
from argparse import ArgumentParser, Namespace
from pathlib import Path

from agro_train import config as configuration
from agro_train.commands.arguments import add_settings
from agro_train.durable import no_room
from agro_train.interrupt import Interrupted, Interrupts
from agro_train.refusal import Refusal
from agro_train.run_folder import RunFolder
from agro_train.settings import KEYS

DESCRIPTION = (
    "Run a configuration: the path of a YAML file or the name of a shipped one (without it: a tiny "
    "model that needs no download), with key=value settings after it."
)


def add_arguments(parser: ArgumentParser) -> None:
    heading = "Settings, with the defaults that hold where the configuration says nothing"
    add_settings(parser, heading, KEYS.values())
    parser.add_argument("--resume", metavar="DIR", help="continue the run in this folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )


def run(options: Namespace) -> int:
    if options.resume is None:
        config = configuration.from_arguments(options.settings)
    else:
        config = configuration.load_resumed(Path(options.resume), options.settings)
    if options.dry_run:
        print(config.to_yaml(), end="")
        return 0
    with Interrupts() as interrupts:
        _train(config, interrupts, resume=options.resume is not None)
    return 0


def _train(config: configuration.TrainConfig, interrupts: Interrupts, *, resume: bool) -> None:
    """Raises Refusal for what ends a run and is no bug, on a full disk too, and Interrupted for a
    signal."""
    # They import transformers, which a dry run does not need.
    from agro_train.callbacks import BrokenCallback
    from agro_train.engines.engine import BrokenEngine
    from agro_train.rewards.functions import BrokenReward
    from agro_train.setup import setup
    from agro_train.train import train

    try:
        run = setup(config, resume=resume, interrupts=interrupts)
    except Interrupted as error:
        again = f"agro train --resume {config.output_dir} goes on" if resume else "start it again"
        raise Interrupted(
            error.number, f"interrupted by {error.name} before a step was taken: {again}"
        ) from None
    except Exception as error:
        raise _refusal(error, config.output_dir) from None
    refused: Refusal | Interrupted | None = None
    try:
        train(run)
    except (BrokenReward, BrokenEngine, BrokenCallback) as error:  # raised on all ranks alike
        refused = Refusal(str(error))
        run.accelerator.end_training()
    except Interrupted as error:  # so is this
        refused = Interrupted(error.number, str(error))
        run.accelerator.end_training()
    except Exception as error:
        refused = Refusal(str(_refusal(error, config.output_dir)))
        # Not end_training: the other ranks are in a collective, and to leave its group takes all.
        for tracker in run.accelerator.trackers:
            tracker.finish()
    # The wrapped models are cycles that hold the process group. Collected here its threads are
    # joined; left to the interpreter's end they are sometimes found running, which aborts. An error
    # that is still raised holds them, too: so its sentence alone goes on.
    del run
    gc.collect()
    if refused is not None:
        raise refused


def _refusal(error: Exception, folder: str) -> Refusal:
    """The sentence for a user's mistake or a disk that takes no more. Raises any other error again:
    it deserves its traceback."""
    if isinstance(error, Refusal):
        return error
    reason = no_room(error)
    if reason is None:
        raise error
    started = RunFolder(Path(folder)).config.is_file()
    return Refusal(
        f"output_dir: expected room to write to {folder!r}, got {reason!r}; what was saved before "
        f"is whole: make room and {f'go on with --resume {folder}' if started else 'start again'}"
    )
