"""Rollouts of several turns, by whatever engine samples one."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agro_train.config import TrainConfig
from agro_train.data import kept_ids
from agro_train.data.batch import pack
from agro_train.data.chat import Renderer
from agro_train.data.prompts import render
from agro_train.data.recorded import load_recorded
from agro_train.data.rollout_log import write_rollouts
from agro_train.engines.engine import cut
from agro_train.engines.transformers_engine import TransformersEngine
from agro_train.engines.turns import Dialogue
from agro_train.environments.pool import Environments
from agro_train.policy import tiny
from agro_train.refusal import Refusal
from agro_train.types import Prompt, Rollout
from tests.train.models import tiny_policy

TOKENIZER = tiny.build_tokenizer()
END = TOKENIZER.eos_token_id
PROMPTS = [
    render({"prompt": text, "answer": "3"}, TOKENIZER, "{prompt}") for text in ("1+2=", "45+678=")
]
CONFIG = TrainConfig(max_completion_length=24, environment="a:B")
ASK: dict[str, Any] = {"seeds": [3, 4], "num_generations": 2, "temperature": 1.0, "step": 5}
ODD = "tests.train.environments.odd"


def ids_of(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text)["input_ids"]
    return found


class Says:
    """One turn after another as an engine, out of a list; the end token is the 1 behind each."""

    def __init__(self, *turns: str) -> None:
        self.turns = turns
        self.asked: list[tuple[Sequence[Prompt], Any]] = []

    def __call__(
        self, prompts: Sequence[Prompt], **ask: Any
    ) -> Iterator[tuple[int, list[Rollout]]]:
        text = self.turns[min(len(self.asked), len(self.turns) - 1)]
        self.asked.append((prompts, ask))
        limits = ask.get("limits") or [CONFIG.max_completion_length] * len(prompts)
        for place in reversed(range(len(prompts))):
            ids = [*ids_of(text), END][: limits[place]]
            logprobs = [-0.5] * len(ids)
            turn = cut(
                prompts[place],
                ids,
                TOKENIZER,
                {END},
                1.0,
                ask["step"],
                logprobs,
                kept_sets=[[i, 14] for i in ids],
            )
            yield place, [turn] * ask["num_generations"]


def dialogue(name: str, config: TrainConfig = CONFIG, **settings: Any) -> Dialogue:
    environments = Environments(f"{ODD}:{name}", 30.0)
    return Dialogue(environments, Renderer(TOKENIZER), replace(config, **settings), 40)


def rollouts(name: str, says: Says, **settings: Any) -> list[Rollout]:
    groups = dict(dialogue(name, **settings).sample(says, PROMPTS, **ASK))
    return [r for place in range(len(PROMPTS)) for r in groups[place]]


def test_turns_follow_each_other_and_only_the_models_are_sampled() -> None:
    says = Says("7+8=", ",3", "95")
    found = rollouts("Counts", says, reward=["environment"])
    assert [r.group for r in found] == [p.group for p in PROMPTS for _ in range(2)]
    for r, prompt in zip(found, [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, strict=True):
        assert r.prompt_ids == prompt.ids and r.prompt == prompt.text and r.step == 5
        spelled = [*ids_of("7+8="), END, *ids_of("1"), *ids_of(",3"), END, *ids_of("2")]
        assert list(r.completion_ids) == [*spelled, *ids_of("95"), END]
        assert r.turns is not None
        assert [(t["by"], t["tokens"], t["text"]) for t in r.turns] == [
            ("model", 5, "7+8="),
            ("environment", 1, "1"),
            ("model", 3, ",3"),
            ("environment", 1, "2"),
            ("model", 3, "95"),
        ]
        assert list(r.sampled_ids) == [*ids_of("7+8="), END, *ids_of(",3"), END, *ids_of("95"), END]
        assert r.completion == "95" and r.finish == "stop" and r.failure is None
        assert r.sampling_logprobs == (-0.5,) * 11 and r.environment_reward == 3.0
        assert [set(kept) for kept in kept_ids.decode(r.kept_ids or "")] == [
            {i, 14} for i in r.sampled_ids
        ]
    first, second, third = says.asked
    assert "limits" not in first[1] and first[1]["num_generations"] == 2
    assert second[1]["limits"] == [24 - 6] * 4 and third[1]["limits"] == [24 - 10] * 4
    assert second[0][3].ids == PROMPTS[1].ids + found[3].completion_ids[:6]
    seeds = [seed for _, ask in says.asked for seed in ask["seeds"]]
    assert len(set(seeds)) == 2 + 4 + 4  # of the prompt, then of prompt, number and turn
    again = Says("7+8=", ",3", "95")
    assert rollouts("Counts", again, reward=["environment"]) == found
    assert [ask["seeds"] for _, ask in again.asked] == [ask["seeds"] for _, ask in says.asked]


@pytest.mark.parametrize(
    ("settings", "turns", "finish"),
    [
        ({"max_turns": 2}, 2, "stop"),
        ({"max_turns": 1}, 1, "stop"),
        ({"max_completion_length": 12}, 2, "length"),  # 3 + 3 + 3, and no room for an answer
        ({"max_completion_length": 8}, 2, "length"),  # the second turn is cut
        ({"max_completion_length": 6}, 1, "length"),
    ],
    ids=str,
)
def test_bounds_end_a_rollout(settings: dict[str, Any], turns: int, finish: str) -> None:
    says = Says("12")
    for r in rollouts("Never", says, **settings, reward=["environment"]):
        assert len(r.sampled) == turns and r.finish == finish and r.failure is None
        assert len(r.completion_ids) <= settings.get("max_completion_length", 24)
        assert len(r.completion_ids) == r.sampled[-1].stop  # it ends with a turn of the model's
        assert r.environment_reward == 0.0  # it came to a bound, and had no number
    assert all(r.environment_reward is None for r in rollouts("Never", Says("12"), **settings))


def test_an_environments_own_prompt_is_its_groups() -> None:
    says = Says("1")
    found = rollouts("Asks", says, max_turns=2)
    prompts = {(r.group, r.prompt, r.prompt_ids) for r in found}
    assert len(prompts) == 2  # whose random numbers are the prompt's
    for _, text, ids in prompts:
        assert text.startswith("3+") and text.endswith("=") and list(ids) == ids_of(text)
    assert found[0].columns["prompt"] == "1+2=" and found[0].environment_reward == 0.5
    assert [p.text for p in says.asked[0][0]] == [found[0].prompt, found[2].prompt]


def test_another_prompt_for_the_same_row_is_another_group(tmp_path: Path) -> None:
    """A log of several steps, whose resets draw other prompts for the same rows, is read."""
    drawing = dialogue("Asks", max_turns=2)
    logged: list[Rollout] = []
    for seeds in ([3, 4], [5, 6]):
        groups = dict(drawing.sample(Says("1"), PROMPTS, **{**ASK, "seeds": seeds}))
        logged += [replace(r, reward=float(i)) for i in (0, 1) for r in groups[i]]
    prompts = {r.prompt_ids for r in logged}
    assert len(prompts) > 2 and {r.columns["prompt"] for r in logged} == {"1+2=", "45+678="}
    asked = {(r.prompt_ids, r.columns["prompt"]) for r in logged}
    assert len({r.group for r in logged}) == len(asked)
    write_rollouts(tmp_path / "log.jsonl", logged)
    log = [str(tmp_path / "log.jsonl")]
    read = load_recorded(log, TOKENIZER, "{prompt}", vocab_size=len(TOKENIZER), context=None)
    assert sum(map(len, read.groups)) == len(logged)
    # A reset that says what the row does leaves the row's group.
    plain = dict(dialogue("Counts").sample(Says("1"), PROMPTS, **ASK))
    assert plain[0][0].group == PROMPTS[0].group


@pytest.mark.parametrize(
    ("name", "failed", "why"),
    [
        ("Raises", 4, "failed in 4 of 4 rollouts, .* it failed: KeyError"),
        ("Different", 2, "it gave rollouts of one row different prompts"),
        (
            "LongPrompt",
            4,
            "it gave a prompt of 600 tokens, more than the 40 that max_prompt_length",
        ),
        ("BadReset", 4, "it failed: environment: expected reset to say a text, .* got '5'"),
    ],
)
def test_a_rollout_whose_environment_fails_has_one_turn_and_no_reward(
    name: str, failed: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = rollouts(name, Says("12"))
    assert [r.failure for r in found].count("error") == failed
    assert all(len(r.sampled) == 1 for r in found if r.failure)
    for place in range(2):
        assert len({r.prompt_ids for r in found[2 * place : 2 * place + 2]}) == 1
    assert re.search(why, caplog.text)


def test_a_first_prompt_is_tried_before_any_work() -> None:
    dialogue("Asks").check(PROMPTS[0])
    with pytest.raises(
        Refusal, match="environment: expected .*BadReset to begin a rollout of .1.2="
    ):
        dialogue("BadReset").check(PROMPTS[0])


def test_transformers_samples_each_turn_from_all_that_came_before() -> None:
    """A turn is what a lone prompt of the same tokens would get, and its logprobs add up."""
    policy = tiny_policy(seed=3, dtype=torch.float32)
    config = replace(CONFIG, max_completion_length=16, max_turns=3, stop=["3", "7"])
    engine = TransformersEngine(
        lambda function: function(policy.model),
        TOKENIZER,
        {END},
        config,
        dialogue("Counts", config),
    )
    found = engine.complete(PROMPTS, **{**ASK, "num_generations": 4})
    assert len(found) == 8 and {len(r.sampled) for r in found} - {1}
    plain = TransformersEngine(lambda function: function(policy.model), TOKENIZER, {END}, config)
    first = plain.complete(PROMPTS, **{**ASK, "num_generations": 4})
    for r, alone in zip(found, first, strict=True):
        assert r.completion_ids[: len(alone.completion_ids)] == alone.completion_ids
        assert len(r.completion_ids) <= 16
    (micro,) = pack(found, token_budget=1000, share_prompts=True)
    packed = policy(micro, 1.0).logprobs.split(micro.cu_seqlens.diff().tolist())
    for r, ours in zip(found, packed, strict=True):
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        logits = policy.model(input_ids=ids).logits[0, len(r.prompt_ids) - 1 : -1]
        whole = logits.log_softmax(-1).gather(1, ids[0, len(r.prompt_ids) :, None])[:, 0]
        places = [i for part in r.sampled for i in part]
        assert torch.allclose(ours, whole[places], atol=1e-5)
    assert engine.complete(PROMPTS, **{**ASK, "num_generations": 4}) == found
