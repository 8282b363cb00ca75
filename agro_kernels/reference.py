"""What every op means, in plain torch: full logits, any dtype, differentiable, no cleverness.

The kernels are tested against this file. It stores (N, V) logits, so it is for reading and for
small shapes.
"""

import math
from typing import Any

import torch
from torch import Tensor

ROUNDED_LOGITS = {"bf16": torch.bfloat16, "fp16": torch.float16}

# --- Log-probabilities from hidden states ---------------------------------------------------------


def logits_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    round_logits: str | None = None,
    kept_ids: Tensor | None = None,
) -> Tensor:
    """z = cap(round(hidden @ weight.T + bias)) / temperature, (N, V), fp32 (float64 of float64).

    cap(x) = softcap * tanh(x / softcap). temperature is a float or a tensor (N,). The gradient goes
    straight through the rounding. Tokens outside a row's kept_ids (N, K) get -inf added; negative
    ids are padding, and a row of padding keeps every token.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if round_logits is not None:
        rounded = logits.detach().to(ROUNDED_LOGITS[round_logits]).to(dtype)
        # A logit of -inf is rounded already, and -inf - -inf is NaN.
        logits = (logits + (rounded - logits.detach())).where(logits.isfinite(), logits)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype)[:, None]
    logits = logits / temperature
    if kept_ids is not None:
        row, place = (kept_ids >= 0).nonzero(as_tuple=True)
        kept = torch.zeros_like(logits, dtype=torch.bool)
        kept[row, kept_ids[row, place].long()] = True
        kept |= (kept_ids < 0).all(1, keepdim=True)
        logits = logits + torch.zeros_like(logits).masked_fill(~kept, -torch.inf)
    return logits


def linear_logprobs_with_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, lse), each (N,), of hidden (N, D), weight (V, D), targets (N,).

    options: bias, temperature, softcap, round_logits, kept_ids, as `logits_of`.

    logprob = z_y - lse, lse = log sum_v exp(z_v), entropy = lse - sum_v p_v z_v. A token with logit
    -inf has probability 0 and no share of the entropy. Ignored rows give 0. Of targets (N, K) the
    logprobs are (N, K); a row is ignored if all its targets are.
    """
    ids = targets if targets.dim() == 2 else targets[:, None]
    id_counted = ids != ignore_index
    counted = id_counted.any(1)
    hidden = hidden.masked_fill(~counted[:, None], 0.0)  # a NaN times a zero gradient is a NaN
    logits = logits_of(hidden, weight, **options)
    lse = logits.logsumexp(-1)
    picked = logits.gather(-1, ids.where(id_counted, 0).long())
    log_p = (logits - lse[:, None]).clamp_min(-1e30)  # 0 * -1e30 is 0, 0 * -inf is NaN
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (
        (picked - lse[:, None]).where(id_counted, 0.0).view(targets.shape),
        entropy.where(counted, 0.0),
        lse.where(counted, 0.0),
    )


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """log softmax(z)[targets] of targets (N,) or (N, K); 0 where targets == ignore_index."""
    return linear_logprobs_with_stats(hidden, weight, targets, **options)[0]


