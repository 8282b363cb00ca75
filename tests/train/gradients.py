"""The gradient of one update, read off its weights, and what it should be."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from agro_train.config import TrainConfig
from agro_train.data import kept_ids
from agro_train.data.batch import build_batch
from agro_train.policy.adapter import add_adapter
from agro_train.policy.policy import Policy
from agro_train.step import update
from agro_train.types import Rollout, TrainBatch
from tests.train.models import ragged_rollouts, tiny_policy

CONFIG = TrainConfig(beta=0.3, max_grad_norm=1e9)
LORA = replace(CONFIG, use_peft=True, lora_r=4, lora_alpha=8)

Gradient = dict[str, torch.Tensor]


def lora_policy(
    config: TrainConfig = LORA, *, dtype: torch.dtype = torch.float64, trained: bool = True
) -> Policy:
    """The tiny Llama with an adapter, whose B is not zero if it is `trained`."""
    policy = tiny_policy(dtype=dtype)
    add_adapter(policy.model, config, None)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if trained and ".lora_B." in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.1 * noise.to(parameter.dtype)
    return policy


def numbers(rollouts: list[Rollout]) -> list[int]:
    """Groups by prompt, numbered."""
    names = sorted({r.group for r in rollouts})
    return [names.index(r.group) for r in rollouts]


BARRED = {0}  # a token that none of `ragged_rollouts` has


def rollouts_of(kind: str) -> tuple[list[Rollout], set[int], int]:
    """`ragged_rollouts` for a test over ranks, what a completion's first tokens cannot be, and how
    many those are. Of a kind "...-early" some cannot, of "...-kept" each was drawn from few ids."""
    rollouts = ragged_rollouts()
    if kind.endswith("kept"):
        rollouts = [replace(r, kept_ids=_some_ids(r.completion_ids)) for r in rollouts]
    return (rollouts, BARRED, 2) if kind.endswith("early") else (rollouts, set(), 0)


def _some_ids(tokens: tuple[int, ...]) -> str:
    return kept_ids.encode([[token, *range(1 + i, 6)] for i, token in enumerate(tokens)])


def batch_of(
    rollouts: list[Rollout],
    *,
    token_budget: int = 30,
    share_prompts: bool = True,
    on_policy: bool = True,
    min_new_tokens: int = 0,
) -> TrainBatch:
    return build_batch(
        rollouts,
        numbers(rollouts),
        [on_policy] * len(rollouts),
        token_budget=token_budget,
        share_prompts=share_prompts,
        min_new_tokens=min_new_tokens,
    )


def ragged_batch(token_budget: int) -> TrainBatch:
    return batch_of(ragged_rollouts(), token_budget=token_budget)


def gradient(
    rollouts: list[Rollout], config: TrainConfig = CONFIG, **packing: Any
) -> tuple[Gradient, dict[str, float]]:
    """The gradient an update applies, and its metrics."""
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1).requires_grad_(False)
    return gradient_of(policy, reference, batch_of(rollouts, **packing), config)


def gradient_of(
    policy: nn.Module, reference: nn.Module, batch: TrainBatch, config: TrainConfig = CONFIG
) -> tuple[Gradient, dict[str, float]]:
    """Read off an SGD step with learning rate 1."""
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    stats = run_update(policy, reference, batch, config)
    return {n: before[n] - p.detach() for n, p in policy.named_parameters()}, dict(stats.metrics)


def run_update(policy: Any, reference: Any, batch: Any, config: TrainConfig) -> Any:
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return update(policy, reference, batch, config, Accelerator(cpu=True), optimizer, scheduler)


def assert_equal(ours: Gradient, theirs: Gradient, tolerance: float = 1e-12) -> None:
    """Equal to `tolerance` of the largest element: another order of float64 sums."""
    scale = max(float(g.abs().max()) for g in theirs.values())
    assert scale > 1e-3, "a test of zeros tests nothing"
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=tolerance * scale)


def padded_gradient(rollouts: list[Rollout], beta: float) -> Gradient:
    """Var(R) / 2 / beta of each group, averaged, differentiated through plain log-softmax logits of
    all sequences in one right-padded batch: no packing, no fused head, no coefficients."""
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1).requires_grad_(False)
    sequences = [torch.tensor([*r.prompt_ids, *r.completion_ids]) for r in rollouts]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # (B, T)
    real = torch.arange(ids.shape[1]) < torch.tensor([[len(s)] for s in sequences])
    starts = torch.tensor([[len(r.prompt_ids)] for r in rollouts])
    counts = real[:, 1:] & (torch.arange(1, ids.shape[1]) >= starts)  # completion tokens
    sums = []
    for model in (policy.model, reference.model):
        logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        sums.append(logprobs.where(counts, 0.0).sum(1))
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
    regularised = rewards - beta * (sums[0] - sums[1])
    groups = torch.tensor(numbers(rollouts))
    variances = [0.5 * regularised[groups == g].var() for g in groups.unique()]
    (torch.stack(variances).mean() / beta).backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
