"""The head ops where every rank holds some rows of the lm_head: vocabulary (tensor) parallelism.

    shards = VocabularyShards.of(weight, group)            # once; one small gather
    logprobs = linear_logprobs(hidden, weight, targets, shards=shards)

All ranks of the group must call it together, with the same tokens and options. Upstream gradients
must be the same on every rank too. Not inside torch.compile.

    hidden    (..., D), the same on every rank, as targets, temperature, kept_ids, coefficients and
              lse are. After sequence parallelism, gather it first.
    weight    (V_r, D), this rank's rows, a plain tensor. Rows that only pad the vocabulary must not
              be in it: pass weight[:valid], and its size to VocabularyShards. bias (V_r,) and
              weight_grad (V_r, D) are this rank's part too.
    targets   (...) ids of the whole vocabulary, [0, V), or ignore_index. kept_ids likewise, and lse
              is over the whole vocabulary.

The results are bitwise the same on every rank. The gradient of hidden is complete on every rank:
each rank's share is rounded to hidden's dtype once, and the shares are summed in fp32. Those of the
weight and the bias stay where their rows are.

Forward: each rank runs the op on its own rows of the weight; one all-gather of two or three floats
a token brings lse_r, logprob_r and entropy_r together, and every rank merges them in rank order, so
that all hold the same bits. With lse the logsumexp over ranks and w_r = exp(lse_r - lse),

    logprob = logprob_r + log w_r    of the rank r that holds the target
    entropy = sum_r w_r (entropy_r - log w_r)

Of many targets a token a second all-gather brings the K log-probabilities together.

Backward: the op's own backward on the shard, with the global lse and entropy, and one all-reduce of
the gradient of hidden.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from agro_kernels.arguments import FLOATING, ROWS_STAY, check_target_values, check_tensor
from agro_kernels.head import Asked, Head, Upstream, pack_kept_ids
from agro_kernels.linear_logprobs import linear_logprobs as _linear_logprobs
from agro_kernels.linear_logprobs import (
    linear_logprobs_with_entropy as _linear_logprobs_with_entropy,
)
from agro_kernels.linear_logprobs import linear_logprobs_with_stats as _linear_logprobs_with_stats
from agro_kernels.many_targets import (
    NO_ID,
    ManyTargets,
    dlse_of_many,
    known_entries,
    of_tokens,
)
from agro_kernels.ops.derivatives import differentiable_once
from agro_kernels.ops.linear_logprobs import (
    input_gradients,
    of_entropy,
    save_head,
    saved_head,
    saved_many,
)
from agro_kernels.ops.many_logprobs import target_logprobs_of
from agro_kernels.weighted_logprobs import weighted_logprob_sum as _weighted_logprob_sum

R = TypeVar("R")

# The ignore_index of a shard, unless its rows stay. The caller's may be any number, that of a row
# of the shard too.
_IGNORED = -1
_ASKED = len(Asked._fields)
# The maximum of no logits. Finite, because -inf - -inf is NaN.
_LOWEST_MAX = -1e30


@dataclass(frozen=True)
class VocabularyShards:
    """How many rows of the lm_head each rank holds: V_r rows of V, in rank order, of any sizes."""

    sizes: tuple[int, ...]
    """V_r of every rank of the group, each at least 1; rank r holds the ids after those before."""
    rank: int
    """This process's rank in the group."""
    group: dist.ProcessGroup | None = None
    """None is the default group."""

    @staticmethod
    def of(weight: Tensor, group: dist.ProcessGroup | None = None) -> "VocabularyShards":
        """Ask every rank for its size: one gather of three numbers. All ranks of group must call.

        weight: (V_r, D), this rank's rows. Shards that do not fit together are an error on every
        rank. Where the sizes are known, VocabularyShards(sizes, rank, group) does without.
        """
        _refuse_dtensor(weight=weight)
        check_tensor("weight", weight)
        if not dist.is_initialized():
            raise ValueError(
                "group: expected a process group, got none; call "
                "torch.distributed.init_process_group first"
            )
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(
                "group: expected a group that this process belongs to, got one without it; "
                "call on the group's own ranks only"
            )
        # Sent, not raised: a rank that raised here would leave the others waiting.
        dtype = FLOATING.index(weight.dtype) if weight.dtype in FLOATING else -1
        v, d = weight.shape if weight.dim() == 2 else (0, 0)
        mine = torch.tensor([v, d, dtype], device=weight.device)
        gathered = mine.new_empty(dist.get_world_size(group), 3)
        dist.all_gather(list(gathered.unbind()), mine, group=group)
        sizes, widths, dtypes = (tuple(column) for column in gathered.T.tolist())
        if min(sizes) == 0:
            raise ValueError(
                f"weight: expected shape (V_r, D) with V_r > 0 on every rank, got V_r = {sizes} on "
                "ranks 0, 1, ...; give each rank some rows of lm_head.weight, or use fewer ranks"
            )
        if len(set(widths)) > 1:
            raise ValueError(
                f"weight: expected the same D on every rank, got {widths} on ranks 0, 1, ...; "
                "shard lm_head.weight by rows, not by columns"
            )
        if len(set(dtypes)) > 1 or min(dtypes) < 0:
            names = tuple(str(FLOATING[i]) if i >= 0 else "no float dtype" for i in dtypes)
            raise TypeError(
                f"weight: expected the same float dtype on every rank, got {', '.join(names)} on "
                "ranks 0, 1, ...; cast before sharding"
            )
        return VocabularyShards(sizes, rank, group)

    @property
    def vocabulary(self) -> int:
        """V."""
        return sum(self.sizes)

    @property
    def start(self) -> int:
        """The first id of this rank."""
        return sum(self.sizes[: self.rank])

    def of_rank(self, targets: Tensor, rank: int) -> Tensor:
        """(N,) bool: whether a target is one of that rank's rows."""
        start = sum(self.sizes[:rank])
        return (targets >= start) & (targets < start + self.sizes[rank])

    def kept_bits(self, ids: Tensor) -> Tensor:
        """(N, K) ids of the whole vocabulary -> (N, ceil(V_r / 32)) bits of this rank's rows."""
        if ids.device.type == "cpu" and bool((ids >= self.vocabulary).any()):
            raise ValueError(
                f"kept_ids: expected ids below {self.vocabulary}, got {int(ids.max())}; pad with -1"
            )
        here = self.of_rank(ids, self.rank)
        local_ids = (ids - self.start).where(here, -1)
        bits = pack_kept_ids(local_ids, self.sizes[self.rank])
        # To the op a row without ids keeps everything. Here its ids may all be on other ranks.
        only_elsewhere = (ids >= 0).any(1) & ~here.any(1)
        return bits.masked_fill(only_elsewhere.unsqueeze(1), 0)

    def check_call(self, **tensors: Tensor | None) -> None:
        """What a call with shards= needs, and what the checks of a single device do not see."""
        if torch.compiler.is_compiling():
            raise ValueError(
                "shards: expected a call outside torch.compile, got one inside; its collectives "
                "are not traced: leave this call out with torch.compiler.disable"
            )
        _refuse_dtensor(**tensors)

    def check_shard(self, weight: Tensor, targets: Tensor, ignore_index: int) -> None:
        """This rank's rows (V_r, D) against their number, and the targets against all of V."""
        if weight.shape[0] != self.sizes[self.rank]:
            raise ValueError(
                f"weight: expected {self.sizes[self.rank]} rows, as shards.sizes says of rank "
                f"{self.rank}, got {weight.shape[0]}; use VocabularyShards.of(weight)"
            )
        check_target_values(targets, self.vocabulary, ignore_index)

    def results(self, head: Head, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
        """(logprobs, lse, entropy) over the whole vocabulary, (N,) each; entropy may be (0,).

        head: this rank's weight, bias and kept, and targets of the whole vocabulary, of which lse
        and ids of `asked` are, too.
        """
        if asked.ids is not None:
            check_target_values(asked.ids, self.vocabulary, head.ignore_index)
        results: tuple[Tensor, Tensor, Tensor] = _ShardedLogprobs.apply(self, *asked, *head)
        return results


def _refuse_dtensor(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{name}: expected this rank's plain tensor, got a DTensor; pass {name}.to_local()"
            )


# --- One pass -------------------------------------------------------------------------------------


class _ShardedLogprobs(torch.autograd.Function):
    """`VocabularyShards.results`; apply takes the records' fields, as it sees no tensor inside."""

    @staticmethod
    def forward(ctx: Any, shards: VocabularyShards, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        with_entropy, lse, weight_grad, keep_logits_bytes, ids = Asked(*flat[:_ASKED])
        head = Head(*flat[_ASKED:])
        kept: tuple[Tensor, ...] = ()
        many = None
        if ids is not None:
            tokens = of_tokens(head, ids, shards.vocabulary)
            *local, kept_logits, kept_maxima = torch.ops.agro.linear_logprobs_fwd(
                *_local(tokens, shards, 0), with_entropy, keep_logits_bytes
            )
            kept = kept_logits, kept_maxima
            _, lse, entropy = _merge(tokens, shards, local, with_entropy)
            local_ids = _local_ids(head, ids, shards)
            logits, mine = target_logprobs_of(head._replace(ignore_index=NO_ID), local_ids, lse)
            logprobs = _pick_many(head, ids, shards, _gather(shards, *mine.unbind(1)))
            many = ManyTargets(ids, logits, logprobs)
        elif lse is None:
            # Where another rank holds the target, row 0 stands for it; _merge drops its logprob.
            *local, kept_logits, kept_maxima = torch.ops.agro.linear_logprobs_fwd(
                *_local(head, shards, 0), with_entropy, keep_logits_bytes
            )
            kept = kept_logits, kept_maxima
            logprobs, lse, entropy = _merge(head, shards, local, with_entropy)
        else:
            with_entropy = False
            mine = torch.ops.agro.target_logprobs(*_local(head, shards, None), lse)
            logprobs = _pick(head, shards, _gather(shards, mine))
            # Autograd marks the results as differentiable; the caller's own tensor must stay as is.
            lse = lse.clone()
            entropy = lse.new_empty(0)
        save_head(ctx, head, lse, entropy, with_entropy, *kept, many=many)
        ctx.many = many is not None
        ctx.shards, ctx.weight_grad = shards, weight_grad
        return logprobs, lse, entropy

    @staticmethod
    @differentiable_once("linear_logprobs")
    def backward(ctx: Any, *of_results: Tensor | None) -> tuple[Tensor | None, ...]:
        dlogprobs, dlse, dentropy = of_results
        head, lse, entropy, *kept = saved_head(ctx)
        shards: VocabularyShards = ctx.shards
        dentropy = of_entropy(ctx, dentropy)
        known: tuple[Tensor, ...] = ()
        if ctx.many:
            many = saved_many(ctx)
            tokens = of_tokens(head, many.ids, shards.vocabulary)
            if dlogprobs is not None:
                gradients = dlogprobs.where(many.ids != head.ignore_index, 0.0)
                dlse = dlse_of_many(gradients, dlse)
                dlse = dlse.where(tokens.targets < shards.vocabulary, torch.nan)
                many = many._replace(ids=_local_ids(head, many.ids, shards))
                upstream = Upstream(
                    None, dlse, dentropy, lse, None if dentropy is None else entropy
                )
                local_head = head._replace(ignore_index=NO_ID)
                known = known_entries(local_head, many, gradients, upstream)
            head, dlogprobs = tokens, None
        elif dlogprobs is not None:
            # logprob = target logit - lse. On ranks without the target's row, only lse depends on
            # the rank's rows.
            held = shards.of_rank(head.targets, shards.rank) & head.counted()
            of_lse = -dlogprobs if dlse is None else dlse - dlogprobs
            dlse = of_lse.where(~held, 0.0 if dlse is None else dlse)
            in_vocabulary = (head.targets >= 0) & (head.targets < shards.vocabulary)
            dlse = dlse.where(in_vocabulary | ~head.counted(), torch.nan)
            dlogprobs = dlogprobs.where(held, 0.0)
        need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad[1 + _ASKED :]
        asked = [need_hidden, need_weight, need_bias]
        of_rank = _local(head, shards, 0)
        arguments = (dlogprobs, dlse, dentropy, *of_rank, lse, entropy, asked, *kept)
        if ctx.weight_grad is None:
            results = torch.ops.agro.linear_logprobs_bwd(*arguments, *known)
        else:
            results = torch.ops.agro.linear_logprobs_bwd_accumulate(
                *arguments, ctx.weight_grad, *known
            )
        dhidden, dweight, dbias = results
        if need_hidden:
            total = dhidden.to(torch.promote_types(dhidden.dtype, torch.float32))
            dist.all_reduce(total, group=shards.group)
            dhidden = total.to(dhidden.dtype)
        returned = [need_hidden, need_weight and ctx.weight_grad is None, need_bias]
        return *[None] * (1 + _ASKED), *input_gradients(returned, dhidden, dweight, dbias)


def _local(head: Head, shards: VocabularyShards, elsewhere: int | None) -> Head:
    """The head of this rank's rows alone; `elsewhere`: the target of a token that another holds.

    None: such a token is ignored.
    """
    ignored = _IGNORED if head.compact else ROWS_STAY
    held = shards.of_rank(head.targets, shards.rank) & head.counted()
    targets = (head.targets - shards.start).where(held, ignored if elsewhere is None else elsewhere)
    return head._replace(targets=targets.where(head.counted(), ignored), ignore_index=ignored)


def _local_ids(head: Head, ids: Tensor, shards: VocabularyShards) -> Tensor:
    """(N, K): those that this rank holds, by their rows here; NO_ID for the others."""
    held = shards.of_rank(ids, shards.rank) & (ids != head.ignore_index)
    return (ids - shards.start).where(held, NO_ID)


def _pick_many(head: Head, ids: Tensor, shards: VocabularyShards, logprobs: Tensor) -> Tensor:
    """(N, K) of logprobs (ranks, K, N): each id's from the rank that holds it; 0 where ignored.

    NaN for an id outside the vocabulary.
    """
    picked = torch.full(ids.shape, torch.nan, dtype=logprobs.dtype, device=logprobs.device)
    for rank in range(len(shards.sizes)):
        picked = logprobs[rank].T.where(shards.of_rank(ids, rank), picked)
    return picked.where(ids != head.ignore_index, 0.0)


def _gather(shards: VocabularyShards, *mine: Tensor) -> Tensor:
    """(ranks, len(mine), N): the (N,) tensors of every rank, in rank order, by one collective."""
    sent = torch.stack(mine)
    gathered = sent.new_empty(len(shards.sizes), *sent.shape)
    dist.all_gather(list(gathered.unbind()), sent, group=shards.group)
    return gathered


def _pick(head: Head, shards: VocabularyShards, logprobs: Tensor) -> Tensor:
    """(N,) of logprobs (ranks, 1, N): each token's from the rank that holds its target.

    NaN for a target outside the vocabulary, which nobody holds; 0 for an ignored one.
    """
    picked = torch.full_like(logprobs[0, 0], torch.nan)
    for rank in range(len(shards.sizes)):
        picked = logprobs[rank, 0].where(shards.of_rank(head.targets, rank), picked)
    return picked.where(head.counted(), 0.0)


def _merge(
    head: Head,
    shards: VocabularyShards,
    local: tuple[Tensor, Tensor, Tensor],
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy) over all ranks from this rank's, by the formulas of this file.

    In float64 and in rank order. A shard with every token banned has lse -inf and weight 0, and its
    other numbers are not used. With every token of every shard banned, the results are NaN, as
    those of the op on one device.
    """
    logprobs, lse, entropy = local
    gathered = _gather(shards, lse, logprobs, *([entropy] if with_entropy else []))
    parts = gathered.double()
    of_ranks = parts[:, 0].unbind()
    m = parts[:, 0].amax(0).clamp(min=_LOWEST_MAX)
    s = torch.zeros_like(m)
    for lse_r in of_ranks:
        s = s + (lse_r - m).exp()
    total = m + s.log()
    merged = torch.zeros_like(m)
    for rank, lse_r in enumerate(of_ranks):
        log_w = lse_r - total
        parts[rank, 1] = log_w.where(lse_r == -torch.inf, parts[rank, 1] + log_w)
        if with_entropy:
            w = log_w.exp()
            merged = merged + (w * (parts[rank, 2] - log_w)).where(w != 0, 0.0)
    counted, dtype = head.counted(), lse.dtype
    return (
        _pick(head, shards, parts[:, 1:2]).to(dtype),
        total.where(counted, 0.0).to(dtype),
        merged.where(counted, 0.0).to(dtype) if with_entropy else entropy,
    )


# --- The names that the ops had here before they took shards= -------------------------------------


def _with_shards(function: Callable[..., R]) -> Callable[..., R]:
    """`function` with shards after its tensors, by position or by keyword."""

    @functools.wraps(function)
    def call(*tensors: Any, **options: Any) -> R:
        if "shards" not in options:
            tensors, options["shards"] = tensors[:-1], tensors[-1]
        return function(*tensors, **options)

    return call


linear_logprobs = _with_shards(_linear_logprobs)
linear_logprobs_with_entropy = _with_shards(_linear_logprobs_with_entropy)
linear_logprobs_with_stats = _with_shards(_linear_logprobs_with_stats)
weighted_logprob_sum = _with_shards(_weighted_logprob_sum)
