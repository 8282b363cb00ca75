"""Generation: the distribution the trainer scores, exactly the sampled tokens, randomness from the
prompt's seed and nothing else.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from agro_train.config import TrainConfig
from agro_train.data import kept_ids
from agro_train.data.prompts import render
from agro_train.engines.engine import Sampling
from agro_train.engines.transformers_engine import (
    Draw,
    exponentials,
    generate,
    most_likely,
    random_bits,
)
from agro_train.policy import tiny
from agro_train.policy.load import end_tokens, load_model, load_tokenizer
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
        "seeds": [5 + PROMPTS.index(prompt) for prompt in prompts],
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
    first, again, other = run(), run(), run(seeds=[5, 6, 8])
    assert [r.group for r in first] == [p.group for p in PROMPTS for _ in range(4)]
    assert [r.completion_ids for r in first] == [r.completion_ids for r in again]
    different = [a.completion_ids != b.completion_ids for a, b in zip(first, other, strict=True)]
    assert not any(different[:8]) and any(different[8:])  # only the third prompt's seed is another


@pytest.mark.parametrize("batch_size", [1, 4, 12])
def test_completions_do_not_depend_on_the_batch_they_are_in(batch_size: int) -> None:
    expected: dict[str, list[tuple[int, ...]]] = {prompt.text: [] for prompt in PROMPTS}
    for rollout in run():
        expected[rollout.prompt].append(rollout.completion_ids)
    for order in ([0, 1, 2], [2, 0, 1], [1]):  # a rank's share is some of the prompts
        prompts = [PROMPTS[i] for i in order]
        for i, rollout in enumerate(run(prompts, batch_size=batch_size)):
            assert rollout.completion_ids == expected[rollout.prompt][i % 4]


def test_first_completions_of_a_larger_group_are_those_of_a_smaller_one() -> None:
    small, large = (run([PROMPTS[2]], num_generations=n) for n in (2, 5))
    assert [r.completion_ids for r in small] == [r.completion_ids for r in large[:2]]


def test_random_numbers_are_their_own_for_each_seed_position_and_token() -> None:
    keys = torch.stack([random_bits(seed, 5) for seed in range(200)])
    assert torch.equal(random_bits(7, 5), keys[7]) and torch.equal(random_bits(7, 3), keys[7, :3])
    times = exponentials(keys.flatten()[:, None], torch.arange(100))
    assert len(times.unique()) == times.numel() and times.min() > 0
    counts = torch.histc((-times).exp(), bins=100, min=0, max=1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 148.2  # 0.1 % point, 99 degrees of freedom
    # Neighbours, in token and in position: correlation 0 to 4 standard errors.
    for a, b in ((times[:, 1:], times[:, :-1]), (times[1:], times[:-1])):
        assert abs(float(((a - 1) * (b - 1)).mean())) * a.numel() ** 0.5 < 4


@pytest.mark.parametrize("head", [1, 3, 256])
def test_draw_is_from_the_softmax_however_much_of_it_is_the_head(
    head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Draw, "HEAD", head)
    count, logits = 20_000, torch.tensor([0.3, -torch.inf, 1.5, -1.0, 2.0, 0.1, -4.0])
    keys = torch.stack([random_bits(seed, 2) for seed in range(count)])
    draw = Draw(keys, temperature=1.7)
    for _ in range(2):  # positions
        scores = draw(torch.zeros(count, 1), logits.expand(count, -1))
        assert int(scores.isfinite().sum()) == count
        counts = torch.bincount(scores.argmax(-1), minlength=7)
        assert counts[1] == 0
        expected = ((logits / 1.7).softmax(-1) * count)[[0, 2, 3, 4, 5, 6]]
        chi_squared = float(((counts[[0, 2, 3, 4, 5, 6]] - expected) ** 2 / expected).sum())
        assert chi_squared < 20.5  # 0.1 % point, 5 degrees of freedom


TRUNCATED = [
    Sampling(top_k=3),
    Sampling(top_k=1),
    Sampling(top_p=0.8),
    Sampling(top_p=1e-6),
    Sampling(min_p=0.1),
    Sampling(top_k=5, top_p=0.8),
    Sampling(top_k=5, min_p=0.1),
    Sampling(top_k=6, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("sampling", TRUNCATED, ids=str)
def test_kept_ids_are_those_of_transformers_own_warpers(sampling: Sampling) -> None:
    """In vLLM's order: min_p, top_k, top_p."""
    logits = 2 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    expected = logits.double()
    if sampling.min_p:
        expected = MinPLogitsWarper(sampling.min_p)(None, expected)
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    probabilities = logits.softmax(-1)
    ids, likely = most_likely(probabilities, sampling)
    for row in range(50):
        kept = ids[row][ids[row] >= 0]
        assert set(kept.tolist()) == set(expected[row].isfinite().nonzero()[:, 0].tolist())
        assert torch.equal(likely[row][: len(kept)], probabilities[row, kept])
        assert not likely[row][len(kept) :].any()


