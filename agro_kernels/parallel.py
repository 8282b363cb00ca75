"""linear_logprobs where every rank holds some rows of the lm_head: vocabulary (tensor) parallelism.

    shards = VocabularyShards.of(weight, group)            # once; one small gather
    logprobs = parallel.linear_logprobs(hidden, weight, targets, shards)

Forward: each rank runs the op on its own rows of the weight; one all-gather of two or three floats
a token brings lse_r, logprob_r and entropy_r together, and every rank merges them in rank order, so
that all hold the same bits. With lse the logsumexp over ranks and w_r = exp(lse_r - lse),

    logprob = logprob_r + log w_r    of the rank r that holds the target
    entropy = sum_r w_r (entropy_r - log w_r)

Backward: the op's own backward on the shard, with the global lse and entropy. One all-reduce sums
the hidden states' gradient; those of the weight and the bias stay where their rows are.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

import agro_kernels.ops  # noqa: F401  (registers the ops)
from agro_kernels.head import (
    FLOATING,
    check_constant,
    check_head,
    check_head_options,
    check_target_values,
    check_tensor,
)
from agro_kernels.linear_logprobs import (
    IGNORE_INDEX,
    LogprobStats,
    LogprobsWithEntropy,
    cast_for_autocast,
    split_temperature,
)
from agro_kernels.reference import ROUNDED_LOGITS

# What ignored targets become on a shard. Not the caller's ignore_index, which may be any number, a
# local row's too.
_IGNORED = -1
# Stands for "no logit yet". Finite, because -inf - -inf is NaN.
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
        # A rank that raised here would leave the others waiting: what is wrong is told to all.
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


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shards: VocabularyShards,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    round_logits: str | None = None,
    kept_ids: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> Tensor:
    """`agro_kernels.linear_logprobs` of a weight whose rows are spread over ranks.

    All ranks of the group must call it together, with the same tokens and options.

    Args:
        hidden: (..., D), the same on every rank, as targets, temperature and kept_ids are. After
            sequence parallelism, gather it first.
        weight: (V_r, D), this rank's rows, a plain tensor. Rows that only pad the vocabulary must
            not be in it: pass weight[:valid], and its size to VocabularyShards.
        targets: (...) ids of the whole vocabulary, [0, V), or ignore_index.
        shards: VocabularyShards.of(weight, group).
        bias: (V_r,) this rank's part.
        kept_ids: (..., K) ids of the whole vocabulary.
        weight_grad: (V_r, D) this rank's part.
        temperature, softcap, ignore_index, round_logits: as the single op.

    Returns:
        logprobs: (...) fp32 (float64 for float64), nats, bitwise the same on every rank.

    Gradients flow to hidden, weight and bias. That of hidden is complete on every rank: each rank's
    share is rounded to hidden's dtype once, and the shares are summed in fp32. Upstream gradients
    must be the same on every rank. Not inside torch.compile.
    """
    logprobs, _, _ = _apply(
        hidden,
        weight,
        targets,
        shards,
        bias,
        temperature,
        softcap,
        ignore_index,
        round_logits,
        kept_ids,
        weight_grad,
        with_entropy=False,
    )
    return logprobs


def linear_logprobs_with_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shards: VocabularyShards,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    round_logits: str | None = None,
    kept_ids: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> LogprobsWithEntropy:
    """`linear_logprobs` and the entropy of each distribution over the whole vocabulary.

    Args: as linear_logprobs. Both results are differentiable; ignored rows have entropy 0.0.
    """
    logprobs, _, entropy = _apply(
        hidden,
        weight,
        targets,
        shards,
        bias,
        temperature,
        softcap,
        ignore_index,
        round_logits,
        kept_ids,
        weight_grad,
        with_entropy=True,
    )
    return LogprobsWithEntropy(logprobs, entropy)


def linear_logprobs_with_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shards: VocabularyShards,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    round_logits: str | None = None,
    kept_ids: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> LogprobStats:
    """`linear_logprobs` with entropy and the lse over the whole vocabulary, all differentiable.

    Args: as linear_logprobs. Keep lse for `weighted_logprob_sum`.
    """
    logprobs, lse, entropy = _apply(
        hidden,
        weight,
        targets,
        shards,
        bias,
        temperature,
        softcap,
        ignore_index,
        round_logits,
        kept_ids,
        weight_grad,
        with_entropy=True,
    )
    return LogprobStats(logprobs, entropy, lse)


def weighted_logprob_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    shards: VocabularyShards,
    *,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    round_logits: str | None = None,
    kept_ids: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of coefficients times log-probabilities, with lse 3 matrix products in all.

    Same result as

        (coefficients * linear_logprobs(hidden, weight, targets, shards, ...)).sum()

    Args:
        coefficients: (...) one number a token, a constant, the same on every rank. Rows with
            coefficient 0 are left out, whatever they hold.
        lse: (...) from linear_logprobs_with_stats on the same hidden, weight and options: over the
            whole vocabulary, not the shard's. The forward pass then needs no matrix product, only
            each target's logit; without it the products are 4.
        The others as linear_logprobs.

    Returns:
        0-d fp32 (float64 for float64), the same bits on every rank. 0.0 of no tokens.
    """
    check_constant("coefficients", coefficients, targets)
    if lse is not None:
        check_constant("lse", lse, targets)
    logprobs, _, _ = _apply(
        hidden,
        weight,
        targets.where(coefficients != 0, ignore_index),
        shards,
        bias,
        temperature,
        softcap,
        ignore_index,
        round_logits,
        kept_ids,
        weight_grad,
        with_entropy=False,
        lse=lse,
    )
    counted = (coefficients != 0) & (targets != ignore_index)
    return (coefficients.to(logprobs.dtype) * logprobs).where(counted, 0.0).sum()


