"""What is refused of a run that its settings alone do not tell: the launch, the packages, the data,
and what a GPU has room for.
"""

import importlib.util
from collections.abc import Callable, Iterable, Sequence

import torch
from accelerate import Accelerator

from agro_train.config import TrainConfig
from agro_train.data.mix import Mix
from agro_train.data.recorded import Recorded
from agro_train.plan.advice import fits
from agro_train.plan.architecture import find_architecture
from agro_train.plan.machine import Machine
from agro_train.plan.memory import plan as plan_memory
from agro_train.policy.attention import check_attention
from agro_train.ranks import Ranks
from agro_train.refusal import Refusal
from agro_train.types import Rollout
from agro_train.watch.trackers import check_trackers


def check_dtype(config: TrainConfig) -> None:
    """Raises Refusal for a run that would train weights in bfloat16, whose numbers have 8 bits:
    AdamW's step is about as large as the learning rate, and lost where that is below 1/512 of the
    weight. A run that an older version has begun so may still be resumed."""
    if config.dtype == "bfloat16" and not config.use_peft:
        raise Refusal(
            f"dtype: expected float32 for weights that are trained, got bfloat16, where most steps "
            f"of learning_rate={config.learning_rate:g} are rounded away; dtype=float32 "
            "mixed_precision=bf16 computes in bfloat16 around float32 weights, and use_peft=true "
            "trains a float32 adapter of bfloat16 ones"
        )


def check_packages(config: TrainConfig) -> None:
    """Raises Refusal for a package that a setting needs and that is not there."""
    check_trackers(config.report_to)
    check_attention(config.attn_implementation)
    if config.use_vllm and config.vllm_mode == "colocate" and not importlib.util.find_spec("vllm"):
        raise Refusal(
            "use_vllm: expected the package vllm, got none; pip install '.[vllm]' in this "
            "project's folder, or set vllm_mode=server"
        )


def check_launch(accelerator: Accelerator) -> None:
    """Raises Refusal for what a launcher's configuration would silently do to the gradient."""
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise Refusal(
            f"accelerate launch: expected distributed_type MULTI_GPU or MULTI_CPU, got {kind}; the "
            "trainer shards by itself, with fsdp=true"
        )
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise Refusal(
            f"accelerate launch: expected gradient_accumulation_steps 1, got {steps}; token_budget "
            "cuts a step into micro-batches, of any number"
        )


def check_ranks(config: TrainConfig, ranks: Ranks, num_held_out: int, mix: Sequence[Mix]) -> None:
    """Raises Refusal for what the launch cannot carry."""
    if config.fsdp and not torch.distributed.is_initialized():
        raise Refusal(
            "fsdp: expected a distributed launch, got a single process; start it with "
            "accelerate launch -m agro_train, or set fsdp=false"
        )
    num_fresh = min((step.fresh for step in mix if step.fresh), default=0)
    for what, count in (
        ("prompts_per_step", config.prompts_per_step),
        ("fresh prompts in a step", num_fresh),
        ("held-out prompts", num_held_out),
    ):
        if 0 < count < ranks.world:
            raise Refusal(
                f"{what}: expected none or one for each of {ranks.world} processes, got {count}"
            )


def check_first_tokens(
    config: TrainConfig, recorded: Recorded, demonstrations: Iterable[Rollout], ends: set[int]
) -> None:
    """Raises Refusal for a completion that ends before min_new_tokens: the policy cannot draw it,
    so its probability is 0."""
    rows = [r for group in recorded.groups for r in group] if not config.truncates else []
    for rollout in (*rows, *demonstrations):
        firsts = (places[: config.min_new_tokens] for places in rollout.sampled)
        if any(rollout.completion_ids[i] in ends for places in firsts for i in places):
            raise Refusal(
                f"min_new_tokens: expected no end token among the first {config.min_new_tokens} of "
                f"a {rollout.source} completion, got one in that of {rollout.prompt[:40]!r}, whose "
                "probability is then 0; lower it, or leave the completion out"
            )


def warn_of_memory(
    config: TrainConfig, world: int, memory: float, say: Callable[[str], None]
) -> None:
    """Tells `say` where the plan of the run is larger than a GPU's `memory` (bytes). The run goes
    on: a plan is a prediction, and completions may be shorter than they may be. What would save
    memory is not looked for, because the other ranks wait."""
    machine = Machine(gpus=world, memory=memory / 1e9, gpus_per_node=world)
    try:
        planned = plan_memory(config, machine, find_architecture(config.model))
    except Refusal as error:
        say(f"memory was not planned: {error}")
        return
    except Exception as error:  # of any model's own code: a prediction must not end a run
        say(f"memory was not planned: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return
    if not fits(planned, machine):
        say(
            f"memory: {planned.peak / 1e9:.1f} of a GPU's {memory / 1e9:.1f} GB are predicted for "
            f"the stage {planned.worst.name}; the run goes on, see agro plan for what saves memory"
        )
