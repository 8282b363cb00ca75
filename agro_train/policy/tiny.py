"""The embedded model: a Llama of 0.3 million weights with a character tokenizer, warm-started.

It needs no download. Its warm start is supervised training on worked two-digit sums by a careless
teacher, who forgets the carry as often as the task says. So the model knows the form and the facts,
but gets many sums wrong, and only the reward says which.
"""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agro_kernels import IGNORE_INDEX, linear_logprobs
from agro_train.data.tasks import TASKS, Row
from agro_train.refusal import Refusal
from agro_train.types import Prompt

ALPHABET = "0123456789+=,"
PAD, EOS = "<pad>", "<eos>"
# What the warm start teaches before training on a task: some prompts' answers, or all of them.
LESSONS = {
    "graded-sums": "graded-sums",
    "graded-sums-easy": "graded-sums",
    "graded-sums-hard": "graded-sums",
    "long-sums": "long-sums",
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; token 0 pads, token 1 ends a completion."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def build_config(vocab_size: int) -> LlamaConfig:
    """A Llama with grouped-query attention and an untied head."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=False,
    )


def build_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """The Llama with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(build_config(vocab_size))


def check_prompts(prompts: list[Prompt]) -> None:
    """Raises Refusal for a prompt with characters that the tokenizer does not know."""
    for prompt in prompts:
        unknown = set(prompt.text) - set(ALPHABET)
        if unknown:
            raise Refusal(
                f"data: expected prompts of the characters {ALPHABET} for model=tiny, got "
                f"{prompt.text[:40]!r}; choose another model"
            )


def lessons(data: str) -> list[Row]:
    """The teacher's rows to warm-start from, before training on `data`."""
    return TASKS[LESSONS.get(data, "tiny-arithmetic")]("train")


def warm_start(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[Row],
    *,
    steps: int,
    seed: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
) -> float:
    """Supervised training on worked answers, in place; a share of a row's own forgets the carry.

    Returns the last step's loss, nats a token.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 0.1, 1.0, total_iters=max(1, steps // 10)
    )
    model.train()
    loss = torch.zeros(())
    for _ in range(steps):
        picked = torch.randint(len(rows), (batch_size,), generator=generator).tolist()
        rates = torch.tensor([rows[i]["slip_rate"] for i in picked])
        slips = torch.rand(batch_size, generator=generator) < rates
        examples = [
            (rows[i]["prompt"], rows[i]["slip" if slip else "solution"])
            for i, slip in zip(picked, slips.tolist(), strict=True)
        ]
        input_ids, targets = _supervised_batch(tokenizer, examples)
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        logprobs = linear_logprobs(hidden, model.lm_head.weight, targets)
        loss = -logprobs.sum() / (targets != IGNORE_INDEX).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()  # a frozen weight's, left here, would count in an adapter's norm
        schedule.step()
    model.eval()
    return float(loss.detach())


def _supervised_batch(
    tokenizer: PreTrainedTokenizerFast, examples: list[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """(batch, T) input ids and targets; prompts and padding are ignored.

    Right-padded: causal attention never sees a pad before a token that counts.
    """
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in examples]
    answers = [tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id] for _, answer in examples]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) - 1
    input_ids = torch.full((len(examples), longest), tokenizer.pad_token_id)
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        sequence = torch.tensor(prompt + answer)
        input_ids[i, : len(sequence) - 1] = sequence[:-1]
        targets[i, len(prompt) - 1 : len(sequence) - 1] = sequence[len(prompt) :]
    return input_ids, targets
