"""A pass on tensors without contents holds what the same pass with contents holds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen3MoeConfig,
)

from agro_train.config import TrainConfig
from agro_train.plan import trace
from agro_train.plan.machine import Machine
from agro_train.policy import tiny
from agro_train.policy.adapter import add_adapter
from agro_train.policy.attention import name_at_load
from agro_train.policy.load import prepare
from agro_train.policy.policy import Policy, head_gradient
from agro_train.refusal import Refusal
from tests.train.models import SIZES

ALONE = Machine(gpus=1, gpu="cpu")
TOKENS = 48
ARCHITECTURE = tiny.build_config(15)
CONFIG = TrainConfig(model="tiny", attn_implementation="sdpa")
CASES = {
    "plain": CONFIG,
    "checkpointing": replace(CONFIG, gradient_checkpointing=True),
    "adapter": replace(CONFIG, use_peft=True),
    "eager": replace(CONFIG, attn_implementation="eager"),
    "bf16": replace(CONFIG, mixed_precision="bf16"),
    "top_k": replace(CONFIG, top_k=4),
    "weights in bf16": replace(CONFIG, dtype="bfloat16"),
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8, **SIZES}
IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
FAMILIES = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=15, n_positions=64, **IDS),
    "opt": OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **SIZES, vocab_size=15, **IDS),
    "phi3": Phi3Config(intermediate_size=48, **SIZES, vocab_size=15, **IDS),
    "llama": LlamaConfig(intermediate_size=48, **SIZES, vocab_size=15),
    "qwen3_moe": Qwen3MoeConfig(
        moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, **GROUPED, vocab_size=15
    ),
}
GEMMA2 = Gemma2Config(intermediate_size=48, **GROUPED)


def really_kept(config: TrainConfig, architecture: Any = ARCHITECTURE) -> float:
    """Bytes that a forward pass with contents leaves."""
    model = AutoModelForCausalLM.from_config(
        architecture,
        dtype=getattr(torch, config.dtype),
        attn_implementation=name_at_load(config.attn_implementation),
    )
    prepare(model, config)
    if config.use_peft:
        add_adapter(model, config, None)
    policy = Policy(model)
    gradient = head_gradient(policy)
    policy.train(config.gradient_checkpointing)
    micro = trace.micro_batch(config, TOKENS, TOKENS)
    ones = torch.ones(TOKENS)
    held = [*policy.parameters(), *policy.buffers(), ones]
    held += micro.tensors().values()
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


@pytest.mark.parametrize("family", FAMILIES)
def test_any_familys_pass_is_planned(family: str) -> None:
    architecture = FAMILIES[family]
    found = trace.trace(architecture, CONFIG, ALONE, TOKENS, TOKENS)
    assert found.kept == really_kept(CONFIG, architecture) > 0


def test_an_attention_that_the_model_has_not_is_one_sentence() -> None:
    with pytest.raises(Refusal, match="attn_implementation: expected one that works here, got sdp"):
        trace.trace(GEMMA2, CONFIG, ALONE, TOKENS, TOKENS)
    eager = replace(CONFIG, attn_implementation="eager")
    flash = replace(CONFIG, attn_implementation="flash_attention_2", share_prompts=False)
    by_eager, by_flash = (
        trace.trace(GEMMA2, each, ALONE, TOKENS, TOKENS).kept for each in (eager, flash)
    )
    assert by_eager == really_kept(eager, GEMMA2) > by_flash > 0


def own_bytes(rows: int, cuda: bool, asked: bool, dtype: torch.dtype, in_place: bool) -> float:
    """What a backward pass of the head takes for itself; its weight is (40000, 16)."""
    op = torch.ops.agro.linear_logprobs_bwd.default
    given = {
        "hidden": torch.empty(rows, 16, dtype=dtype, device="meta"),
        "weight": torch.empty(40_000, 16, dtype=dtype, device="meta"),
        "output_mask": [True, asked, False],
    }
    args = [given.get(argument.name) for argument in op._schema.arguments]
    machine = Machine(gpus=1, gpu="h100" if cuda else "cpu")
    return trace.head_buffers(op, args, machine, in_place=in_place)


@pytest.mark.parametrize(("threads", "sums"), [(1, 1), (4, 4), (64, 4)])
def test_at_most_four_sums_of_dhidden_on_a_cpu(
    threads: int, sums: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    hidden = 4 * 300 * 16
    frozen = own_bytes(300, cuda=False, asked=False, dtype=torch.float32, in_place=False)
    assert frozen == hidden * (1 + sums)
    for asked, in_place in ((True, False), (False, True)):
        trained = own_bytes(300, cuda=False, asked=asked, dtype=torch.float32, in_place=in_place)
        assert trained == hidden * (2 + sums)


def test_one_chunk_of_tokens_needs_no_float32_gradient_of_the_weight_on_a_gpu() -> None:
    low = torch.bfloat16

    def of_weight(rows: int, dtype: torch.dtype) -> float:
        asked, frozen = (own_bytes(rows, True, each, dtype, False) for each in (True, False))
        return asked - frozen

    assert of_weight(32_768, low) == 0
    columns = 528 * 2**20 // (32_768 * 2)
    assert of_weight(32_769, low) == 4 * columns * 16
    assert of_weight(32_769, torch.float32) == 0
    assert own_bytes(32_769, True, False, low, True) == own_bytes(32_769, True, False, low, False)


def test_a_gpus_head_holds_logits_a_float32_gradient_and_a_copy_of_the_hidden_states() -> None:
    logits, hidden = 300 * 33_792, 300 * 16
    assert own_bytes(300, True, True, torch.bfloat16, False) == 2 * logits + 4 * hidden + 2 * hidden
    assert own_bytes(300, True, True, torch.float32, False) == 4 * logits + 4 * hidden


def test_many_layers_are_what_two_and_three_of_them_say() -> None:
    more = {**SIZES, "num_hidden_layers": 5}
    deep = LlamaConfig(intermediate_size=48, num_key_value_heads=2, **more, vocab_size=40)
    resolved = replace(CONFIG, attn_implementation="sdpa")
    whole = trace._traced(deep, resolved, ALONE, TOKENS, TOKENS)
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


def test_flex_attention_keeps_no_mask_and_whole_blocks() -> None:
    flex = replace(CONFIG, attn_implementation="flex_attention")

    def kept(tokens: int) -> float:
        return trace.trace(ARCHITECTURE, flex, ALONE, tokens, 48).kept

    two, three, four = (kept(blocks * 128) for blocks in (2, 3, 4))
    assert four - 2 * three + two == 0, "in proportion to the tokens"
    assert kept(48) == two and kept(300) == three
