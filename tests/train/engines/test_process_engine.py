"""Sampling in a process of its own: the completions and numbers of the policy that was copied."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from agro_train.config import TrainConfig
from agro_train.data.chat import Renderer
from agro_train.data.prompts import render
from agro_train.engines import process_engine
from agro_train.engines.engine import BrokenEngine, Sampling
from agro_train.engines.process_engine import ProcessEngine
from agro_train.engines.transformers_engine import generate
from agro_train.engines.turns import Dialogue
from agro_train.environments.pool import Environments
from agro_train.policy import tiny
from agro_train.policy.logprobs import with_sampling_logprobs
from agro_train.policy.policy import Policy
from agro_train.types import Rollout

TOKENIZER = tiny.build_tokenizer()
ENDS = {TOKENIZER.eos_token_id}
PROMPTS = [render({"prompt": text}, TOKENIZER, "{prompt}") for text in ("1+2=", "45+678=")]
CONFIG = TrainConfig(max_completion_length=6, temperature=1.3)
ASK: dict[str, Any] = {"seeds": [3, 4], "num_generations": 3}


@pytest.fixture(scope="module")
def engine() -> Iterator[ProcessEngine]:
    policy = Policy(tiny.build_model(len(TOKENIZER), seed=0).eval())
    engine = ProcessEngine(policy, Accelerator(cpu=True), TOKENIZER, ENDS, CONFIG)
    yield engine
    engine.close()
    assert not Path(engine.folder.name).exists()


def sample(engine: ProcessEngine, temperature: float, step: int) -> list[Rollout]:
    groups = dict(engine.sample(PROMPTS, **ASK, temperature=temperature, step=step))
    return [rollout for place in range(len(PROMPTS)) for rollout in groups[place]]


def here(engine: ProcessEngine, temperature: float, step: int) -> list[Rollout]:
    """The same in this process."""
    return generate(
        engine.policy.model,
        TOKENIZER,
        PROMPTS,
        **ASK,
        temperature=temperature,
        max_completion_length=6,
        batch_size=CONFIG.generation_batch_size,
        end_tokens=ENDS,
        step=step,
    )


def test_completions_are_those_of_the_weights_that_were_copied(engine: ProcessEngine) -> None:
    for step in range(2):
        snapshot = engine.snapshot(step, PROMPTS[0])
        expected = here(engine, 1.3, step)
        with torch.no_grad():
            for parameter in engine.policy.parameters():  # as an update does, once they are copied
                parameter += 0.05 * torch.randn_like(parameter)
        engine.load(snapshot)
        assert not any(file.exists() for file in snapshot.files)
        ours = sample(engine, 1.3, step)
        assert [r.completion_ids for r in ours] == [r.completion_ids for r in expected]
        assert {r.step for r in ours} == {step} and {r.temperature for r in ours} == {1.3}


def test_each_token_has_the_log_probability_that_the_trainer_gives_it(
    engine: ProcessEngine,
) -> None:
    engine.load(engine.snapshot(7, PROMPTS[0]))
    sampled = sample(engine, 1.3, 7)
    scored = with_sampling_logprobs(sampled, engine.policy, CONFIG, torch.device("cpu"))
    for ours, theirs in zip(sampled, scored, strict=True):
        assert ours.sampling_logprobs is not None
        assert len(ours.sampling_logprobs) == len(ours.completion_ids)
        assert sum(ours.sampling_logprobs) == pytest.approx(theirs.sampling_logprob, abs=1e-5)


def test_greedy_completions_have_no_log_probability(engine: ProcessEngine) -> None:
    engine.load(engine.snapshot(8, PROMPTS[0]))
    greedy = sample(engine, 0.0, 8)
    assert [r.completion_ids for r in greedy] == [r.completion_ids for r in here(engine, 0.0, 8)]
    assert all(r.sampling_logprobs is None for r in greedy)


def test_a_process_that_ends_is_one_sentence() -> None:
    policy = Policy(tiny.build_model(len(TOKENIZER), seed=0).eval())
    engine = ProcessEngine(policy, Accelerator(cpu=True), TOKENIZER, ENDS, CONFIG)
    (worker,) = engine.workers._workers
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(BrokenEngine, match="expected completions of the process that samples"):
        sample(engine, 1.0, 0)
    engine.close()


def test_settings_of_the_sampling_and_the_runs_own_end_tokens_hold_there_too() -> None:
    """The run knows an end token that the model's configuration does not name."""
    config = replace(CONFIG, top_k=4, min_new_tokens=2, stop=["3"])
    ends = {*ENDS, TOKENIZER.convert_tokens_to_ids("2")}
    policy = Policy(tiny.build_model(len(TOKENIZER), seed=0).eval(), ends)
    engine = ProcessEngine(policy, Accelerator(cpu=True), TOKENIZER, ends, config)
    engine.load(engine.snapshot(0, PROMPTS[0]))
    expected = generate(
        policy.model,
        TOKENIZER,
        PROMPTS,
        **ASK,
        temperature=1.3,
        max_completion_length=6,
        batch_size=config.generation_batch_size,
        end_tokens=ends,
        step=0,
        sampling=Sampling.of(config),
    )
    ours = sample(engine, 1.3, 0)
    engine.close()
    assert [r.completion_ids for r in ours] == [r.completion_ids for r in expected]
    assert [r.finish for r in ours] == [r.finish for r in expected]
    assert [r.kept_ids for r in ours] == [r.kept_ids for r in expected]
    assert any(r.finish == "stop" for r in ours) and all(r.kept_ids for r in ours)
    scored = with_sampling_logprobs(ours, policy, config, torch.device("cpu"))
    for mine, theirs in zip(ours, scored, strict=True):
        assert sum(mine.sampling_logprobs or ()) == pytest.approx(theirs.sampling_logprob, abs=1e-5)


