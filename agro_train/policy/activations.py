"""What a forward pass keeps for its backward: the MLPs' products are computed again instead.

A gated MLP, down(act(gate(x)) * up(x)), keeps four tensors of its inner width for each token: the
outputs of gate and up, the activation, and the product, which is down's input. The last two follow
from the first two in a few operations an element, without a matrix product, so they are not kept.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# transformers' MLPs whose forward is exactly down(act(gate(x)) * up(x)).
GATED = ("GemmaMLP", "Gemma2MLP", "Gemma3MLP", "LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP",
         "SmolLM3MLP")  # fmt: skip


def recompute_mlp_products(model: PreTrainedModel) -> int:
    """Changes the model's gated MLPs in place, and nothing about their results; returns how many.

    MLPs of another form stay as they are.
    """
    found = [module for module in model.modules() if type(module).__name__ in GATED]
    for module in found:
        module.forward = MethodType(_gated_mlp, module)
    return len(found)


def _gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    def down(gate: Tensor, up: Tensor) -> Tensor:
        product: Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
        return product

    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if not torch.is_grad_enabled():
        return down(gate, up)
    # In the backward torch stops as soon as down's input is there again: the product with its
    # weight is not made a second time.
    result: Tensor = checkpoint(down, gate, up, use_reentrant=False, preserve_rng_state=False)
    return result
