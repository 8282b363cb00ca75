"""Models with random weights in the shape of known ones, and the work that a step of them is.

What is a function of the shape alone needs no device; `random_model` makes the weights on one.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from agro_train.plan.architecture import find_architecture
from agro_train.plan.machine import DATASHEETS
from benchmarks.gpu_kit.parts import DRY_SHAPE, Job
from benchmarks.measure.shapes import HEADS, Head

# Layers, heads, key-value heads, inner size: public numbers, but for the shape that a CPU takes no
# time for. Hidden size and vocabulary are in benchmarks.measure.shapes, by the same names. All of
# them tie the head to the embeddings.
LAYERS = {
    DRY_SHAPE: (2, 4, 2, 64),
    "smollm2-135m": (30, 9, 3, 1536),
    "smollm2-1.7b": (24, 32, 32, 8192),
    "llama3-1b": (16, 32, 8, 8192),
    "llama3-3b": (28, 24, 8, 8192),
}
DRY_HEAD = Head(DRY_SHAPE, 32, 211)
# Of the logits, in nats. Weights as they are initialised give nearly equal ones, and a text without
# likely tokens takes longer to draw than any that a model writes.
LOGIT_STD = 5.0
SLOWER_CARDS = ("pcie", "nvl")  # of the same name, with less power


def architecture(shape: str) -> Any:
    """transformers' configuration of a shape, with the ids of this module's tokenizer."""
    if shape == "llama3-8b":
        config = find_architecture("meta-llama/Meta-Llama-3-8B")
    else:
        layers, heads, pairs, inner = LAYERS[shape]
        head = DRY_HEAD if shape == DRY_SHAPE else HEADS[shape]
        config = LlamaConfig(
            hidden_size=head.hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=pairs,
            intermediate_size=inner,
            vocab_size=head.vocabulary,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, None, 1
    return config


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word; every id has one, so that texts differ as their ids do."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def write_folder(shape: str, folder: Path) -> Path:
    """A folder that transformers takes for a model, but for its weights."""
    config = architecture(shape)
    config.save_pretrained(folder)
    build_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def write_prompts(job: Job, vocabulary: int, path: Path) -> list[str]:
    """As many prompts as all steps need, each of job.prompt_length tokens; also as JSON lines."""
    generator = torch.Generator().manual_seed(0)
    count = job.prompts * (job.steps + 1)
    ids = torch.randint(2, vocabulary, (count, job.prompt_length), generator=generator)
    prompts = [" ".join(f"w{i}" for i in row) for row in ids.tolist()]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return prompts


def random_model(config: Any, dtype: str, device: str, attention: str | None = "sdpa") -> Any:
    """A model of the configuration, made on the device, the same for every trainer.

    attention: transformers' name; None: its own choice.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    head = model.get_output_embeddings().weight
    with torch.no_grad():  # the last norm's output has a mean square of 1
        head *= LOGIT_STD / (float(head.float().std()) * config.hidden_size**0.5)
    return model


# --- Work -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Operations of a step that its trainer cannot avoid, in FLOP: a prompt is read once for its
    group, nothing is computed twice, and an adapter's own products are left out."""

    generate: float
    score: float
    update: float


def linear_weights(config: Any) -> int:
    """In the linear layers of a Llama, without its head."""
    width = config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    a_layer = config.hidden_size * (attention * width + 3 * config.intermediate_size)
    return int(config.num_hidden_layers * a_layer)


def work(config: Any, job: Job) -> Work:
    """Of one step. TRL scores by the reference alone, ours by the policy, too: a group's advantages
    depend on it."""
    groups, rows = job.prompts, job.prompts * job.generations
    p, c = job.prompt_length, job.completion_length
    tokens = groups * p + rows * (c - 1)
    seen = groups * p**2 / 2 + rows * (p * c + c**2 / 2)  # by all tokens together
    attention = 4 * config.num_hidden_layers * config.hidden_size * seen
    head = 2 * config.hidden_size * config.vocab_size * rows * c
    forward = 2.0 * linear_weights(config) * tokens + attention + head
    # Of a product's two gradients a frozen weight needs one; attention has no weights.
    products = forward - attention
    backward = (1 if job.lora else 2) * products + 2 * attention
    scored = 1 if job.trainer == "trl" else 2
    return Work(generate=forward, score=scored * forward, update=forward + backward)


def peak_flops(card: str) -> float | None:
    """FLOP/s of dense bfloat16 products by the card's datasheet, from the name that torch gives it;
    None where agro_train.plan.machine has no such card."""
    name = card.lower()
    if any(word in name for word in SLOWER_CARDS) and "a100" not in name:
        return None
    kinds = [kind for kind in DATASHEETS if kind in name]
    return DATASHEETS[kinds[0]].bfloat16 if kinds else None
