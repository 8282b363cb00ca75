"""`agro plan`: memory, disk and time that a run would take, before a machine is rented for it."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from agro_train import config as configuration
from agro_train.commands.arguments import add_settings
from agro_train.plan.machine import MACHINE_KEYS, Machine

if TYPE_CHECKING:
    from agro_train.plan.tables import Prediction

DESCRIPTION = (
    "Predict what a run would take: memory of a GPU in each stage of a step, host memory, disk, "
    "and the least time a step, from the configuration and the model's architecture. No weight is "
    "loaded and no network is asked."
)


def add_arguments(parser: ArgumentParser) -> None:
    heading = "Of the machine, beside the run's settings (agro train --help)"
    add_settings(parser, heading, MACHINE_KEYS.values())
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="the same as one JSON object")
    shape.add_argument("--markdown", action="store_true", help="the same as Markdown tables")


def run(options: Namespace) -> int:
    prediction = predict(options.settings)
    if options.json:
        print(json.dumps(as_json(prediction), indent=2))
        return 0
    from agro_train.plan.tables import as_markdown, show

    if options.markdown:
        print(as_markdown(prediction), end="")
    else:
        show(prediction)
    return 0


def predict(words: Sequence[str]) -> "Prediction":
    """The plan of a command line. Raises Refusal for what is wrong with it."""
    of_machine = [word for word in words if word.partition("=")[0] in MACHINE_KEYS]
    config = configuration.from_arguments([word for word in words if word not in of_machine])
    given = configuration.read_overrides(of_machine)
    machine = Machine(**{name: MACHINE_KEYS[name].read(value) for name, value in given.items()})
    for name, one in MACHINE_KEYS.items():
        one.check(getattr(machine, name))
    # It imports transformers.
    from agro_train.plan.tables import Prediction

    return Prediction.of(config, machine)


def as_json(prediction: "Prediction") -> dict[str, Any]:
    """Bytes and seconds, by the names of the plan's fields."""
    found = {
        "kind": "prediction, not a measurement",
        "machine": asdict(prediction.machine),
        "model": prediction.config.model,
        "fits": prediction.fits,
        "peak": prediction.plan.peak,
        "worst_stage": prediction.plan.worst.name,
        **asdict(prediction.plan),
        "seconds": asdict(prediction.speed),
        "change": None if prediction.change is None else asdict(prediction.change),
    }
    found["stages"] = {
        stage.name: {part.name: part.bytes for part in stage.parts}
        for stage in prediction.plan.stages
    }
    return found
