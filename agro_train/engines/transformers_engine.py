"""Completions from the current policy: what an engine is, and the one of transformers' `generate`.

A completion's randomness is a function of its prompt's seed and its number in the group, and of
nothing else. So the other prompts of the batch, their order, the batch size and the number of ranks
change it only through the rounding of the forward pass, whose kernels sum in another order for
another shape or padding. For SmolLM2-135M that changes a few tokens in a million in float32, and
one in a hundred in bfloat16; the rest of their completions then differs too.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
)

from agro_train.config import TrainConfig
from agro_train.engines.engine import PLAIN, Ask, Sampling, completion_seed, cut
from agro_train.engines.turns import Dialogue, Groups, sampled
from agro_train.policy.attention import generating
from agro_train.settings import MOST_KEPT
from agro_train.transfer import upload
from agro_train.types import Prompt, Rollout


class TransformersEngine:
    """The policy itself, by transformers' `generate`.

    Args:
        with_model: calls a function with the transformers model, ready for generation.
        dialogue: with the environment, where rollouts have several turns.
    """

    def __init__(
        self,
        with_model: Callable[[Callable[[PreTrainedModel], list[Rollout]]], list[Rollout]],
        tokenizer: Any,
        end_tokens: set[int],
        config: TrainConfig,
        dialogue: Dialogue | None = None,
    ) -> None:
        self.with_model, self.dialogue = with_model, dialogue
        self.tokenizer, self.end_tokens, self.config = tokenizer, end_tokens, config

    def complete(self, prompts: Sequence[Prompt], **ask: Unpack[Ask]) -> list[Rollout]:
        def whole(model: PreTrainedModel) -> list[Rollout]:
            groups = dict(sampled(self.dialogue, partial(self._one_turn, model), prompts, **ask))
            return [rollout for place in range(len(prompts)) for rollout in groups[place]]

        return self.with_model(whole)

    def _one_turn(
        self, model: PreTrainedModel, prompts: Sequence[Prompt], **ask: Unpack[Ask]
    ) -> Groups:
        found = generate(
            model,
            self.tokenizer,
            prompts,
            **ask,
            max_completion_length=self.config.max_completion_length,
            batch_size=self.config.generation_batch_size,
            end_tokens=self.end_tokens,
            sampling=Sampling.of(self.config),
        )
        size = ask["num_generations"]
        return [(i, found[i * size : (i + 1) * size]) for i in range(len(prompts))]


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    seeds: Sequence[int],
    num_generations: int,
    temperature: float,
    max_completion_length: int,
    batch_size: int,
    end_tokens: set[int],
    step: int | None = None,
    sampling: Sampling = PLAIN,
    limits: Sequence[int] | None = None,
) -> list[Rollout]:
    """Completions as `Engine.complete` describes them.

    Each distinct prompt is read once: its key-value cache is repeated for the group's completions.
    Prompts of similar length are generated together, about `batch_size` sequences at a time, but
    never less than one prompt's.
    """
    prompts_at_once = max(1, batch_size // num_generations)
    rollouts: list[list[Rollout]] = [[] for _ in prompts]
    limits = limits or [max_completion_length] * len(prompts)
    context = getattr(model.config, "max_position_embeddings", None)
    with torch.no_grad(), generating(model):
        for indices in batches(prompts, limits, prompts_at_once, context):
            # A prompt that may have fewer has its own cut: they are the first of those it gets.
            length = max(limits[i] for i in indices)
            config = _generation_config(tokenizer, length, end_tokens, sampling)
            draw = None
            if temperature:
                streams = [
                    random_bits(completion_seed(seeds[i], number), length)
                    for i in indices
                    for number in range(num_generations)
                ]
                (keys,) = upload([torch.stack(streams)], model.device)
                draw = Draw(keys, temperature, sampling)
            ids = [prompts[i].ids for i in indices]
            stop = StopStrings(sampling, tokenizer, max(map(len, ids))) if sampling.stop else None
            completions = _complete(model, config, ids, num_generations, draw, stop)
            for place, (i, group) in enumerate(zip(indices, completions, strict=True)):
                rollouts[i] = [
                    cut(
                        prompts[i],
                        ids[: limits[i]],
                        tokenizer,
                        end_tokens,
                        temperature,
                        step,
                        sampling=sampling,
                        kept_sets=draw.kept_of(place * num_generations + number) if draw else None,
                    )
                    for number, ids in enumerate(group)
                ]
    return [rollout for group in rollouts for rollout in group]


def batches(
    prompts: Sequence[Prompt], limits: Sequence[int], count: int, context: int | None
) -> Iterator[list[int]]:
    """The places of `count` prompts of similar length at a time, fewer where the longest of them
    would come to more than `context` tokens by the time that the last one may have ended."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids)):
        length = len(prompts[i].ids) + max(limits[j] for j in [*batch, i])
        beyond = len(set(limits)) > 1 and context is not None and length > context
        if batch and (len(batch) == count or beyond):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def random_bits(seed: int, count: int) -> Tensor:
    """(count,) int64, every bit random. A longer one begins with the same numbers."""
    stream = bytearray(hashlib.shake_128(seed.to_bytes(8, "big")).digest(8 * count))
    return torch.frombuffer(stream, dtype=torch.int64)


