"""A pass on tensors without contents holds what the same pass with contents holds."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from agro_train.config import TrainConfig
from agro_train.plan import trace
from agro_train.plan.machine import Machine
from agro_train.policy import tiny
from agro_train.policy.adapter import add_adapter
from agro_train.policy.load import prepare
from agro_train.policy.policy import Policy, head_gradient

ALONE = Machine(gpus=1, gpu="cpu")
TOKENS = 48
ARCHITECTURE = tiny.build_config(15)
CONFIG = TrainConfig(model="tiny")
CASES = {
    "plain": CONFIG,
    "checkpointing": replace(CONFIG, gradient_checkpointing=True),
    "adapter": replace(CONFIG, use_peft=True),
    "eager": replace(CONFIG, attn_implementation="eager"),
    "bf16": replace(CONFIG, mixed_precision="bf16"),
    "top_k": replace(CONFIG, top_k=4),
}


def really_kept(config: TrainConfig) -> float:
    """Bytes that a forward pass with contents leaves."""
    model = tiny.build_model(15, seed=0)
    model.set_attn_implementation(config.attn_implementation)
    prepare(model, config)
    if config.use_peft:
        add_adapter(model, config, None)
    policy = Policy(model)
    gradient = head_gradient(policy)
    policy.train(config.gradient_checkpointing)
    micro = trace.micro_batch(config, TOKENS, TOKENS)
    ones = torch.ones(TOKENS)
    held = [*policy.parameters(), *policy.buffers(), ones]
    held += [value for value in vars(micro).values() if value is not None]
    low = config.mixed_precision == "bf16"
    with trace.Live(held, lambda func, args: 0.0) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            total = policy(micro, 1.0, ones, ones, gradient)
        kept = live.now
    del total
    return kept


@pytest.mark.parametrize("name", CASES)
def test_a_pass_without_contents_keeps_the_same_bytes(name: str) -> None:
    found = trace.trace(ARCHITECTURE, CASES[name], ALONE, TOKENS, TOKENS)
    assert found.kept == really_kept(CASES[name]) > 0
    assert found.backward >= found.kept and found.scoring > 0


def test_many_layers_are_what_two_and_three_of_them_say() -> None:
    deep = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
    )
    whole = trace._traced(deep, CONFIG, ALONE, TOKENS, TOKENS)
    assert trace.trace(deep, CONFIG, ALONE, TOKENS, TOKENS) == whole


def test_flash_attention_keeps_no_mask() -> None:
    config = replace(CONFIG, share_prompts=False)
    flash = replace(config, attn_implementation="flash_attention_2")
    by_mask, by_flash = (
        [trace.trace(ARCHITECTURE, each, ALONE, tokens, tokens).kept for tokens in (64, 128, 192)]
        for each in (config, flash)
    )
    second = by_mask[2] - 2 * by_mask[1] + by_mask[0]
    # A float32 mask for each of 3 layers, and the mask itself.
    assert second >= 2 * 64**2 * 3 * 4
    assert by_flash[2] - 2 * by_flash[1] + by_flash[0] == 0
