"""Many targets a token: what their gradient is, for kernels that know of one target a token.

With g_k the gradient of the log-probability of id k, one lse serves all K of a token:

    dz_v = sum_k g_k 1[v = id_k] + (dlse - sum_k g_k) p_v + the entropy's share

So the kernels are given dlse - sum_k g_k, and no target. The entries of a row whose v is one of its
ids are `KnownEntries`, made here in fp32, one number an id; a kernel writes them over its own
numbers before it rounds anything.

Letters: N tokens, K targets of each, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from agro_kernels.arguments import ROWS_STAY, check_target_values
from agro_kernels.head import Head, Upstream

NO_ID = -1
# The log-probability of a banned token where it is multiplied by its probability: 0 * -inf is NaN.
NOTHING = -1000.0


class KnownEntries(NamedTuple):
    """Some entries of the gradient of hidden @ weight.T + bias."""

    ids: Tensor
    """(N, K) int64: columns of the vocabulary, at most once a row each; NO_ID is none."""
    values: Tensor
    """(N, K) fp32 (float64 of float64)."""

    def each(self, function: Callable[[Tensor], Tensor]) -> "KnownEntries":
        """With a function of both tensors."""
        return KnownEntries(function(self.ids), function(self.values))

    def of_rows(self, rows: slice) -> "KnownEntries":
        """Some of the N tokens, without a copy."""
        return KnownEntries(self.ids[rows], self.values[rows])


class ManyTargets(NamedTuple):
    """What a forward pass made of K targets a token, (N, K) each."""

    ids: Tensor
    """int32 or int64: ids in [0, V), or the head's ignore_index."""
    logits: Tensor
    """After softcap and temperature, fp32. Of an id that a sampler did not keep, too."""
    logprobs: Tensor
    """-inf of an id that is banned or not kept; NaN of one outside the vocabulary; 0.0 ignored."""


def of_tokens(head: Head, ids: Tensor, vocabulary: int | None = None) -> Head:
    """The head with one target a token: ignored where all K are, and an id of the vocabulary else.

    The target says which rows count and nothing more. Where an id is outside the vocabulary, so is
    the target: a GPU's kernels make such a row NaN. vocabulary: where the head has a part of it.
    """
    counted = ids != head.ignore_index
    v = head.weight.shape[0] if vocabulary is None else vocabulary
    outside = (((ids < 0) | (ids >= v)) & counted).any(1)
    targets = outside.to(torch.int64) * v
    ignored = NO_ID if head.compact else ROWS_STAY
    return head._replace(targets=targets.where(counted.any(1), ignored), ignore_index=ignored)


def check_ids(head: Head, ids: Tensor) -> None:
    """Of the values, on the CPU only."""
    check_target_values(ids, head.weight.shape[0], head.ignore_index)


def upstream_and_entries(
    head: Head,
    many: ManyTargets,
    dlogprobs: Tensor | None,
    upstream: Upstream,
) -> tuple[Upstream, KnownEntries | None]:
    """The gradients that the kernels are given for dlogprobs (N, K), and the entries beside them.

    upstream: those of lse and entropy, and what both are. head: as the caller gave it.
    """
    if dlogprobs is None:
        return upstream, None
    gradients = dlogprobs.where(many.ids != head.ignore_index, 0.0)
    upstream = upstream._replace(dlse=dlse_of_many(gradients, upstream.dlse))
    return upstream, known_entries(head, many, gradients, upstream)


def dlse_of_many(gradients: Tensor, dlse: Tensor | None) -> Tensor:
    """(N,): that of lse where each of K log-probabilities is a logit less lse."""
    total = gradients.sum(1)
    return -total if dlse is None else dlse - total


def known_entries(
    head: Head, many: ManyTargets, gradients: Tensor, upstream: Upstream
) -> KnownEntries:
    """Those of gradients (N, K), 0 where ignored, with the upstream that the kernels are given."""
    within = (many.ids >= 0) & (many.ids < head.weight.shape[0])
    within &= many.ids != head.ignore_index
    ids, order = many.ids.long().where(within, NO_ID).sort(1)
    gradients = _sums_of_equals(ids, gradients.gather(1, order))
    first = ids != NO_ID
    first[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    logits, log_p = many.logits.gather(1, order), many.logprobs.gather(1, order)
    # g (1 - p) - (the other ids' gradients) p, with 1 - p from expm1: subtracting a p near 1 would
    # lose its digits.
    values = gradients * -log_p.expm1()
    assert upstream.dlse is not None
    of_p = upstream.dlse.unsqueeze(1) + gradients
    log_p = log_p.clamp(min=NOTHING)
    if upstream.dentropy is not None and upstream.entropy is not None:
        of_p = of_p - upstream.dentropy.unsqueeze(1) * (log_p + upstream.entropy.unsqueeze(1))
    values = (values + of_p * log_p.exp()) * _slopes(head, logits)
    return KnownEntries(ids.where(first, NO_ID), values.where(first, 0.0))


def _sums_of_equals(ids: Tensor, values: Tensor) -> Tensor:
    """values (N, K) of sorted ids (N, K): at the first of equal ids their sum.

    By doubling, so in the same order each time, which a GPU's scatter_add is not.
    """
    step, k = 1, ids.shape[1]
    while step < k:
        added = values[:, step:].where(ids[:, step:] == ids[:, :-step], 0.0)
        values = torch.cat([values[:, :-step] + added, values[:, -step:]], 1)
        step *= 2
    return values


def _slopes(head: Head, logits: Tensor) -> Tensor:
    """dz/dx of the product x that the logits z (N, K), after softcap and temperature, are of."""
    temperatures = head.token_temperature
    t: float | Tensor = head.temperature
    if temperatures is not None:
        t = temperatures.to(logits.dtype)
        t = t.unsqueeze(1) if t.dim() > 0 else t
    if head.softcap == 0.0:
        return torch.ones_like(logits) / t
    capped = logits * t / head.softcap
    return (1.0 - capped) * (1.0 + capped) / t
