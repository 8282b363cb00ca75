"""What to change first where a run does not fit, and what each change would save."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from agro_train.config import TrainConfig
from agro_train.plan.machine import Machine
from agro_train.plan.memory import Plan, plan
from agro_train.refusal import Refusal


@dataclass(frozen=True)
class Change:
    """A setting of another value, and the bytes that a GPU's peak is then smaller by."""

    settings: str
    saves: float
    fits: bool


def fits(planned: Plan, machine: Machine) -> bool:
    """Whether a GPU's memory holds the peak and what is not tensors; of unknown memory, yes."""
    return not machine.bytes or planned.peak + machine.reserved <= machine.bytes


def first_change(
    config: TrainConfig, machine: Machine, architecture: Any, planned: Plan
) -> Change | None:
    """The first of the changes, the least costly first, with which the run fits; where none is
    enough, the one that saves most; None where none saves anything."""
    most: Change | None = None
    for settings, other, on in changes(config, machine, planned):
        try:
            now = plan(other, on, architecture)
        except Refusal:  # one of its settings forbids another
            continue
        change = Change(settings, planned.peak - now.peak, fits(now, on))
        if change.fits:
            return change
        if change.saves > 0 and (most is None or change.saves > most.saves):
            most = change
    return most


def changes(
    config: TrainConfig, machine: Machine, planned: Plan
) -> Iterator[tuple[str, TrainConfig, Machine]]:
    """In words, and as what is then planned: those that cost nothing but time before those that
    change what is trained, and more GPUs last."""

    def of(**settings: Any) -> tuple[str, TrainConfig, Machine]:
        words = " ".join(f"{name}={_text(value)}" for name, value in settings.items())
        return words, replace(config, **settings), machine

    if planned.worst.name == "sampling" and not config.use_vllm:
        size = config.generation_batch_size
        while size >= 2 * config.num_generations:
            size //= 2
            yield of(generation_batch_size=size)
        yield of(use_vllm=True, vllm_mode="server")
    if config.use_vllm and config.vllm_mode == "colocate":
        yield of(vllm_mode="server")
    if config.max_staleness and not config.use_vllm:
        yield of(max_staleness=0)
    if not config.gradient_checkpointing:
        yield of(gradient_checkpointing=True)
    longest = config.max_prompt_length + config.max_completion_length - 1
    budget = planned.micro_batch
    while budget > longest:
        budget = max(longest, budget // 2)
        yield of(token_budget=budget)
    if not config.fsdp and machine.gpus > 1 and not config.load_in_4bit:
        yield of(fsdp=True)
    if config.mixed_precision == "no" and config.dtype == "float32":
        yield of(mixed_precision="bf16")
    if not config.use_peft:
        yield of(use_peft=True)
        if not config.fsdp:
            yield of(use_peft=True, dtype="bfloat16")
    if config.fsdp:
        gpus = machine.gpus
        while 2 * gpus <= config.prompts_per_step:
            gpus *= 2
            yield f"gpus={gpus}", config, replace(machine, gpus=gpus)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
