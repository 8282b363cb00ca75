"""What the gradient does not depend on, in float64 or bit by bit: how the batch is cut, ordered,
padded, checkpointed, spread over ranks, or where it comes from.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agro_train.cli import main
from agro_train.data.batch import pack
from agro_train.policy.adapter import AdapterOff
from agro_train.policy.policy import Policy
from agro_train.step import score_batch
from agro_train.types import Rollout
from tests.train.gradient_main import KINDS
from tests.train.gradients import (
    CONFIG,
    assert_equal,
    batch_of,
    gradient,
    gradient_of,
    lora_policy,
    padded_gradient,
    ragged_batch,
    rollouts_of,
)
from tests.train.models import ragged_rollouts, tiny_policy

pytestmark = pytest.mark.usefixtures("no_curves")

ROOT = Path(__file__).parents[2]


def test_packed_gradient_is_that_of_a_padded_batch() -> None:
    """Which is the definition: half the variance over beta, by autograd."""
    ours, metrics = gradient(ragged_rollouts())
    assert_equal(ours, padded_gradient(ragged_rollouts(), beta=0.3))
    assert metrics["groups"] == 3


@pytest.mark.parametrize("share_prompts", [True, False], ids=["shared-prompts", "own-prompts"])
@pytest.mark.parametrize("token_budget", [1, 9, 1000])
@pytest.mark.parametrize("lr_weight", [0.0, 0.7])
def test_gradient_does_not_depend_on_packing(
    token_budget: int, share_prompts: bool, lr_weight: float
) -> None:
    config = replace(CONFIG, lr_weight=lr_weight)
    whole, _ = gradient(ragged_rollouts(), config)
    cut, _ = gradient(
        ragged_rollouts(), config, token_budget=token_budget, share_prompts=share_prompts
    )
    assert_equal(cut, whole)


def by_group(rollouts: list[Rollout]) -> list[Rollout]:
    """The groups in another order, each one's completions in theirs."""
    return sorted(rollouts, key=lambda r: ["g2", "g0", "g1"].index(r.group))


def within_group(rollouts: list[Rollout]) -> list[Rollout]:
    return sorted(reversed(rollouts), key=lambda r: r.group)


def scattered(rollouts: list[Rollout]) -> list[Rollout]:
    return [rollouts[i] for i in (4, 0, 8, 2, 6, 1, 3, 7, 5)]


@pytest.mark.parametrize("order", [by_group, within_group, scattered])
@pytest.mark.parametrize("token_budget", [12, 1000])
def test_gradient_does_not_depend_on_order(
    order: Callable[[list[Rollout]], list[Rollout]], token_budget: int
) -> None:
    whole, _ = gradient(ragged_rollouts())
    ordered = order(ragged_rollouts())
    assert ordered != ragged_rollouts()
    assert_equal(gradient(ordered, token_budget=token_budget)[0], whole)