def exponentials(keys: Tensor, numbers: Tensor) -> Tensor:
    """float64 from the exponential distribution, a function of the int64 key and number alone."""
    bits = keys + numbers * -0x61C8864680B583EB  # what follows is splitmix64's mixing
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        bits = (bits ^ _shift_right(bits, shift)) * factor
    return -((_shift_right(bits, 11).double() + 0.5) * 2.0**-53).log()


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Zeros come in from the left, where int64's own shift repeats the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Makes greedy decoding sample: leaves each row only the token that its random numbers draw.

    The token is the first to arrive in a race: each has a random exponential time of its own,
    divided by its probability. So rounding changes the token only where two would arrive together.
    (One random number looked up among the cumulative probabilities is as exact a draw, but every
    token's place there moves with those before it: it changes a hundred times as often.) Times are
    drawn for the HEAD likeliest tokens and for all others together, and only where those win for
    each of them: a random number for every token would cost more than all the rest.

    Args:
        keys: (rows, positions) int64, random bits.
    """

    HEAD = 256
    OTHERS = -1  # in the place of a token's id

    def __init__(self, keys: Tensor, temperature: float, sampling: Sampling = PLAIN) -> None:
        self.keys, self.temperature, self.sampling = keys, temperature, sampling
        self.position = 0
        self.kept: list[Any] = []  # of each position (rows, K) ids, -1 beyond those that were kept

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, V) fp32 logits to scores of 0 for the token drawn and -inf for the others."""
        del input_ids
        keys = self.keys[:, self.position, None]
        self.position += 1
        others = (scores / self.temperature).softmax(-1)
        if self.sampling.truncates:
            ids, likely = most_likely(others, self.sampling)
            self.kept.append(ids.int().cpu().numpy())
            # An id that is not kept has probability 0: it arrives never.
            first = (exponentials(keys, ids) / likely).argmin(-1, keepdim=True)
            tokens = ids.gather(1, first)
            return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)
        likely, ids = others.topk(min(self.HEAD, others.shape[1]), sorted=False)
        others.scatter_(1, ids, 0.0)
        times, first = (exponentials(keys, ids) / likely).min(-1)
        tokens = ids.gather(1, first[:, None])
        numbers = torch.full_like(keys, self.OTHERS)
        time_of_others = (exponentials(keys, numbers) / others.sum(-1, keepdim=True))[:, 0]
        (rows,) = (time_of_others < times).nonzero(as_tuple=True)
        if len(rows):
            # All of them are outside the head, so their own times have not been looked at yet.
            vocabulary = torch.arange(scores.shape[1], device=scores.device)
            race = exponentials(keys[rows], vocabulary) / others[rows]
            tokens[rows] = race.argmin(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)

    def kept_of(self, row: int) -> list[Any] | None:
        """The ids kept for each position of a row; None where all were."""
        if not self.sampling.truncates:
            return None
        return [ids[row][ids[row] >= 0] for ids in self.kept]


def most_likely(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(rows, K) the ids that min_p, top_k and top_p keep, in this order, and their probabilities;
    -1 and 0 beyond those. The order is vLLM's. There are MOST_KEPT at most, and one at least."""
    count = min(sampling.top_k or MOST_KEPT, probabilities.shape[1])
    likely, ids = probabilities.topk(count)  # sorted, so that what is kept comes first
    keep = likely > 0
    least = sampling.min_p * likely[:, :1]
    if sampling.min_p:
        keep &= likely >= least
    if sampling.top_p < 1:
        # The share is one of all that is left so far: of top_k ids, or of all.
        left = likely if sampling.top_k else probabilities
        total = left.where(left >= least, 0.0).sum(-1, keepdim=True)
        keep &= likely.cumsum(-1) - likely < sampling.top_p * total
    keep[:, 0] = True
    width = int(keep.sum(-1).max())
    keep, likely, ids = keep[:, :width], likely[:, :width], ids[:, :width]
    return ids.where(keep, -1), likely.where(keep, 0.0)


class StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Which rows have come to a stop string; `cut` finds the same place again."""

    def __init__(self, sampling: Sampling, tokenizer: Any, prompt_columns: int) -> None:
        self.sampling, self.tokenizer = sampling, tokenizer
        self.prompt_columns = prompt_columns

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        del scores, kwargs
        count = input_ids.shape[1] - self.prompt_columns
        if count <= self.sampling.min_new_tokens:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        newest = input_ids[:, -min(count, self.sampling.stop_window) :].tolist()
        found = [self.sampling.stops(ids, self.tokenizer) for ids in newest]
        return torch.tensor(found, device=input_ids.device)


def _generation_config(
    tokenizer: Any, max_completion_length: int, end_tokens: set[int], sampling: Sampling
) -> GenerationConfig:
    """Every setting that shapes the distribution, spelled out, so that no default can."""
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_completion_length,
        min_new_tokens=min(sampling.min_new_tokens, max_completion_length) or None,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=sorted(end_tokens),
        pad_token_id=pad if pad is not None else min(end_tokens),
        use_cache=True,
    )


def _complete(
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    prompts: Sequence[tuple[int, ...]],
    num_generations: int,
    draw: Draw | None,
    stop: StopStrings | None,
) -> list[list[list[int]]]:
    """Completion ids (prompts, num_generations, up to max_new_tokens), padding included. Greedy
    without `draw`."""
    padded = _left_pad(prompts, generation_config.pad_token_id)
    input_ids, attention_mask = upload(padded, model.device)
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
        logits_processor=[] if draw is None else [draw],
        stopping_criteria=[] if stop is None else [stop],
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
