"""A model's architecture without its weights and without the network, and the model built of it
with weights that have shapes alone."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from agro_train.config import TrainConfig
from agro_train.plan.machine import Machine
from agro_train.policy import shards
from agro_train.policy.adapter import add_adapter, keeps_base
from agro_train.policy.attention import setting_of, settle, why_not_flex
from agro_train.policy.load import load_architecture, prepare
from agro_train.refusal import Refusal

# Public numbers, so that a plan needs no file of these: hidden size, layers, heads, key-value
# heads, inner size, vocabulary, tokens of context.
LLAMA_3 = {
    "8B": (4096, 32, 32, 8, 14336, 128256, 8192),
    "70B": (8192, 80, 64, 8, 28672, 128256, 8192),
}
KNOWN = {
    "meta-llama/Meta-Llama-3-8B": "8B",
    "meta-llama/Meta-Llama-3-8B-Instruct": "8B",
    "meta-llama/Llama-3.1-8B": "8B",
    "meta-llama/Llama-3.1-8B-Instruct": "8B",
    "meta-llama/Meta-Llama-3-70B": "70B",
    "meta-llama/Meta-Llama-3-70B-Instruct": "70B",
    "meta-llama/Llama-3.1-70B": "70B",
    "meta-llama/Llama-3.1-70B-Instruct": "70B",
    "meta-llama/Llama-3.3-70B-Instruct": "70B",
}


def find_architecture(model: str) -> Any:
    """The transformers configuration of the setting `model`. Raises Refusal where neither this
    machine nor KNOWN has it."""
    if model in KNOWN and not Path(model).exists():
        hidden, layers, heads, pairs, inner, vocabulary, context = LLAMA_3[KNOWN[model]]
        return LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=pairs,
            intermediate_size=inner,
            vocab_size=vocabulary,
            max_position_embeddings=context,
            tie_word_embeddings=False,
        )
    try:
        return load_architecture(model, offline=True)
    except Refusal as error:
        raise Refusal(
            f"model: expected one whose config.json is on this machine, got {model!r}; put that "
            f"file alone into a folder and give model=FOLDER, or plan for one of {', '.join(KNOWN)}"
        ) from error


def is_stored_by_weight(model: str) -> bool:
    """Whether the setting `model` is one whose weights lie in safetensors files, so that a process
    of a sharded run can read its own rows of them. A hub's model is taken to have such files."""
    folder = Path(model)
    if shards.are_in(folder):
        return True
    return not keeps_base(model) and (
        any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin"))
    )


def shortened(architecture: Any, layers: int) -> Any:
    """The same model with its first layers only."""
    short = copy.deepcopy(architecture)
    text = short.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return short


def attention_of(architecture: Any, config: TrainConfig, machine: Machine) -> str:
    """The attention that a run computes with, as the setting calls it, `auto` resolved."""
    if config.attn_implementation != "auto":
        return config.attn_implementation
    model = build(architecture, config, None)
    if machine.cuda and why_not_flex(model) is None:
        return "flex_attention"
    return setting_of(model)


def build(architecture: Any, config: TrainConfig, attention: str | None) -> PreTrainedModel:
    """The policy's model as a run prepares it, an adapter included, on torch's meta device.

    Args:
        attention: transformers' name; None: what it chooses for the model.

    Raises Refusal for an attention that the model has not.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            architecture,
            dtype=getattr(torch, config.dtype),
            attn_implementation=None if attention is None else "eager",
        )
        if attention is not None:
            settle(model, attention)
        prepare(model, config)
        if config.use_peft:
            add_adapter(model, config, None)
    return model
