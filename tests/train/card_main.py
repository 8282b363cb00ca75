"""What a test finds out about a card, in a process that has one.

    python -m tests.train.card_main FOLDER

Writes FOLDER/found.json: what single operations and the parts of a run have between host and card,
and what mistakes, made on purpose, come to.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import Tensor

from agro_kernels import linear_logprobs
from agro_train import config as configuration
from agro_train import setup, train, types
from agro_train.config import TrainConfig
from agro_train.evaluate import evaluate
from agro_train.policy import checkpoint
from agro_train.policy.saver import Saver
from agro_train.run import Run
from tests.train.card import Card, Event, make_card

PLAIN = ["eval_every=2", "eval_prompts=2", "eval_generations=2"]
CLOCKS = ("time_s", "tokens_per_s", "memory_gb")  # and what else is of a machine
OTHERS = {
    # Sets of ids that a sampler kept.
    "kept": ["top_k=5", "top_p=0.9", "eval_every=0"],
    # First tokens that cannot be the end.
    "early": ["min_new_tokens=1", "lr_weight=1", "eval_every=0"],
}
OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "masked_select": lambda x: x.masked_select(x > 1),
    "mask read": lambda x: x[x > 1],
    "mask written": lambda x: x.index_put_((x > 1,), x[:1]),
    "mask filled": lambda x: x.masked_fill_(x > 1, 0.0),
    "list": lambda x: x[[0, 1]],
    "places": lambda x: x[x.long()],
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "repeat_interleave of known size": lambda x: x.repeat_interleave(x.long(), output_size=3),
    "new": lambda x: torch.zeros(3, device=x.device) + x.new_ones(3) + torch.zeros_like(x),
    "number": lambda x: x * 2 + torch.tensor(1.0),
    "host's": lambda x: x + torch.ones(3),
    "upload": lambda x: torch.ones(3).to(x.device),
    "upload, not pinned": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "upload, pinned": lambda x: torch.empty(3, pin_memory=True).to(x.device, non_blocking=True),
    "write": lambda x: x.copy_(torch.ones(3)),
    "read": lambda x: torch.empty(3).copy_(x),
    "head": lambda x: linear_logprobs(x[:, None], x[:, None], x.long()),
    "head whose rows stay": lambda x: linear_logprobs(
        x[:, None], x[:, None], x.long(), compact=False
    ),
    "gradient": lambda x: (x.requires_grad_() * 2).sum().backward(),
}


def operations(device: torch.device) -> dict[str, list[str]]:
    """The kinds of events that each operation has; the error of one that is refused."""
    found = {}
    for name, operation in OPERATIONS.items():
        with Card() as card:
            x = torch.tensor([0.0, 1.0, 2.0]).to(device)
            card.events.clear()
            try:
                operation(x)
                found[name] = [event.kind for event in card.events]
            except RuntimeError as error:
                found[name] = [str(error)]
    return found


@contextmanager
def run_on(device: torch.device | None, folder: Path, *words: str) -> Iterator[Run]:
    """A run of two steps on this device; None: on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = configuration.from_arguments(
        [
            "tiny-arithmetic",
            f"output_dir={folder}",
            "warm_start_steps=1",
            "steps=2",
            "prompts_per_step=2",
            "num_generations=3",
            "max_completion_length=6",
            "token_budget=25",  # two micro-batches
            "reward=tests.train.reward_functions:even_share",
            "attn_implementation=eager",  # the other ones go by the device
            "warmup_steps=0",
            *words,
        ]
    )
    start = setup.start_accelerator

    def started(config: TrainConfig) -> Any:
        accelerator = start(config)
        if device is not None:
            PartialState().device = accelerator.state.device = device
        return accelerator

    with patch.object(setup, "start_accelerator", started):
        run = setup.setup(config, resume=False)
    try:
        yield run
    finally:
        run.fresh.close()
        run.lock.release()


def whole_run(device: torch.device | None, folder: Path) -> dict[str, Any]:
    """Each part's events, the steps' metrics, and the weights that the checkpoint holds."""
    parts: dict[str, Any] = {"metrics": []}
    with Card() if device else nullcontext() as card, run_on(device, folder, *PLAIN) as run:

        def events() -> list[Event]:
            return [] if card is None else [card.events.pop(0) for _ in list(card.events)]

        parts["set-up"] = events()
        for number in range(2):
            metrics, _ = train.take_step(run, number)
            parts["metrics"].append({k: v for k, v in metrics.items() if k not in CLOCKS})
            parts[f"step {number}"] = events()
        held = run.questions.held_out
        evaluate(run.engine, held, range(len(held)), run.rewards, run.config, 2)
        parts["evaluate"] = events()
        train.save(run, Saver(folder, run.ranks, keep=1), 2, last=True)
        parts["save"] = events()
    saved = folder / "checkpoint-2"
    moments = torch.load(saved / checkpoint.OPTIMIZER, weights_only=True)["optimizer"]["state"]
    parts["moments"] = {n: float(m["exp_avg_sq"].double().sum()) for n, m in moments.items()}
    parts["weights"] = checkpoint.checksum(saved / "model.safetensors")
    return parts


def mistakes(device: torch.device, folder: Path) -> dict[str, Any]:
    """A step with other settings, and with a mistake."""

    def left_on_the_host(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
        del device
        return tensors

    def asks(run: Run) -> Callable[..., Any]:
        def hook(*arguments: Any) -> None:
            float(arguments[-1].logprobs.sum())

        return run.models.reference.register_forward_hook(hook).remove

    found: dict[str, Any] = {}
    with Card() as card, run_on(device, folder / "kept", *OTHERS["kept"]) as run:
        card.events.clear()
        train.take_step(run, 0)
        found["kept"] = list(card.events)
    with Card() as card, run_on(device, folder / "early", *OTHERS["early"]) as run:
        card.events.clear()
        train.take_step(run, 0)
        found["early"] = list(card.events)
        card.events.clear()
        remove = asks(run)
        train.take_step(run, 1)
        remove()
        found["asked"] = list(card.events)
        with patch.object(types, "upload", left_on_the_host):
            try:
                train.take_step(run, 1)
                found["left"] = ""
            except RuntimeError as error:
                found["left"] = str(error)
    return found


def main(folder: Path) -> None:
    device = make_card()
    found = {
        "operations": operations(device),
        "host": whole_run(None, folder / "host"),
        "card": whole_run(device, folder / "card"),
        "mistakes": mistakes(device, folder / "mistakes"),
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