def tail_probability(logprobs: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """1 - the sum of the probabilities of each row's different targets, (N,) of (N, K)."""
    tails = []
    for row_logprobs, row in zip(logprobs, targets, strict=True):
        first = [row[:k].ne(row[k]).all() and row[k] != ignore_index for k in range(len(row))]
        tails.append(1 - row_logprobs[torch.tensor(first)].exp().sum())
    return torch.stack(tails)


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """Of a student's log-probabilities (N, V) from a teacher's, (N,); kind: forward, reverse, jsd.

    forward KL(q, p) = sum q (log q - log p), reverse KL(p, q); jsd beta KL(q, m) +
    (1 - beta) KL(p, m), m = beta q + (1 - beta) p.
    """
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward":
        return (q * (log_q - log_p)).sum(-1)
    if kind == "reverse":
        return (p * (log_p - log_q)).sum(-1)
    log_m = (beta * q + (1 - beta) * p).log()
    of_teacher, of_student = (q * (log_q - log_m)).sum(-1), (p * (log_p - log_m)).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student


def weighted_logprob_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    *,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """sum_t coefficients_t * logprob_t, 0-d; a coefficient of 0 leaves its row out."""
    counted = (coefficients != 0) & (targets != ignore_index)
    targets = targets.where(counted, ignore_index)
    logprobs = linear_logprobs(hidden, weight, targets, ignore_index=ignore_index, **options)
    return (coefficients.to(logprobs.dtype) * logprobs).where(counted, 0.0).sum()


def selective_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """log softmax(logits / temperature)[target], (N,), of logits (N, V)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    counted = targets != ignore_index
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype)[:, None]
    logits = logits.to(dtype).masked_fill(~counted[:, None], 0.0) / temperature
    index = targets.where(counted, 0).long()[:, None]
    return logits.log_softmax(-1).gather(-1, index).squeeze(-1).where(counted, 0.0)


# --- AGRO (Tang et al. 2025, arXiv 2503.19612) ----------------------------------------------------


def agro_sequence_loss(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    groups: Tensor,
    *,
    beta: float,
    lr_weight: float = 0.0,
    lr_cap: bool = False,
    on_policy: Tensor | None = None,
    lr_baseline: float | None = None,
    importance_weights: Tensor | None = None,
    num_groups: int | None = None,
    scale: float = 1.0,
    sampling_logprobs: Tensor | None = None,
    taper: float | Tensor = 0.0,
) -> Tensor:
    """Half the variance of R = r - beta * log(pi / pi_ref) in a group, averaged over groups, 0-d.

    All of shape (B,). Half the unbiased variance of a group of n is
    sum_{i<j} (R_i - R_j)^2 / (2 n (n - 1)), each pair times the product of its importance weights.
    The likelihood-ratio term of on-policy rows adds no value, only e_i * grad logprob_i, with the
    mean m and variance v taken over the n - 1 other rows,
    e_i = ((R_i - m)^2 - lr_baseline * n / (n - 1) * v) / (2 n).

    The taper adds no value either. Where the variance's gradient lowers a probability, its factor
    of grad logprob_i, beta * sum_j (R_j - R_i) / (n (n - 1)) > 0 (each term times the importance
    weights of i and j), shrinks to min(1, pi / mu)^taper of itself; mu is the law that sampled row
    i, with the logarithm sampling_logprobs[i]. Rows where that is not finite keep it whole.
    """
    weights = torch.ones_like(rewards) if importance_weights is None else importance_weights
    regularized = rewards - beta * (logprobs - ref_logprobs)
    kept = regularized.isfinite() & weights.isfinite() & (weights >= 0)
    if sampling_logprobs is not None and isinstance(taper, Tensor):
        kept &= taper >= 0
    members = [((groups == group) & kept).nonzero().squeeze(1) for group in groups.unique()]
    members = [rows for rows in members if len(rows) >= 2]
    total = logprobs.new_zeros(())
    for rows in members:
        reg, w, n = regularized[rows], weights[rows], len(rows)
        pairs = w[:, None] * w * (reg[:, None] - reg) ** 2
        total = total + pairs.sum() / (4 * n * (n - 1))  # the square table holds every pair twice
        reg = reg.detach()
        shrink = (1.0 if n >= 8 else 0.5 if n >= 3 else 0.0) if lr_baseline is None else lr_baseline
        best = float((reg - reg.mean()).max())
        weight = lr_weight
        if lr_cap and best > 0:  # where d/dR of the best row's coefficient would change its sign
            kept_share = (n - 2) / (n - 2 + shrink) if n >= 3 else 1.0
            weight = min(lr_weight, beta * (n - 1) / n * kept_share / best)
        if sampling_logprobs is not None:
            push = beta * (w[:, None] * w * (reg - reg[:, None])).sum(1) / (n * (n - 1))
            exponents = taper[rows] if isinstance(taper, Tensor) else [taper] * n
            for i, row in enumerate(rows):
                log_sampler_ratio = float(logprobs[row].detach() - sampling_logprobs[row])
                if push[i] > 0 and math.isfinite(log_sampler_ratio):
                    taken = 1 - taper_weight(log_sampler_ratio, float(exponents[i]))
                    total = total - taken * push[i] * (logprobs[row] - logprobs[row].detach())
        for i, row in enumerate(rows):
            if lr_weight == 0 or (on_policy is not None and not on_policy[row]):
                continue
            others = torch.cat([reg[:i], reg[i + 1 :]])
            lr_term = (reg[i] - others.mean()) ** 2 / (2 * n)
            if n >= 3:
                lr_term = lr_term - shrink * others.var() / (2 * (n - 1))
            score = logprobs[row] - logprobs[row].detach()
            total = total + weight * lr_term * score
    return scale * total / max(1, len(members) if num_groups is None else num_groups)


def taper_weight(log_ratio: float, taper: float) -> float:
    """min(1, exp(log_ratio)) ** taper, and 0 for taper inf, whatever the ratio."""
    return 0.0 if taper == math.inf else math.exp(taper * min(0.0, log_ratio))


def agro_coefficients(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, groups: Tensor, **options: Any
) -> Tensor:
    """The gradient of `agro_sequence_loss` with respect to logprobs, (B,)."""
    logprobs = logprobs.detach().requires_grad_()
    with torch.enable_grad():
        loss = agro_sequence_loss(rewards, logprobs, ref_logprobs, groups, **options)
    if not loss.requires_grad:  # no group has two valid rows
        return torch.zeros_like(logprobs)
    return torch.autograd.grad(loss, logprobs)[0]


def agro_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    groups: Tensor,
    cu_seqlens: Tensor,
    **options: Any,
) -> Tensor:
    """`agro_sequence_loss` of token logprobs (N,), packed as cu_seqlens (B + 1,) says."""
    lengths = cu_seqlens.diff().tolist()
    per_sequence = torch.stack([tokens.sum() for tokens in logprobs.split(lengths)])
    ref_per_sequence = torch.stack([tokens.sum() for tokens in ref_logprobs.split(lengths)])
    return agro_sequence_loss(rewards, per_sequence, ref_per_sequence, groups, **options)
