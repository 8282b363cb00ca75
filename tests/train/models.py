"""Small models for the trainer's tests: the embedded tiny Llama, and a miniature in the shape of
Llama-3. And a run of two steps that trains either.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from agro_train.policy import tiny
from agro_train.policy.policy import Policy
from agro_train.types import Rollout

SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
]
# Of a model of any family, as its configuration calls them.
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def tiny_policy(seed: int = 0, dtype: torch.dtype = torch.float64) -> Policy:
    """A random tiny Llama; float64 where a test compares gradients to the last digit.

    transformers' RMSNorm rounds to float32 on the way whatever the weights are, so torch's takes
    its place.
    """
    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(len(tokenizer), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in model.parameters():  # larger than at initialisation, so that errors show
            parameter.data += 0.1 * torch.randn_like(parameter)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return Policy(model.to(dtype).eval())


def rollout(
    group: str, prompt: list[int], completion: list[int], reward: float | None = 0.0
) -> Rollout:
    return Rollout(
        group=group,
        prompt="",
        prompt_ids=tuple(prompt),
        completion="",
        completion_ids=tuple(completion),
        finish="stop",
        reward=reward,
    )


def ragged_rollouts() -> list[Rollout]:
    """Three groups of 3, 2 and 4 completions of lengths 1 to 5 over prompts of lengths 1 to 6."""
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for group, (size, prompt_length) in enumerate([(3, 6), (2, 1), (4, 4)]):
        prompt = torch.randint(2, 15, (prompt_length,), generator=generator).tolist()
        for _ in range(size):
            length = int(torch.randint(1, 6, (), generator=generator))
            completion = torch.randint(1, 15, (length,), generator=generator).tolist()
            reward = float(torch.rand((), generator=generator))
            rollouts.append(rollout(f"g{group}", prompt, completion, reward))
    return rollouts


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with Llama-3's special tokens and chat template. Its end token is not
    the one that ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        chat_template=CHAT_TEMPLATE,
    )


def save_llama3_miniature(folder: Path) -> Path:
    """Grouped-query attention, Llama-3's RoPE scaling, untied head, several end tokens, chat
    template; random weights and a tokenizer of bytes."""
    fast = llama3_tokenizer()
    ends = [fast.convert_tokens_to_ids(token) for token in SPECIAL[1:4]]
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=len(fast),
        **shape,
        **heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        bos_token_id=fast.bos_token_id,
        eos_token_id=ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config.temperature = 0.6  # as Llama-3-Instruct's does; it must not leak
    model.generation_config.top_p = 0.9
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


# What makes a run that a page or an example shows one short step.
SHORT = [
    "warm_start_steps=1",
    "steps=1",
    "prompts_per_step=2",
    "num_generations=2",
    "max_completion_length=4",
    "warmup_steps=0",
    "eval_every=0",
]


def small_run(model: Path, folder: Path, *more: str) -> list[str]:
    """`agro train` for two steps of three groups; what `more` sets again counts."""
    return [
        "train",
        "tiny-arithmetic",
        f"model={model}",
        f"output_dir={folder}",
        "reward=tests.train.reward_functions:even_share",
        "steps=2",
        "prompts_per_step=3",  # so that of two ranks one has two groups and the other one
        "max_completion_length=8",
        "warmup_steps=0",
        *more,
    ]
