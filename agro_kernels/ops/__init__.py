"""The ops of the namespace `agro`, registered when this is imported: one file a family of ops.

Schemas, shapes and gradients are here; `dispatch.py` says who serves which device.
"""

from agro_kernels.ops import (
    agro_loss,
    divergences,
    linear_logprobs,
    linear_topk,
    many_logprobs,
    selective_logprobs,
    smoothed_logprobs,
)

__all__ = [
    "agro_loss",
    "divergences",
    "linear_logprobs",
    "linear_topk",
    "many_logprobs",
    "selective_logprobs",
    "smoothed_logprobs",
]
