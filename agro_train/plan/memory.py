"""How much memory each stage of a run takes on one GPU, from its configuration alone.

The peak is the most bytes of tensors that are alive at once on a GPU, in the worst stage of a step,
where every prompt and every completion is as long as the configuration allows: what a run's column
`memory_gb` shows. Sampling by vLLM beside the trainer, or by a process that samples ahead, is
counted where it shares the GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from agro_kernels import ModelHead
from agro_train.config import TrainConfig
from agro_train.plan.architecture import (
    attention_of,
    build,
    find_architecture,
    is_stored_by_weight,
)
from agro_train.plan.machine import Machine
from agro_train.plan.trace import trace
from agro_train.policy.policy import layers_of
from agro_train.refusal import Refusal

# Bytes of a weight in NF4, with the numbers that scale its blocks in 8 bits.
IN_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
STAGES = ("start", "sampling", "scoring", "update", "optimiser")


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights, and how many there are."""

    count: int
    trained_count: int
    linear_count: int  # in linear layers, without the head
    whole: float  # as they are stored
    trained: float  # those of them that have gradients
    largest: float  # the largest weight
    layer: float  # one layer's share of `whole`
    trained_layer: float
    root: float  # what is in no layer: embeddings, head
    trained_root: float
    cached_casts: float  # the bfloat16 copies that autocast keeps while a policy is called


@dataclass(frozen=True)
class Part:
    """One kind of thing in a GPU's memory, bytes."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Stage:
    """A moment of the run, and what is there."""

    name: str
    parts: tuple[Part, ...]

    @property
    def total(self) -> float:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """A prediction; bytes of one GPU, or of what a field names."""

    weights: Weights
    stages: tuple[Stage, ...]
    attention: str  # by the setting's name, `auto` resolved
    micro_batch: int  # tokens
    cache_rows: int  # sequences that transformers generates at once, of a GPU; 0: vLLM samples
    cache_row: float  # bytes of the key-value cache of one longest sequence
    host_start: float  # host memory of one node while the models are loaded
    host_checkpoint: float  # the same while a checkpoint is written
    in_shards: bool  # how: each process its shards, or the main one all, on the main node alone
    checkpoint: float  # on disk
    disk: float  # all that the run keeps at once
    sent: float  # copies of the weights that wait for an engine, of one node

    @property
    def worst(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak(self) -> float:
        return self.worst.total


def check(config: TrainConfig, machine: Machine, architecture: Any) -> None:
    """Raises Refusal, in one sentence, for a launch that cannot carry the run."""
    world = machine.gpus
    if world > machine.gpus_per_node and world % machine.gpus_per_node:
        raise Refusal(
            f"gpus: expected a multiple of gpus_per_node={machine.gpus_per_node}, got {world}; "
            "nodes are rented whole"
        )
    if config.prompts_per_step < world:
        raise Refusal(
            f"prompts_per_step: expected one for each of {world} processes, got "
            f"{config.prompts_per_step}; a group stays on one of them, so raise it"
        )
    config.check_processes(world)
    if not config.use_vllm or config.vllm_mode == "server":
        return
    heads, parts = architecture.get_text_config().num_attention_heads, config
    if heads % parts.vllm_tensor_parallel_size:
        raise Refusal(
            f"vllm_tensor_parallel_size: expected a divisor of the model's {heads} attention "
            f"heads, got {parts.vllm_tensor_parallel_size}"
        )


def plan(config: TrainConfig, machine: Machine, architecture: Any = None) -> Plan:
    """Raises Refusal for what cannot be planned, or not be launched.

    Args:
        architecture: transformers' configuration of the model; None: found by its name.
    """
    architecture = architecture or find_architecture(config.model)
    check(config, machine, architecture)
    attention: Any = attention_of(architecture, config, machine)
    config = replace(config, attn_implementation=attention)
    weights = weigh(architecture, config)
    world, low = machine.gpus, config.mixed_precision == "bf16"
    share = 1 / world if config.fsdp else 1.0
    itemsize = product_bytes(config)
    ratio = itemsize / (2 if config.dtype == "bfloat16" else 4)  # of a gathered weight to a stored
    longest = config.max_prompt_length + config.max_completion_length
    mine = -(-config.prompts_per_step // world) * config.num_generations
    read = step_tokens(config, world)
    micro = min(max(config.token_budget, longest - 1), read)
    passes = trace(architecture, config, machine, micro, micro)
    if config.load_in_4bit:  # a layer's weights are made anew for each product
        passes = passes._replace(backward=passes.backward + weights.largest)

    held = [Part("weights", weights.whole * share)]
    if not config.use_peft:
        held.append(Part("reference", weights.whole * share))
    moments = [Part("moments", 2 * weights.trained * share)]
    gradients = [Part("gradients", weights.trained * share)]
    if world > 1 and not config.fsdp:
        gradients.append(Part("gradients on their way", weights.trained))
    root = weights.root * ratio if config.fsdp else 0.0
    layer = weights.layer * ratio if config.fsdp else 0.0
    # A root stays gathered after a pass without gradients, and so does the reference's.
    roots = root * (1 if config.use_peft else 2)

    rows, row = 0, cache_bytes(architecture, longest - 1, itemsize)
    beside: list[Part] = []
    generating: list[Part] = []
    if not config.use_vllm:
        at_once = max(1, config.generation_batch_size // config.num_generations)
        rows = min(at_once * config.num_generations, mine)
        layers = architecture.get_text_config().num_hidden_layers
        vocabulary = architecture.get_text_config().vocab_size
        generating = [
            Part("key-value cache", rows * row * (1 + 1 / layers)),
            # The logits of the last tokens, in float32, and what a draw makes of them.
            Part("logits", rows * vocabulary * (itemsize + 16.0)),
        ]
        casts = weights.cached_casts if low and not config.fsdp else 0.0
        if config.max_staleness:
            plain = weights.whole + weights.cached_casts * low
            beside = [Part("sampling process", plain + sum(p.bytes for p in generating))]
            generating = []
        else:
            whole = weights.whole * ratio if config.fsdp else casts
            generating.insert(0, Part("gathered weights", whole))
    elif config.vllm_mode == "colocate":
        beside = [Part("vLLM", config.vllm_gpu_memory_utilization * machine.bytes)]

    trained_layer = weights.trained_layer * ratio if config.fsdp else 0.0
    reduced = 4 / (itemsize if config.fsdp else 4)  # a sum over ranks is taken in float32
    in_flight = 2 * layer + trained_layer * (1 + reduced)
    last = weights.trained_root * ratio * (1 + reduced) if config.fsdp else 0.0
    backward = passes.kept + passes.beyond + in_flight
    head = max(0.0, backward - passes.kept)
    ends = last + 2 * layer  # the backward's end, where embeddings and head are summed over ranks
    update = [Part("activations", passes.kept), Part("head, and the worst layer", head)]
    if ends > backward:
        update = [Part("activations", 0.0), Part("head, and the worst layer", ends)]
    common = [*held, *moments]
    loaded = [*held, Part("gathered weights", (weights.layer + weights.root) * (share < 1))]
    stages = (
        Stage("start", tuple(loaded)),
        Stage("sampling", (*common, *generating, *beside)),
        Stage(
            "scoring",
            (
                *common,
                Part("gathered weights", roots + 2 * layer),
                Part("head, and the worst layer", passes.scoring),
                *beside,
            ),
        ),
        Stage("update", (*common, *gradients, Part("gathered weights", roots), *update, *beside)),
        Stage(
            "optimiser",
            (*common, *gradients, Part("gathered weights", roots - root), *beside),
        ),
    )
    checkpoint = (weights.trained if config.use_peft else weights.whole) + 2 * weights.trained
    copies = 1 if config.use_peft else 2
    in_shards = config.fsdp and not config.use_peft and ModelHead.is_told_by(architecture)
    # Each process then reads its own rows of one weight after the other.
    packed = getattr(architecture, "quantization_config", None) is not None
    by_rows = in_shards and not packed and is_stored_by_weight(config.model)
    sent = 0.0
    if config.max_staleness:
        by = machine.beside if not config.use_vllm else 1
        size = weights.whole if not config.use_vllm else weights.count * itemsize
        sent = config.max_staleness * by * size
    return Plan(
        weights=weights,
        stages=stages,
        attention=attention,
        micro_batch=micro,
        cache_rows=rows,
        cache_row=row,
        host_start=machine.beside * (weights.largest if by_rows else copies * weights.whole),
        host_checkpoint=checkpoint * (machine.beside / world if in_shards else 1),
        in_shards=in_shards,
        checkpoint=checkpoint,
        disk=checkpoint * (config.save_total_limit + 1),
        sent=sent,
    )


def product_bytes(config: TrainConfig) -> int:
    """Bytes of a number in the model's products, and of a weight that was gathered for them."""
    return 2 if config.mixed_precision == "bf16" or config.dtype == "bfloat16" else 4


