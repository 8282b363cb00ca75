"""A tiny random model of every architecture that patch_model knows."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 71
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
# Caps low enough to bend the logits of random weights: as shipped, 30 would not show.
CAPPED = {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 4}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 14,
    "patch_size": 7,
}


def settings(family: str, tied: bool) -> dict[str, Any]:
    text = {**TEXT, **(CAPPED if family.startswith("gemma") else {}), "tie_word_embeddings": tied}
    if family != "gemma3":
        return text
    return {
        "text_config": text,
        "vision_config": VISION,
        "mm_tokens_per_image": 1,
        "image_token_id": 70,
        "tie_word_embeddings": tied,
    }


def build(family: str, tied: bool, seed: int = 0) -> PreTrainedModel:
    """fp32, eval mode, without dropout, weights spread out so that probabilities differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **settings(family, tied))
        )
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def token_batch(batch: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids, right-padded by a token each row more, and which of them are completions."""
    ids = torch.randint(3, 70, (batch, length))
    positions = torch.arange(length)
    lengths = length - torch.arange(batch)
    return ids, (positions >= 3) & (positions < lengths[:, None])