def test_no_more_ids_are_kept_than_can_be_recorded() -> None:
    flat = torch.full((2, 5000), 1 / 5000)
    assert most_likely(flat, Sampling(top_p=0.9))[0].shape == (2, 1024)
    assert most_likely(flat, Sampling(top_p=0.1))[0].shape == (2, 500)


@pytest.mark.parametrize("sampling", TRUNCATED[2:], ids=str)
def test_draw_is_from_the_softmax_over_the_ids_kept(sampling: Sampling) -> None:
    count, logits = 20_000, torch.tensor([0.3, -torch.inf, 1.5, -1.0, 2.0, 0.1, -4.0])
    keys = torch.stack([random_bits(seed, 1) for seed in range(count)])
    draw = Draw(keys, 1.7, sampling)
    tokens = draw(torch.zeros(count, 1), logits.expand(count, -1)).argmax(-1)
    (kept,) = draw.kept_of(0)
    counts = torch.bincount(tokens, minlength=7)
    assert int(counts.sum()) == int(counts[kept].sum()) == count
    expected = (logits[kept] / 1.7).softmax(-1) * count
    chi_squared = float(((counts[kept] - expected) ** 2 / expected).sum())
    assert chi_squared < 20.5  # 0.1 % point, 5 degrees of freedom; here there are fewer


def test_completions_say_what_each_of_their_tokens_was_drawn_from() -> None:
    """By the model itself, without cache or padding."""
    model = tiny_policy(dtype=torch.float32).model
    sampling = Sampling(top_p=0.8)
    for rollout in run(sampling=sampling, temperature=1.3):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        probabilities = (model(input_ids=ids).logits[0] / 1.3).softmax(-1)
        expected, _ = most_likely(probabilities[len(rollout.prompt_ids) - 1 : -1], sampling)
        sets = kept_ids.decode(rollout.kept_ids or "")
        assert len(sets) == len(rollout.completion_ids)
        for token, kept, ours in zip(rollout.completion_ids, sets, expected, strict=True):
            assert token in kept and set(kept) == set(ours[ours >= 0].tolist())


def test_greedy_completions_are_the_same_and_keep_nothing() -> None:
    assert run(temperature=0.0) == run(temperature=0.0, sampling=Sampling(top_p=0.5, min_p=0.1))
    assert all(rollout.kept_ids is None for rollout in run())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=14)], ids=str)
def test_no_end_token_comes_before_min_new_tokens(temperature: float, sampling: Sampling) -> None:
    likely = run(temperature=0.0, max_completion_length=1, end_tokens={99})[0].completion_ids[0]
    ends = {TOKENIZER.eos_token_id, likely}
    changes = {"num_generations": 30, "end_tokens": ends, "temperature": temperature}
    sampling = replace(sampling, min_new_tokens=4)
    lengths = [len(r.completion_ids) for r in run(sampling=sampling, **changes)]
    assert min(lengths) > 4 and (temperature == 0.0 or {5, 6} == set(lengths))
    assert min(len(r.completion_ids) for r in run(**changes)) < 4
    for rollout in run(sampling=sampling, **changes):
        sets = kept_ids.decode(rollout.kept_ids) if rollout.kept_ids else []
        assert not any(ends & set(kept.tolist()) for kept in sets[:4])


def test_stop_strings_end_generation_where_they_end_the_completion() -> None:
    """The completions are those without, cut; and no row is continued once all have stopped."""
    free = run(num_generations=20, end_tokens={99}, max_completion_length=40)
    stop = tuple("0123456789")
    sampling = Sampling(stop=stop)
    stopped = run(num_generations=20, end_tokens={99}, max_completion_length=40, sampling=sampling)
    for ours, whole in zip(stopped, free, strict=True):
        length = len(ours.completion_ids)
        assert ours.completion_ids == whole.completion_ids[:length] and ours.finish == "stop"
        assert ours.completion[-1] in stop and not set(ours.completion[:-1]) & set(stop)


def test_rounding_changes_a_draw_no_more_often_than_it_must() -> None:
    """The least that any way of drawing can do is half the sum of the changes of probabilities."""
    count, vocabulary = 2000, 5000
    logits = 2 * torch.randn(vocabulary)
    noisy = logits + 1e-4 * torch.randn(vocabulary)
    least = 0.5 * float((logits.softmax(-1) - noisy.softmax(-1)).abs().sum())
    keys = torch.stack([random_bits(seed, 1) for seed in range(count)])
    one, other = (
        Draw(keys, temperature=1.0)(keys, values.expand(count, -1)).argmax(-1)
        for values in (logits, noisy)
    )
    assert len(one.unique()) > 200
    assert int((one != other).sum()) <= 2 + 4 * count * least


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
