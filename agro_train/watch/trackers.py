"""TensorBoard, Weights & Biases and trackio, through accelerate: the numbers of metrics.jsonl."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from agro_train.config import TrainConfig
from agro_train.refusal import Refusal


def check_trackers(report_to: Sequence[str]) -> None:
    """Raises Refusal, naming what to install, for a tracker whose package is not there."""
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in report_to:
        if name not in available:
            raise Refusal(
                f"report_to: expected installed trackers, got {name}, whose package is not there; "
                f"pip install {name}, or leave it out"
            )


def start_trackers(
    accelerator: Accelerator, config: TrainConfig, folder: Path, run_id: str, start: int
) -> None:
    """Opens the run in every tracker of report_to, as `run_name` in `project`.

    A resumed run continues its curves from its checkpoint, after `start` steps. Steps after the
    checkpoint are logged twice: TensorBoard shows the second value, W&B the first, trackio both.
    """
    if not config.report_to:
        return
    name = config.run_name or folder.resolve().name
    settings = {"name": name, "config": asdict(config)}
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": start + 1 if start else 0},  # step 0 has an evaluation
        "wandb": {**settings, "id": run_id, "resume": "allow", "dir": str(folder)},
        # trackio identifies a run by its name alone, which a run of another folder may share.
        "trackio": {**settings, "resume": "allow" if start else "never"},
    }
    accelerator.init_trackers(config.project, init_kwargs=options)
    if "tensorboard" in config.report_to and accelerator.is_main_process:
        # TensorBoard renders Markdown: indented, the text is shown as code.
        text = "".join(f"    {line}\n" for line in config.to_yaml().splitlines())
        accelerator.get_tracker("tensorboard").log({"config": text}, step=start)
