"""Log-probabilities of given ids where lse is known: a dot product each, no pass over the weight.

    z = cap(round(hidden . weight[id] + bias[id])) / temperature      logprob = z - lse

The form of `weighted_logprob_sum` whose lse comes from before, and the K ids of many targets.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from agro_kernels._triton.launch import contiguous, head_arguments
from agro_kernels._triton.primitives import rounded, tanh
from agro_kernels.head import Head

# Ids of a program, and the numbers of each row that it reads at a time.
BLOCK_IDS, BLOCK_D = 4, 1024


@triton.jit(do_not_specialize=["num_ids"])
def target_logprobs_kernel(
    # inputs
    hidden_ptr, weight_ptr, bias_ptr, ids_ptr, token_temperature_ptr, kept_ptr, lse_ptr,
    # outputs
    logits_ptr, logprobs_ptr,
    # sizes and strides
    num_ids, K, V, D, stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d,
    temperature, softcap, ignore_index,
    # constants
    BLOCK_IDS: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    ROUND_LOGITS: tl.constexpr,
):  # fmt: skip
    """BLOCK_IDS of the ids (N, K): their logits after softcap and temperature, and logit - lse.

    An ignored id has 0 for both and its rows are not read; one outside [0, V) has the logprob NaN,
    one that the sampler did not keep -inf. logits_ptr None: they are not written.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK_IDS + tl.arange(0, BLOCK_IDS)
    mask = offs < num_ids
    ids = tl.load(ids_ptr + offs, mask=mask, other=0).to(tl.int64)
    counted = mask & (ids != ignore_index)
    inside = counted & (ids >= 0) & (ids < V)
    ids = tl.where(inside, ids, 0)
    tokens = tl.where(inside, offs // K, 0)
    hidden_rows = hidden_ptr + tokens * stride_hidden_n
    weight_rows = weight_ptr + ids * stride_weight_v
    sums = tl.zeros((BLOCK_IDS, BLOCK_D), tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = inside[:, None]
        if not EVEN_D:
            mask_d &= (offs_d < D)[None, :]
        hidden_tile = tl.load(
            hidden_rows[:, None] + (offs_d * stride_hidden_d)[None, :], mask=mask_d, other=0.0
        )
        weight_tile = tl.load(
            weight_rows[:, None] + (offs_d * stride_weight_d)[None, :], mask=mask_d, other=0.0
        )
        sums += hidden_tile.to(tl.float32) * weight_tile.to(tl.float32)
    logits = tl.sum(sums, axis=1)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + ids).to(tl.float32)
    if ROUND_LOGITS is not None:
        logits = rounded(logits, ROUND_LOGITS).to(tl.float32)
    if softcap is not None:
        logits = softcap * tanh(logits / softcap)
    if token_temperature_ptr is not None:
        logits /= tl.load(token_temperature_ptr + tokens)
    else:
        logits /= temperature
    allowed = logits
    if kept_ptr is not None:
        words = tl.load(kept_ptr + tokens * tl.cdiv(V, 32) + ids // 32)
        is_kept = ((words >> (ids % 32).to(tl.int32)) & 1) != 0
        allowed = tl.where(is_kept, logits, float("-inf"))
    logprobs = allowed - tl.load(lse_ptr + tokens)
    logprobs = tl.where(inside, logprobs, float("nan"))
    tl.store(logprobs_ptr + offs, tl.where(counted, logprobs, 0.0), mask=mask)
    if logits_ptr is not None:
        tl.store(logits_ptr + offs, tl.where(counted, logits, 0.0), mask=mask)


def target_logprobs(head: Head, lse: Tensor) -> Tensor:
    """(N,) fp32, target logit - lse, with lse (N,) from before."""
    logprobs = lse.new_empty(lse.shape, dtype=torch.float32)
    _launch(head, head.targets.unsqueeze(1), lse, None, logprobs)
    return logprobs


def many_target_logprobs(head: Head, targets: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, logits - lse) of targets (N, K), (N, K) fp32 each; the head's are not looked at.

    Logits are those after softcap and temperature; of an id that the sampler did not keep the
    second is -inf, of one outside the vocabulary NaN; of an ignored one both are 0.
    """
    logits = lse.new_empty(targets.shape, dtype=torch.float32)
    logprobs = torch.empty_like(logits)
    _launch(head, targets, lse, logits, logprobs)
    return logits, logprobs


def _launch(head: Head, ids: Tensor, lse: Tensor, logits: Tensor | None, logprobs: Tensor) -> None:
    """Fills logits, if given, and logprobs (N, K), contiguous, of ids (N, K)."""
    hidden, weight = head.hidden, head.weight
    if ids.numel() == 0:
        return
    D = hidden.shape[1]
    with torch.cuda.device_of(hidden):
        target_logprobs_kernel[(triton.cdiv(ids.numel(), BLOCK_IDS),)](
            hidden_ptr=hidden,
            weight_ptr=weight,
            bias_ptr=contiguous(head.bias),
            ids_ptr=ids.contiguous(),
            token_temperature_ptr=contiguous(head.token_temperature),
            kept_ptr=contiguous(head.kept),
            lse_ptr=lse.contiguous(),
            logits_ptr=logits,
            logprobs_ptr=logprobs,
            num_ids=ids.numel(),
            K=ids.shape[1],
            **head_arguments(hidden, head),
            ignore_index=head.ignore_index,
            BLOCK_IDS=BLOCK_IDS,
            BLOCK_D=BLOCK_D,
            EVEN_D=D % BLOCK_D == 0,
            num_warps=4,
        )
