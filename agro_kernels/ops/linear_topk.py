"""The largest log-probabilities of each token: schema and shapes. There is no gradient."""

import torch
from torch import Tensor

from agro_kernels._torch import linear_topk as torch_linear_topk
from agro_kernels.arguments import results_dtype
from agro_kernels.head import HEAD_SCHEMA, Head
from agro_kernels.ops.dispatch import library, serve_everywhere, with_numbers

library.define(f"linear_topk({HEAD_SCHEMA}, SymInt k) -> (Tensor logprobs, Tensor ids, Tensor lse)")


def _linear_topk_fake(head: Head, k: int) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = head.hidden.shape[0], results_dtype(head.hidden)
    return (
        head.hidden.new_empty((n, k), dtype=dtype),
        head.hidden.new_empty((n, k), dtype=torch.int64),
        head.hidden.new_empty(n, dtype=dtype),
    )


serve_everywhere("linear_topk", with_numbers(torch_linear_topk.linear_topk), _linear_topk_fake)
