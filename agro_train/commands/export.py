"""`agro export`: a run's checkpoint as a folder that transformers loads."""

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from agro_train import config as configuration
from agro_train.commands.sampler import check_free
from agro_train.config import TrainConfig
from agro_train.policy import checkpoint
from agro_train.policy.export import export
from agro_train.refusal import Refusal
from agro_train.run_folder import RunFolder

DESCRIPTION = (
    "Write a run's newest checkpoint, or one of its checkpoints, as a folder that transformers "
    "loads: shards put together, an adapter merged into its base model. One process is enough, "
    "whatever the run had."
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("folder", metavar="FOLDER", help="a new one")


def run(options: Namespace) -> int:
    source, step = checkpoint.find_model(options.model, print)
    if step is None:
        raise Refusal(
            f"export: expected a run or one of its checkpoints, got {options.model!r}, which is "
            "none; give the output_dir of a run, or a folder checkpoint-N in it"
        )
    folder = Path(options.folder)
    check_free(folder, "FOLDER")
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = RunFolder(Path(source).parent).config
    config = configuration.load(settings, []) if settings.is_file() else TrainConfig()
    export(Path(source), folder, replace(config, load_in_4bit=False))
    print(f"{source}, after {step} steps, is in {folder}")
    return 0
