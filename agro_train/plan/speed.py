"""The least time that a step takes by datasheets: products, memory, network, nothing else."""

from dataclasses import dataclass
from typing import Any

from agro_train.config import TrainConfig
from agro_train.plan.machine import DATASHEETS, Machine
from agro_train.plan.memory import Plan, product_bytes, step_tokens


@dataclass(frozen=True)
class Speed:
    """Seconds a step of one GPU; None: not predicted."""

    update: float | None  # scoring by policy and reference, and the update
    network: float | None  # of it, if nothing else overlapped: weights gathered, gradients summed
    sampling: float | None  # by transformers; Python's own time between two tokens is not in it


def speed(config: TrainConfig, machine: Machine, architecture: Any, planned: Plan) -> Speed:
    """Every completion as long as it may be. Products run at `efficiency` of the datasheet's
    bfloat16 rate; the network and the products overlap, so the longer one counts."""
    if not machine.cuda or product_bytes(config) > 2:
        return Speed(None, None, None)
    device, weights = DATASHEETS[machine.gpu], planned.weights
    rate = device.bfloat16 * machine.efficiency
    text = architecture.get_text_config()
    read = step_tokens(config, machine.gpus)
    mine = -(-config.prompts_per_step // machine.gpus) * config.num_generations
    predicted = mine * config.max_completion_length
    longest = config.max_prompt_length + config.max_completion_length
    # A dense mask hides products from the softmax and not from the GPU; the others leave them out.
    masked = planned.attention in ("sdpa", "eager")
    sees = planned.micro_batch if masked else longest / 2
    forward = read * (
        2 * weights.linear_count + 4 * text.num_hidden_layers * text.hidden_size * sees
    )
    backward = (1 if config.use_peft else 2) + config.gradient_checkpointing
    head = 2 * text.hidden_size * text.vocab_size * predicted
    head *= 2 + (2 if config.use_peft else 3)
    products = ((3 + backward) * forward + head) / rate
    network = _network(config, machine, planned, read)
    sampling = None
    if not config.use_vllm:
        sampling = _sampling(config, machine, planned, mine)
    return Speed(max(products, network), network, sampling)


def _network(config: TrainConfig, machine: Machine, planned: Plan, read: int) -> float:
    """Seconds that gathering weights and summing gradients takes."""
    weights, others = planned.weights, (machine.gpus - 1) / machine.gpus
    if not config.fsdp:  # a sum goes out and comes back
        return 2 * weights.trained * others / machine.link
    micro = -(-read // planned.micro_batch)
    # Policy and reference score, the update goes forward and back; gradients are summed in float32.
    a_micro_batch = 4 * weights.count * product_bytes(config) + 4 * weights.trained_count
    return micro * a_micro_batch * others / machine.link


def _sampling(config: TrainConfig, machine: Machine, planned: Plan, mine: int) -> float:
    """Each token of a batch reads every weight and, on average, half of the cache."""
    device, rows = DATASHEETS[machine.gpu], planned.cache_rows
    a_token = 2 * planned.weights.count + rows * planned.cache_row / 2
    products = 2 * planned.weights.count * rows / (device.bfloat16 * machine.efficiency)
    batches = -(-mine // rows)
    return batches * config.max_completion_length * max(a_token / device.bandwidth, products)
