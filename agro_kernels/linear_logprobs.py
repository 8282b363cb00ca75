"""Per-token log-probabilities straight from hidden states, without storing the (N, V) logits.

From here: `reference.py` says what is computed, `ops` says who computes it on which device.
"""

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

import agro_kernels.ops  # noqa: F401  (registers the ops)
from agro_kernels.arguments import (
    check_target_dtype,
    check_tensor,
    checked_ignore_index,
    checked_keep_logits_bytes,
    has_many_targets,
)
from agro_kernels.head import IGNORE_INDEX, Asked, Head, HeadOptions, Shards, check_names, rows_stay
from agro_kernels.ops.derivatives import refuse_forward_mode
from agro_kernels.ops.weight_grad import AccumulatingLogprobs, refuse_under_compile

# The least that `tail_probability` gives: half the distance of fp32 numbers below 1.
SMALLEST_TAIL = 2.0**-24


class LogprobsWithEntropy(NamedTuple):
    """Both (...) fp32, nats; the logprobs of K targets a token (..., K)."""

    logprobs: Tensor
    entropy: Tensor


class LogprobStats(NamedTuple):
    """All (...) fp32, nats; the logprobs of K targets a token (..., K)."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    round_logits: str | None = None,
    kept_ids: Tensor | None = None,
    weight_grad: Tensor | None = None,
    keep_logits_bytes: int | str = 0,
    compact: bool = True,
    shards: Shards | None = None,
) -> Tensor:
    """Log-probability of each target token under softmax(hidden @ weight.T / temperature).

    Same result as

        logits = (hidden @ weight.T + bias).float()
        logits = softcap * torch.tanh(logits / softcap)      # if softcap
        logprobs_all = (logits / temperature).log_softmax(-1)
        logprobs_all.gather(-1, targets[..., None]).squeeze(-1)

    with the logits kept in fp32 throughout, never rounded, and never stored as a whole.

    Args:
        hidden: (..., D) bf16, fp16, fp32 or float64. hidden[i] must be the state that predicts
            targets[i]: the shift by one position is the caller's.
        weight: (V, D) lm_head weight, same dtype and device as hidden. Under torch.autocast both
            are cast to its dtype, as by F.linear.
        targets: (...) int32 or int64 in [0, V), or ignore_index. Any other value is a ValueError on
            the CPU; on a GPU, where looking would stall the device, its logprob is NaN.
            Or (..., K), K ids a token from the same pass over the vocabulary: a teacher's top k.
            They may repeat; where all K are ignore_index the token does not count. They cost
            2 N K D operations beside the 2 N D V of one target.
        bias: (V,) added to the logits, same dtype as hidden. -inf bans a token (with a softcap it
            makes its logit -softcap).
        temperature: float, or a tensor (...), one a token; > 0. It must be the sampler's,
            otherwise the log-ratio to the sampling policy is biased. No gradient flows to it.
        softcap: cap of the logits before the temperature (Gemma 2's final_logit_softcapping).
        ignore_index: targets that do not count; the hidden states of these rows are never read.
        round_logits: "bf16" or "fp16" rounds hidden @ weight.T + bias to that dtype, before softcap
            and temperature: the log-probs of an inference engine that keeps its logits in it. The
            gradient goes straight through. None, the default, never rounds.
        kept_ids: (..., K) int32 or int64, the ids that a top-k or top-p sampler kept for each
            token; -1 is padding. The distribution is renormalised over them. A row of padding keeps
            all; a target outside its set has logprob -inf. Costs V / 8 bytes a token.
        weight_grad: (V, D) fp32 (float64 of float64). The weight's gradient is added to it in the
            backward pass, the sum never rounded below fp32, and weight.grad is left alone:
            Megatron's main_grad. (Of bf16 and fp16 inputs the gradient of each logit is rounded to
            their dtype before the products.) Not inside torch.compile.
        keep_logits_bytes: how much memory the forward pass may fill with logits for the backward
            pass, which makes the others again: of four products of 2 N D V one is saved, as far as
            the bytes reach. N V numbers are all there is to keep, of 2 bytes for bf16 and fp16
            inputs, of 4 for fp32, and 2 to 3 % more. 0, the default, keeps none. "auto" is
            4 D min(V, 32768) bytes on a GPU, as many as an fp32 gradient of so many rows of the
            weight, and at most 1 GiB on a CPU.
            The results are bitwise the same, the gradients nearly: of bf16 and fp16 inputs z - m is
            kept in fp16, z a logit and m the largest of its row so far. Between -16 and -8 it is
            rounded by up to 0.004, so the probability is off by up to 0.4 %; closer to 0 by less.
            Gradients in bf16 are rounded as much in any case. Those of fp16 inputs, and of bf16
            inputs with an fp32 weight_grad, are more exact without.
            Nothing is kept where no gradient is asked for, of float64 inputs, and with round_logits
            or kept_ids; on a GPU also not of fp32 inputs, with a softcap and of less than 256
            entries, on a Hopper (sm90) of hidden sizes below 2048 and of vocabularies that 256 does
            not divide, and on a B200 (sm100): those kernels would spill registers. With shards, the
            bytes are those of each rank.
        compact: rows that do not count (ignored targets; in the backward pass also those whose
            gradients are 0) are left out of the products. How many are left only the GPU knows, so
            each pass waits for it once. False leaves none out, and nothing waits: the same
            results and gradients, but for the rounding of sums over other numbers of rows. For
            batches in which all rows count, or nearly all. On a CPU it makes no difference.
        shards: where the rows of weight are spread over ranks (tensor parallelism):
            VocabularyShards.of(weight, group), and weight, bias and weight_grad are this rank's
            part. All ranks call together; `agro_kernels.parallel` says the rest.

    Returns:
        logprobs: of the shape of targets, fp32 (float64 for float64), nats. Exactly 0.0, with
        exactly zero gradient, where targets == ignore_index; -inf where the target is banned.

    Gradients flow to hidden, weight and bias, once (no second derivative); what does not require a
    gradient costs nothing in the backward pass. All sums over D and V are accumulated in fp32.
    """
    logprobs, _, _ = _results(
        hidden,
        weight,
        targets,
        with_entropy=False,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        round_logits=round_logits,
        kept_ids=kept_ids,
        weight_grad=weight_grad,
        keep_logits_bytes=keep_logits_bytes,
        compact=compact,
        shards=shards,
    )
    return logprobs


def linear_logprobs_with_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Unpack[HeadOptions]
) -> LogprobsWithEntropy:
    """`linear_logprobs` and the entropy -sum_v p_v log p_v of each distribution, from one pass.

    Args: as linear_logprobs. Both results are differentiable; ignored rows have entropy 0.0.
    """
    check_names("linear_logprobs_with_entropy", options)
    logprobs, _, entropy = _results(hidden, weight, targets, with_entropy=True, **options)
    return LogprobsWithEntropy(logprobs, entropy)


def linear_logprobs_with_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Unpack[HeadOptions]
) -> LogprobStats:
    """`linear_logprobs` with entropy and lse, for callers that keep lse for `weighted_logprob_sum`.

    Args: as linear_logprobs. All results are differentiable; lse is the logsumexp over the
    vocabulary of the final logits (capped, divided by the temperature); ignored rows have 0.0.
    """
    check_names("linear_logprobs_with_stats", options)
    logprobs, lse, entropy = _results(hidden, weight, targets, with_entropy=True, **options)
    return LogprobStats(logprobs, entropy, lse)


def tail_probability(
    logprobs: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """What is left for the rest of the vocabulary: 1 - sum p over each token's different targets.

    Args:
        logprobs: (..., K), what `linear_logprobs` made of targets (..., K).
        targets: (..., K) ids, repeated or not, or ignore_index.

    Returns:
        (...) of the dtype of logprobs, differentiable in them. 1.0 where no target counts. At least
        2^-24, with no gradient there, so that it has a logarithm: the digits of a smaller one are
        lost in the sum.
    """
    check_tensor("logprobs", logprobs)
    check_tensor("targets", targets)
    check_target_dtype(targets)
    ignore_index = checked_ignore_index(ignore_index)
    if logprobs.dim() == 0 or logprobs.shape != targets.shape:
        raise ValueError(
            f"logprobs: expected shape (..., K) as targets {tuple(targets.shape)}, got "
            f"{tuple(logprobs.shape)}; pass what linear_logprobs made of them"
        )
    ids, order = targets.sort(-1)
    once = ids != ignore_index
    once[..., 1:] &= ids[..., 1:] != ids[..., :-1]
    p = logprobs.gather(-1, order).where(once, -torch.inf).exp()
    return (1.0 - p.sum(-1)).clamp_min(SMALLEST_TAIL)


def _results(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    with_entropy: bool,
    **options: Unpack[HeadOptions],
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy): the first of the shape of targets, the others one number a token.

    Entropy if asked for.
    """
    if not has_many_targets(hidden, targets):
        head = Head.of(hidden, weight, targets, **options)
        logprobs, lse, entropy = flat_results(head, options, with_entropy=with_entropy)
    elif targets.shape[-1] == 1:
        head = Head.of(hidden, weight, targets.squeeze(-1), **options)
        logprobs, lse, entropy = flat_results(head, options, with_entropy=with_entropy)
    else:
        # The first id of each token stands for all: the checks are the same.
        head = Head.of(hidden, weight, targets[..., 0], **options)
        ids = targets.reshape(-1, targets.shape[-1])
        if not head.compact:
            ids = rows_stay(ids, options.get("ignore_index", IGNORE_INDEX))
        logprobs, lse, entropy = flat_results(head, options, with_entropy=with_entropy, ids=ids)
    tokens = hidden.shape[:-1]
    entropy = entropy.view(tokens) if with_entropy else entropy
    return logprobs.view(targets.shape), lse.view(tokens), entropy


