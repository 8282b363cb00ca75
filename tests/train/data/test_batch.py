"""Packing: the shift and the budget."""

import math
from dataclasses import replace

import pytest
import torch

from agro_train.data import kept_ids
from agro_train.data.batch import build_batch, pack
from tests.train.models import ragged_rollouts, rollout


def test_shift_and_shared_prompt_are_as_documented() -> None:
    rollouts = [
        rollout("a", [5, 9, 5, 11], [7, 1], 1.0),
        rollout("a", [5, 9, 5, 11], [8, 1], 0.0),
    ]
    (micro,) = pack(rollouts, token_budget=100, share_prompts=True)
    assert micro.input_ids.tolist() == [5, 9, 5, 11, 7, 8]
    assert micro.position_ids.tolist() == [0, 1, 2, 3, 4, 4]
    assert micro.predictors.tolist() == [3, 4, 3, 5]
    assert micro.targets.tolist() == [7, 1, 8, 1]
    assert micro.cu_seqlens.tolist() == [0, 2, 4]
    assert micro.attends()[5].tolist() == [True, True, True, True, False, True]


def test_truncated_completions_count_as_without_a_reward_where_that_is_asked_for() -> None:
    rollouts = [replace(rollout("a", [5], [7], 1.0), finish=f) for f in ("stop", "length")]
    options = {"token_budget": 100, "share_prompts": True}
    for asked, expected in ((False, [1.0, 1.0]), (True, [1.0, None])):
        batch = build_batch(rollouts, [0, 0], [True, True], mask_truncated=asked, **options)  # type: ignore[arg-type]
        found = [None if math.isnan(reward) else reward for reward in batch.rewards.tolist()]
        assert found == expected


def test_without_sharing_every_completion_has_its_own_prompt() -> None:
    rollouts = [rollout("a", [5, 9], [7, 1]), rollout("a", [5, 9], [8, 1])]
    (micro,) = pack(rollouts, token_budget=100, share_prompts=False)
    assert micro.input_ids.tolist() == [5, 9, 7, 5, 9, 8]
    assert micro.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert micro.cu_inputs.tolist() == [0, 3, 6]
    assert not micro.attends()[3:, :3].any()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 7, 12, 1000])
def test_every_completion_is_packed_once_within_the_budget(budget: int, share: bool) -> None:
    rollouts = ragged_rollouts()
    micro = pack(rollouts, token_budget=budget, share_prompts=share)
    assert torch.cat([m.rows for m in micro]).tolist() == list(range(len(rollouts)))
    targets = torch.cat([m.targets for m in micro]).tolist()
    assert targets == [token for r in rollouts for token in r.completion_ids]
    for m in micro:
        assert len(m.input_ids) <= budget or len(m.rows) == 1


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_segments_are_as_a_block_mask_takes_them(budget: int, share: bool) -> None:
    for micro in pack(ragged_rollouts(), token_budget=budget, share_prompts=share):
        assert (micro.segments.diff() >= 0).all()
        assert set(micro.parents.tolist()) <= set(micro.segments.tolist())
        same = micro.segments[1:] == micro.segments[:-1]
        assert (micro.position_ids.diff()[same] == 1).all()


def test_batch_holds_groups_rewards_and_origin() -> None:
    rollouts = [
        rollout("x", [3], [4], 1.0),
        rollout("y", [5], [6], None),
        rollout("x", [3], [7], 0.5),
    ]
    batch = build_batch(
        rollouts, [4, 2, 4], [True, False, True], token_budget=50, share_prompts=True
    )
    assert batch.groups.tolist() == [4, 2, 4]
    assert batch.rewards[[0, 2]].tolist() == [1.0, 0.5]
    assert batch.rewards[1].isnan()
    assert batch.on_policy.tolist() == [True, False, True]


def test_what_an_environment_said_is_read_and_not_predicted() -> None:
    turns = [("model", 2), ("environment", 3), ("model", 2)]
    several = replace(
        rollout("a", [5, 9], [7, 1, 10, 11, 12, 8, 1], 1.0),
        turns=tuple({"by": by, "tokens": tokens, "text": ""} for by, tokens in turns),
        sampling_logprobs=(-1.0, -2.0, -3.0, -4.0),
        kept_ids=kept_ids.encode([[7, 2], [1], [8, 3, 4], [1, 2]]),
    )
    (micro,) = pack([several, rollout("a", [5, 9], [8, 1])], token_budget=100, share_prompts=True)
    assert micro.input_ids.tolist() == [5, 9, 7, 1, 10, 11, 12, 8, 8]  # the prompt once
    assert micro.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 2]
    assert micro.predictors.tolist() == [1, 2, 6, 7, 1, 8]
    assert micro.targets.tolist() == [7, 1, 8, 1, 8, 1]
    assert micro.cu_seqlens.tolist() == [0, 4, 6]
    assert micro.sampling_logprobs.tolist()[:4] == [-1.0, -2.0, -3.0, -4.0]
    assert micro.kept_ids is not None
    assert [set(row.tolist()) - {-1} for row in micro.kept_ids[:4]] == [
        {7, 2},
        {1},
        {8, 3, 4},
        {1, 2},
    ]


def test_end_tokens_are_barred_at_the_beginning_of_each_turn() -> None:
    turns = [("model", 3), ("environment", 2), ("model", 1)]
    several = replace(
        rollout("a", [5], [7, 8, 1, 10, 11, 12]),
        turns=tuple({"by": by, "tokens": tokens, "text": ""} for by, tokens in turns),
    )
    (micro,) = pack([several], token_budget=100, share_prompts=True, min_new_tokens=2)
    assert micro.early is not None and micro.early.tolist() == [0, 1, 3]
    assert micro.later is not None and micro.later.tolist() == [2]
