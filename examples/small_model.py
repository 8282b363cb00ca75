"""The Llama with random weights that the plain loops train. Yours stands in its place:
`AutoModelForCausalLM.from_pretrained(...)`.
"""

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM


def llama(vocab_size: int, hidden_size: int = 64, **options: Any) -> LlamaForCausalLM:
    """Two layers of four heads. options: of LlamaConfig."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        **options,
    )
    return LlamaForCausalLM(config)