def flat_results(
    head: Head,
    options: HeadOptions,
    *,
    with_entropy: bool = False,
    lse: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), (N,) each; `Asked` says what with_entropy, lse and ids change.

    options: those that `head` was made of.
    """
    weight_grad, shards = options.get("weight_grad"), options.get("shards")
    refuse_forward_mode("linear_logprobs", hidden=head.hidden, weight=head.weight, bias=head.bias)
    keep = 0
    if torch.is_grad_enabled() and head.requires_grad():
        keep = checked_keep_logits_bytes(options.get("keep_logits_bytes", 0))
    if shards is not None:
        return shards.results(head, Asked(with_entropy, lse, weight_grad, keep, ids))
    if weight_grad is not None:
        refuse_under_compile()
        asked = Asked(with_entropy, lse, weight_grad, keep, ids)
        results = AccumulatingLogprobs.apply(*asked, *head)
    elif ids is not None:
        results = torch.ops.agro.many_logprobs_fwd(*head, ids, with_entropy, keep)[:3]
    elif lse is None:
        results = torch.ops.agro.linear_logprobs_fwd(*head, with_entropy, keep)[:3]
    else:
        logprobs = torch.ops.agro.target_logprobs(*head, lse)
        results = logprobs, lse, logprobs.new_empty(0)
    logprobs, lse, entropy = results
    return logprobs, lse, entropy