def _apply(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shards: VocabularyShards,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    round_logits: str | None,
    kept_ids: Tensor | None,
    weight_grad: Tensor | None,
    with_entropy: bool,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), the first two in the shape of targets, entropy too if asked for."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "agro_kernels.parallel: expected a call outside torch.compile, got one inside; its "
            "collectives are not traced: leave this call out with torch.compiler.disable"
        )
    _refuse_dtensor(hidden=hidden, weight=weight, bias=bias, weight_grad=weight_grad)
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    check_head(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    check_head_options(targets, weight, round_logits, kept_ids, weight_grad)
    if weight.shape[0] != shards.sizes[shards.rank]:
        raise ValueError(
            f"weight: expected {shards.sizes[shards.rank]} rows, as shards.sizes says of rank "
            f"{shards.rank}, got {weight.shape[0]}; use VocabularyShards.of(weight)"
        )
    check_target_values(targets, shards.vocabulary, ignore_index)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    call = _Call(
        shards,
        targets.reshape(-1),
        ignore_index,
        *split_temperature(temperature),
        softcap or 0.0,
        None if round_logits is None else ROUNDED_LOGITS[round_logits],
        None if kept_ids is None else _kept_bits(kept_ids.reshape(-1, kept_ids.shape[-1]), shards),
        with_entropy,
        None if lse is None else lse.reshape(-1).to(dtype),
        weight_grad,
    )
    results = _ParallelLogprobs.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, call)
    logprobs, lse_of_all, entropy = results
    shape = targets.shape
    if with_entropy:
        entropy = entropy.view(shape)
    return logprobs.view(shape), lse_of_all.view(shape), entropy


@dataclass(frozen=True)
class _Call:
    """What one call needs beside the tensors that get a gradient; N flattened tokens."""

    shards: VocabularyShards
    targets: Tensor  # (N,) ids of the whole vocabulary
    ignore_index: int
    temperature: float
    token_temperature: Tensor | None  # (N,)
    softcap: float  # 0.0 is none
    round_logits: torch.dtype | None
    kept: Tensor | None  # (N, ceil(V_r / 32)) int32, of this rank's ids
    with_entropy: bool
    lse: Tensor | None  # (N,) over the whole vocabulary, from an earlier pass
    weight_grad: Tensor | None  # (V_r, D)

    def held_by(self, rank: int) -> Tensor:
        """(N,) bool: the target counts and is one of that rank's rows."""
        start = sum(self.shards.sizes[:rank])
        inside = (self.targets >= start) & (self.targets < start + self.shards.sizes[rank])
        return inside & self.counted

    @property
    def counted(self) -> Tensor:
        """(N,) bool."""
        return self.targets != self.ignore_index

    def local_targets(self, elsewhere: int) -> Tensor:
        """(N,) rows of this shard; `elsewhere` for a target that counts on another rank."""
        local = self.targets - self.shards.start
        local = local.where(self.held_by(self.shards.rank), elsewhere)
        return local.where(self.counted, _IGNORED)

    def options(self) -> tuple[Any, ...]:
        """The ops' arguments from temperature to kept."""
        head = (self.temperature, self.token_temperature, self.softcap)
        return (*head, _IGNORED, self.round_logits, self.kept)