def test_a_process_that_fails_leaves_a_sentence_and_room_for_the_next_copy() -> None:
    policy = Policy(tiny.build_model(len(TOKENIZER), seed=0).eval())
    engine = ProcessEngine(policy, Accelerator(cpu=True), TOKENIZER, ENDS, CONFIG)
    with pytest.raises(BrokenEngine, match="expected completions of the process that samples"):
        sample(engine, 1.0, 0)  # without weights, which is an error of Python's there
    snapshot = engine.snapshot(1, PROMPTS[0])  # where its folder has gone with it
    assert all(file.is_file() for file in snapshot.files)
    engine.close()


def test_copies_wait_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny.build_model(len(TOKENIZER), seed=0).eval())
    size = 4 * sum(p.numel() for p in policy.parameters())
    for free, memory in ((3 * size + 1, True), (3 * size, False)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(process_engine.shutil, "disk_usage", lambda _, usage=usage: usage)
        found = process_engine.place(policy, replace(CONFIG, max_staleness=2))
        assert (found is not None) == memory


def test_several_turns_are_scored_as_the_trainer_scores_them() -> None:
    config = replace(CONFIG, max_completion_length=12, stop=["3", "7"])
    policy = Policy(tiny.build_model(len(TOKENIZER), seed=0).eval())
    environments = Environments("tests.train.environments.odd:Counts", 30.0)
    dialogue = Dialogue(environments, Renderer(TOKENIZER), config, 40)
    engine = ProcessEngine(policy, Accelerator(cpu=True), TOKENIZER, ENDS, config, dialogue)
    engine.load(engine.snapshot(0, PROMPTS[0]))
    sampled = sample(engine, 1.3, 0)
    assert any(len(r.sampled) > 1 for r in sampled)
    scored = with_sampling_logprobs(sampled, policy, config, torch.device("cpu"))
    for ours, theirs in zip(sampled, scored, strict=True):
        assert ours.sampling_logprobs is not None and len(ours.completion_ids) <= 12
        assert len(ours.sampling_logprobs) == len(ours.sampled_ids)
        assert sum(ours.sampling_logprobs) == pytest.approx(theirs.sampling_logprob, abs=1e-5)
    engine.close()
