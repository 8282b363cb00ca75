"""Completions from the current policy, by transformers' `generate`.

Each distinct prompt is read once: its key-value cache is repeated for the group's completions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from agro_train.types import Prompt, Rollout


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    num_generations: int,
    temperature: float,
    max_completion_length: int,
    batch_size: int,
    end_tokens: set[int],
    seed: int,
    step: int | None = None,
) -> list[Rollout]:
    """`num_generations` completions of each prompt, neighbours in the order of the prompts.

    temperature 0 is greedy decoding; otherwise tokens are drawn from the full softmax at that
    temperature (no top-k, no top-p), which is the distribution the trainer scores. Randomness comes
    from `seed` alone. Prompts of similar length are generated together, about `batch_size`
    sequences at a time, but never less than one prompt's.
    """
    prompts_at_once = max(1, batch_size // num_generations)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    rollouts: list[list[Rollout]] = [[] for _ in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(by_length), prompts_at_once):
            indices = by_length[start : start + prompts_at_once]
            chosen = [prompts[i] for i in indices]
            completions = _complete(
                model,
                _generation_config(tokenizer, temperature, max_completion_length, end_tokens),
                [prompt.ids for prompt in chosen],
                num_generations,
            )
            for i, prompt, group in zip(indices, chosen, completions, strict=True):
                rollouts[i] = [
                    _rollout(prompt, ids, tokenizer, end_tokens, temperature, step) for ids in group
                ]
    return [rollout for group in rollouts for rollout in group]


def _generation_config(
    tokenizer: Any, temperature: float, max_completion_length: int, end_tokens: set[int]
) -> GenerationConfig:
    """Every setting that shapes the distribution, spelled out, so that no default can."""
    greedy = temperature == 0
    pad = tokenizer.pad_token_id
    sampling = {} if greedy else {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_completion_length,
        do_sample=not greedy,
        repetition_penalty=1.0,
        eos_token_id=sorted(end_tokens),
        pad_token_id=pad if pad is not None else min(end_tokens),
        use_cache=True,
        **sampling,
    )


def _complete(
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    prompts: Sequence[tuple[int, ...]],
    num_generations: int,
) -> list[list[list[int]]]:
    """Completion ids (prompts, num_generations, up to max_new_tokens), padding included."""
    input_ids, attention_mask = _left_pad(prompts, generation_config.pad_token_id)
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    cache = DynamicCache(config=model.config)
    if input_ids.shape[1] > 1:
        # All but the last token of each prompt, once; generate() reads the last one per completion.
        model(
            input_ids=input_ids[:, :-1],
            attention_mask=attention_mask[:, :-1],
            position_ids=(attention_mask[:, :-1].cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(num_generations)
    output = model.generate(
        input_ids=input_ids.repeat_interleave(num_generations, dim=0),
        attention_mask=attention_mask.repeat_interleave(num_generations, dim=0),
        past_key_values=cache,
        generation_config=generation_config,
    )
    completions = output[:, input_ids.shape[1] :]
    nested: list[list[list[int]]] = completions.view(len(prompts), num_generations, -1).tolist()
    return nested


def _left_pad(prompts: Sequence[tuple[int, ...]], pad: int) -> tuple[Tensor, Tensor]:
    """(prompts, longest) ids and mask; generation needs every prompt to end in one column."""
    longest = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), longest), pad)
    attention_mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(prompts):
        input_ids[i, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[i, longest - len(ids) :] = 1
    return input_ids, attention_mask


def _rollout(
    prompt: Prompt,
    ids: list[int],
    tokenizer: Any,
    end_tokens: set[int],
    temperature: float,
    step: int | None,
) -> Rollout:
    """Cuts the padding off by the first end token, which stays: it was sampled, so it is scored."""
    length = next((i + 1 for i, token in enumerate(ids) if token in end_tokens), None)
    kept = tuple(ids[:length])
    return Rollout(
        group=prompt.group,
        prompt=prompt.text,
        prompt_ids=prompt.ids,
        completion=tokenizer.decode(kept, skip_special_tokens=True),
        completion_ids=kept,
        finish="length" if length is None else "stop",
        reward=None,
        step=step,
        temperature=temperature,
        columns=prompt.columns,
    )