class _ParallelLogprobs(torch.autograd.Function):
    """(logprobs, lse, entropy) over the whole vocabulary; entropy (0,) unless with_entropy."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        if call.lse is None:
            # A target on another rank: row 0 stands for it, and its logprob is not looked at.
            local = torch.ops.agro.linear_logprobs_fwd(
                hidden, weight, call.local_targets(0), bias, *call.options(), call.with_entropy
            )
            logprobs, lse, entropy = _merge(call, local)
        else:
            mine = torch.ops.agro.target_logprobs(
                hidden, weight, call.local_targets(_IGNORED), bias, *call.options(), call.lse
            )
            logprobs = _pick(call, _gather(call, mine))
            lse = (
                call.lse.clone()
            )  # an output of this function gets a history; the caller's must not
            entropy = lse.new_empty(0)
        ctx.save_for_backward(hidden, weight, bias, lse, entropy)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return logprobs, lse, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lse, entropy = ctx.saved_tensors
        call: _Call = ctx.call
        if not call.with_entropy:
            dentropy = None  # the gradient of the empty tensor in its place
        if dlogprobs is not None:
            # logprob = target logit - lse: where the target is not here, only lse is.
            held = call.held_by(call.shards.rank)
            of_lse = -dlogprobs if dlse is None else dlse - dlogprobs
            dlse = of_lse.where(~held, 0.0 if dlse is None else dlse)
            in_vocabulary = (call.targets >= 0) & (call.targets < call.shards.vocabulary)
            dlse = dlse.where(in_vocabulary | ~call.counted, torch.nan)
            dlogprobs = dlogprobs.where(held, 0.0)
        need_hidden, need_weight, need_bias, _ = ctx.needs_input_grad
        arguments = (dlogprobs, dlse, dentropy, hidden, weight, call.local_targets(0), bias)
        rest = (*call.options(), lse, entropy, [need_hidden, need_weight, need_bias])
        if call.weight_grad is None:
            gradients = torch.ops.agro.linear_logprobs_bwd(*arguments, *rest)
        else:
            gradients = torch.ops.agro.linear_logprobs_bwd_accumulate(
                *arguments, *rest, call.weight_grad
            )
        dhidden, dweight, dbias = gradients
        if need_hidden:
            total = dhidden.to(torch.promote_types(hidden.dtype, torch.float32))
            dist.all_reduce(total, group=call.shards.group)
            dhidden = total.to(hidden.dtype)
        return (
            dhidden if need_hidden else None,
            dweight if need_weight and call.weight_grad is None else None,
            dbias if need_bias else None,
            None,
        )


def _gather(call: _Call, *mine: Tensor) -> Tensor:
    """(ranks, len(mine), N): the (N,) tensors of every rank, in rank order, by one collective."""
    sent = torch.stack(mine)
    gathered = sent.new_empty(len(call.shards.sizes), *sent.shape)
    dist.all_gather(list(gathered.unbind()), sent, group=call.shards.group)
    return gathered


def _pick(call: _Call, logprobs: Tensor) -> Tensor:
    """(N,) of logprobs (ranks, 1, N): each token's from the rank that holds its target.

    NaN for a target outside the vocabulary, which nobody holds; 0 for an ignored one.
    """
    picked = torch.full_like(logprobs[0, 0], torch.nan)
    for rank in range(len(call.shards.sizes)):
        picked = logprobs[rank, 0].where(call.held_by(rank), picked)
    return picked.where(call.counted, 0.0)


def _merge(call: _Call, local: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy) over all ranks from this rank's, by the formulas of this file.

    In float64 and in rank order. A shard whose every token is banned has lse -inf, weight 0 and no
    other number of use; only where all shards are so, the results are NaN as the single op's.
    """
    logprobs, lse, entropy = local
    gathered = _gather(call, lse, logprobs, *([entropy] if call.with_entropy else []))
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
        if call.with_entropy:
            w = log_w.exp()
            merged = merged + (w * (parts[rank, 2] - log_w)).where(w != 0, 0.0)
    counted, dtype = call.counted, lse.dtype
    return (
        _pick(call, parts[:, 1:2]).to(dtype),
        total.where(counted, 0.0).to(dtype),
        merged.where(counted, 0.0).to(dtype) if call.with_entropy else entropy,
    )


def _kept_bits(kept_ids: Tensor, shards: VocabularyShards) -> Tensor:
    """(N, K) ids of the whole vocabulary -> (N, ceil(V_r / 32)) bits of this rank's rows."""
    if kept_ids.device.type == "cpu" and bool((kept_ids >= shards.vocabulary).any()):
        raise ValueError(
            f"kept_ids: expected ids below {shards.vocabulary}, got {int(kept_ids.max())}; "
            "pad with -1"
        )
    start, size = shards.start, shards.sizes[shards.rank]
    here = (kept_ids >= start) & (kept_ids < start + size)
    bits: Tensor = torch.ops.agro.pack_kept_ids((kept_ids - start).where(here, -1), size)
    # To the op a row without ids keeps everything. Here it may be that all its ids are elsewhere.
    only_elsewhere = (kept_ids >= 0).any(1) & ~here.any(1)
    return bits.masked_fill(only_elsewhere.unsqueeze(1), 0)


def _refuse_dtensor(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{name}: expected this rank's plain tensor, got a DTensor; pass {name}.to_local()"
            )
