"""Generation: the distribution the trainer scores, exactly the sampled tokens, randomness from the
seed.
"""

from pathlib import Path
from typing import Any

import torch

from agro_train import tiny
from agro_train.config import TrainConfig
from agro_train.data import render
from agro_train.model import end_tokens, load_model, load_tokenizer
from agro_train.rollout import generate
from agro_train.types import Prompt, Rollout
from tests.train.models import SPECIAL, save_llama3_miniature, tiny_policy

TOKENIZER = tiny.build_tokenizer()
PROMPTS = [render({"prompt": text}, TOKENIZER, "{prompt}") for text in ("1+2=", "3", "45+678=")]


def run(prompts: list[Prompt] = PROMPTS, **changes: Any) -> list[Rollout]:
    options: dict[str, Any] = {
        "num_generations": 4,
        "temperature": 1.0,
        "max_completion_length": 6,
        "batch_size": 8,
        "end_tokens": {TOKENIZER.eos_token_id},
        "seed": 5,
    }
    model = tiny_policy(dtype=torch.float32).model
    return generate(model, TOKENIZER, prompts, **{**options, **changes})


def test_greedy_is_the_argmax_of_the_model_without_cache_or_padding() -> None:
    model = tiny_policy(dtype=torch.float32).model
    for rollout in run(num_generations=2, temperature=0.0):
        ids = list(rollout.prompt_ids)
        for token in rollout.completion_ids:
            assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_completions_come_in_order_and_are_functions_of_the_seed() -> None:
    first, again, other = run(), run(), run(seed=6)
    assert [r.group for r in first] == [p.group for p in PROMPTS for _ in range(4)]
    assert [r.completion_ids for r in first] == [r.completion_ids for r in again]
    assert [r.completion_ids for r in first] != [r.completion_ids for r in other]


def test_sampling_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    run()
    assert torch.equal(torch.rand(3), expected)


def test_sampled_frequencies_are_the_tempered_softmax() -> None:
    model = tiny_policy(dtype=torch.float32).model
    temperature, count = 1.7, 4000
    rollouts = run(
        [PROMPTS[0]],
        num_generations=count,
        temperature=temperature,
        max_completion_length=1,
        batch_size=count,
    )
    counts = torch.bincount(torch.tensor([r.completion_ids[0] for r in rollouts]), minlength=15)
    logits = model(input_ids=torch.tensor([PROMPTS[0].ids])).logits[0, -1].detach()
    expected = (logits / temperature).softmax(-1) * count
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 36.1  # the 0.1 % point at 14 degrees of freedom; the seed is fixed


def test_completion_ends_with_the_first_end_token_or_at_the_limit() -> None:
    ends = {TOKENIZER.eos_token_id, 5, 9}
    rollouts = run(num_generations=30, end_tokens=ends)
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        assert not ends & set(r.completion_ids[:-1])
        assert (r.finish == "stop") == (r.completion_ids[-1] in ends)
        assert r.finish == "stop" or len(r.completion_ids) == 6


def test_all_of_llama3s_end_tokens_count_and_its_sampling_defaults_do_not(tmp_path: Path) -> None:
    save_llama3_miniature(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    model = load_model(str(tmp_path), TrainConfig())
    ids = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[1:4]}
    assert end_tokens(model, tokenizer) == ids
    assert model.generation_config.temperature is None
    assert model.generation_config.top_p is None