def step_tokens(config: TrainConfig, world: int) -> int:
    """What one process reads of a step, prompts and completions as long as they may be."""
    prompts = -(-config.prompts_per_step // world)
    shared = config.share_prompts
    read = config.max_prompt_length * (1 if shared else config.num_generations)
    return prompts * (read + config.num_generations * (config.max_completion_length - 1))


def weigh(architecture: Any, config: TrainConfig) -> Weights:
    """The model's weights, from their shapes."""
    model = build(architecture, config, "eager")
    layers: Any = layers_of(model)
    in_layers = {id(p) for p in layers.parameters()}
    head = model.get_output_embeddings()
    linear: Sequence[Any] = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    quantised = {id(m.weight) for m in linear if m is not head} if config.load_in_4bit else set()

    def size(parameter: torch.Tensor) -> float:
        if id(parameter) in quantised and not parameter.requires_grad:
            return parameter.numel() * IN_4BIT
        return float(parameter.numel() * parameter.element_size())

    everything = list(model.parameters())
    trained = [p for p in everything if p.requires_grad]
    root = [p for p in everything if id(p) not in in_layers]
    cast = [m.weight for m in linear if m.weight.requires_grad]
    float32 = config.dtype == "float32" and config.mixed_precision == "bf16"
    return Weights(
        count=sum(p.numel() for p in everything),
        trained_count=sum(p.numel() for p in trained),
        linear_count=sum(m.weight.numel() for m in linear if m is not head),
        whole=sum(map(size, everything)),
        trained=sum(map(size, trained)),
        largest=max(map(size, everything)),
        layer=max(sum(map(size, one.parameters())) for one in layers),
        trained_layer=max(
            sum(size(p) for p in one.parameters() if p.requires_grad) for one in layers
        ),
        root=sum(map(size, root)),
        trained_root=sum(size(p) for p in root if p.requires_grad),
        cached_casts=2.0 * sum(p.numel() for p in cast) if float32 else 0.0,
    )


def cache_bytes(architecture: Any, tokens: int, itemsize: int) -> float:
    """Of the keys and values of one sequence; a layer with a window keeps that alone."""
    text = architecture.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    pairs = getattr(text, "num_key_value_heads", None) or heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or tokens
    kept = [min(tokens, window) if kind == "sliding_attention" else tokens for kind in kinds]
    return float(sum(kept) * 2 * pairs * size * itemsize)
