"""The command `agro`: train, plot. Errors of the user's are one sentence and exit status 2."""

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from agro_train import config as configuration

DESCRIPTION = "Fine-tune a language model with AGRO."
TRAIN = (
    "Run a configuration: the path of a YAML file or the name of a shipped one (without it: a tiny "
    "model that needs no download), with key=value settings after it."
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="agro", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    train_command = commands.add_parser("train", help="train a model", description=TRAIN)
    train_command.add_argument("settings", nargs="*", metavar="CONFIG | key=value")
    train_command.add_argument("--resume", metavar="DIR", help="continue the run in this folder")
    train_command.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    plot_command = commands.add_parser("plot", help="draw a run's curves again")
    plot_command.add_argument("run", help="output folder of a run")
    options = parser.parse_args(arguments)
    if options.command == "plot":
        return _plot(Path(options.run))
    return _train(options.settings, options.resume, options.dry_run)


def _train(settings: Sequence[str], resume: str | None, dry_run: bool) -> int:
    try:
        config = _config(settings, resume)
    except ValueError as error:
        return _refuse(error)
    if dry_run:
        print(config.to_yaml(), end="")
        return 0
    from agro_train.run import setup  # imports transformers, which a dry run does not need
    from agro_train.train import train

    try:
        run = setup(config, resume=resume is not None)
    except ValueError as error:
        return _refuse(error)
    train(run)  # what goes wrong from here on deserves its traceback
    # The wrapped models are cycles that hold the process group. Collected here its threads are
    # joined; left to the interpreter's end they are sometimes found running, which aborts.
    del run
    gc.collect()
    return 0


def _config(settings: Sequence[str], resume: str | None) -> configuration.TrainConfig:
    overrides = [setting for setting in settings if "=" in setting]
    names = [setting for setting in settings if "=" not in setting]
    if len(names) > 1:
        raise ValueError(f"arguments: expected one configuration, got {', '.join(names)}")
    if resume is None:
        return configuration.load(configuration.find(names[0]) if names else None, overrides)
    if names:
        raise ValueError(
            f"arguments: expected no configuration with --resume, got {names[0]}; "
            "the run's own config.yaml is used"
        )
    return configuration.load_resumed(Path(resume), overrides)


def _refuse(error: ValueError) -> int:
    print(f"agro: {error}", file=sys.stderr)
    return 2


def _plot(run: Path) -> int:
    if not (run / "metrics.jsonl").is_file():
        return _refuse(
            ValueError(f"plot: expected the folder of a run, got {str(run)!r}; it has no metrics")
        )
    from agro_train.plots import plot_run

    for path in plot_run(run):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
