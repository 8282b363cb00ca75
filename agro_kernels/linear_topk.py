"""The likeliest tokens straight from hidden states, without storing the (N, V) logits."""

import numbers
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

import agro_kernels.ops  # noqa: F401  (registers the ops)
from agro_kernels.arguments import check_matrices
from agro_kernels.head import Head, LogitOptions, check_names


class TopLogprobs(NamedTuple):
    """The k likeliest tokens, likeliest first."""

    logprobs: Tensor
    """(..., k) fp32 (float64 for float64), nats. -inf where fewer than k have a probability."""
    ids: Tensor
    """(..., k) int64; -1 where fewer than k have a probability."""
    lse: Tensor
    """(...) fp32: the logsumexp over the whole vocabulary of the final logits."""


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    **options: Unpack[LogitOptions],
) -> TopLogprobs:
    """The k largest log-probabilities under softmax(hidden @ weight.T / temperature), and whose.

    Same result as

        logits = (hidden @ weight.T + bias).float() / temperature
        logits.log_softmax(-1).topk(k)

    with the logits in fp32 and never stored as a whole: each tile's largest are merged with those
    before it. Blocked plain torch on every device, in fp32: on a CPU it takes about twice the time
    of linear_logprobs' forward pass for fp32 inputs, four to five times that for bf16 ones. With
    k=1 the ids are the argmax, so `(ids.squeeze(-1) == targets).float().mean()` is the token
    accuracy. Among equal logits any may come first.

    Args:
        k: from 1 to V.
        hidden, weight and the options, bias, temperature, softcap, round_logits and kept_ids: as
            linear_logprobs; with kept_ids the k largest of those that are kept.

    There is no gradient: for one, pass the ids to linear_logprobs (..., K).
    """
    check_names("linear_topk", options, LogitOptions)
    check_matrices(hidden, weight)
    vocabulary = weight.shape[0]
    if isinstance(k, bool) or not isinstance(k, numbers.Integral):
        raise TypeError(
            f"k: expected an int, got {type(k).__name__}; 1 is the likeliest token alone"
        )
    if not 1 <= k <= vocabulary:
        raise ValueError(
            f"k: expected an int from 1 to the vocabulary's {vocabulary}, got {k}; 1 is the "
            "likeliest token alone"
        )
    tokens = hidden.shape[:-1]
    with torch.no_grad():
        head = Head.of(
            hidden.detach(),
            weight.detach(),
            torch.zeros(tokens, dtype=torch.int64, device=hidden.device),
            **options,
        )
        logprobs, ids, lse = torch.ops.agro.linear_topk(*head, int(k))
    return TopLogprobs(logprobs.view(*tokens, k), ids.view(*tokens, k), lse.view(tokens))