@pytest.mark.parametrize("token_budget", [12, 1000])
def test_gradient_checkpointing_changes_no_bit(token_budget: int) -> None:
    plain, _ = gradient(ragged_rollouts(), token_budget=token_budget)
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1).requires_grad_(False)
    policy.model.activation_checkpointing_enable({"use_reentrant": False})
    recomputed = []
    handle = policy.model.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: recomputed.append(policy.training)
    )
    batch = ragged_batch(token_budget)
    config = replace(CONFIG, gradient_checkpointing=True)
    ours, _ = gradient_of(policy, reference, batch, config)
    handle.remove()
    # Once for the scores, once for the update, and once more in its backward pass.
    assert recomputed == [True] * 3 * len(batch.micro)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("share_prompts", [True, False], ids=["shared-prompts", "own-prompts"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_sequence_is_blind_to_the_others(
    implementation: str, training: bool, share_prompts: bool
) -> None:
    """Other tokens in the other sequences change no bit of this one's log-probabilities; and they
    are those of the sequence alone."""
    policy = tiny_policy().train(training)
    policy.model.set_attn_implementation(implementation)
    assert policy.model.config.use_cache, "the default, with which transformers leaks"
    rollouts = ragged_rollouts()
    before = logprobs_by_row(policy, rollouts, share_prompts)
    for row in (0, 4, 8):
        r = rollouts[row]
        others = [
            other
            if other is r
            else replace(other, completion_ids=tuple(14 - i for i in other.completion_ids))
            for other in rollouts
        ]
        assert torch.equal(logprobs_by_row(policy, others, share_prompts)[row], before[row])
        ids = torch.tensor([*r.prompt_ids, *r.completion_ids])
        logits = policy.model(input_ids=ids[None, :-1]).logits[0]
        alone = logits.log_softmax(-1).gather(-1, ids[1:, None])[len(r.prompt_ids) - 1 :, 0]
        # transformers' eager attention takes its softmax in float32 whatever the weights are
        tolerance = 1e-12 if implementation == "sdpa" else 1e-6
        torch.testing.assert_close(before[row], alone, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def logprobs_by_row(
    policy: Policy, rollouts: list[Rollout], share_prompts: bool
) -> list[torch.Tensor]:
    pieces: list[torch.Tensor] = []
    for micro in pack(rollouts, token_budget=30, share_prompts=share_prompts):
        logprobs = policy(micro, 1.0).logprobs
        pieces += logprobs.split(micro.cu_seqlens.diff().tolist())
    return pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_log_ratio_of_a_copied_reference_is_exactly_zero(dtype: torch.dtype) -> None:
    policy, reference = tiny_policy(dtype=dtype), tiny_policy(dtype=dtype)
    batch = ragged_batch(token_budget=20)
    scores, _ = score_batch(policy, reference, batch, batch.micro, CONFIG, torch.device("cpu"))
    assert scores.logprobs.all() and torch.equal(scores.logprobs, scores.ref_logprobs)


def test_log_ratio_is_noise_where_the_reference_was_packed_otherwise() -> None:
    """A cached reference has seen each sequence in other company."""
    policy = tiny_policy()
    alone, packed = (batch_of(ragged_rollouts(), token_budget=n) for n in (1, 1000))
    one, other = (
        score_batch(policy, policy, batch, batch.micro, CONFIG, torch.device("cpu"))[0]
        for batch in (alone, packed)
    )
    torch.testing.assert_close(one.logprobs, other.ref_logprobs, rtol=1e-13, atol=1e-13)


def test_offline_run_on_an_on_policy_steps_rollouts_takes_that_step(tmp_path: Path) -> None:
    """From the log that the step left behind to the weights, bit by bit: of one group, for the
    order of groups is drawn, and a sequence at a time, as the reference's cache packs otherwise."""
    settings = [
        "steps=1",
        "prompts_per_step=1",
        "token_budget=1",
        "warm_start_steps=3",
        "warmup_steps=0",
        "max_completion_length=8",
        "eval_every=0",
        "reward=tests.train.reward_functions:even_share",
    ]
    online, offline = tmp_path / "online", tmp_path / "offline"
    assert main(["train", "tiny-arithmetic", *settings, f"output_dir={online}"]) == 0
    log = f"recorded=[{online}/rollouts/step-000001.jsonl]"
    assert main(["train", "tiny-arithmetic", *settings, log, f"output_dir={offline}"]) == 0
    start, one, other = (
        load_file(folder / "model.safetensors")
        for folder in (online / "base_model", online / "checkpoint-1", offline / "checkpoint-1")
    )
    assert any(not torch.equal(start[name], one[name]) for name in start)
    assert all(torch.equal(other[name], one[name]) for name in one)


@pytest.fixture(scope="module")
def over_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gradients that three processes, then two of them, find together: replicated, sharded."""
    folder = tmp_path_factory.mktemp("ranks")
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports.append(str(server.getsockname()[1]))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.gradient_main", str(folder), str(rank), *ports],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:  # one that is left alone would wait for the others
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])
def test_gradient_does_not_depend_on_the_number_of_ranks(
    world: int, kind: str, over_ranks: Path
) -> None:
    ours = torch.load(over_ranks / f"{kind}-{world}.pt", weights_only=True)
    config = replace(CONFIG, lr_weight=0.7)
    rollouts, barred, early = rollouts_of(kind)
    if kind.endswith("adapter"):
        policy = lora_policy()
        reference = AdapterOff(policy)
    else:
        policy, reference = (Policy(tiny_policy(seed).model, barred) for seed in (0, 1))
        reference.requires_grad_(False)
    alone, _ = gradient_of(policy, reference, batch_of(rollouts, min_new_tokens=early), config)
    assert ours.keys() == alone.keys()
    assert_equal(ours, alone)
