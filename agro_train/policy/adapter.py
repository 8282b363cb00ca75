"""LoRA through peft: a frozen model, a small trained adapter, and no second model for a reference.

The adapter lies inside the transformers model's own linear layers, so that the policy, generation
and wrappers see the model they know. With the adapter off the same weights are the reference.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from agro_train.config import TrainConfig
from agro_train.refusal import Refusal
from agro_train.run_folder import RunFolder
from agro_train.seeds import derive_seed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
NAME = "default"  # what peft calls a model's only adapter
PREFIX = "base_model.model."  # of a name in an adapter's file, before the model's own


def add_adapter(model: PreTrainedModel, config: TrainConfig, checkpoint: Path | None) -> None:
    """Freezes the model and puts an adapter into it, in place: fresh, or that of a checkpoint.

    A fresh one changes nothing yet (B is zero). Its weights are float32 whatever the model's are:
    steps of 1e-5 are lost in bfloat16.
    """
    targets = config.lora_target_modules
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "adapter"))
        try:
            model.add_adapter(lora)
        except ValueError as error:  # no module of that name, or one that takes no adapter
            reason = " ".join(str(error).split())
            raise Refusal(
                f"lora_target_modules: expected names of linear layers, got {targets}: {reason}"
            ) from error
    lora.base_model_name_or_path = base_name(config, new=checkpoint is None)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embeddings, LoraLayer):
        raise Refusal(
            f"lora_target_modules: expected layers behind the embeddings, got {targets}, which "
            "covers the input embeddings; leave them out"
        )
    if isinstance(head, LoraLayer) and head.base_layer.weight is embeddings.weight:
        raise Refusal(
            f"lora_target_modules: expected layers between embedding and head of a model that ties "
            f"the two, got {targets}; an adapter merged into one would change the other, too"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    if checkpoint is not None:
        weights = load_file(checkpoint / WEIGHTS)
        result = set_peft_model_state_dict(
            model, {name.removeprefix(PREFIX): w for name, w in weights.items()}, NAME
        )
        left = [name for name in result.missing_keys if ".lora_" in name]
        if left or result.unexpected_keys:
            raise Refusal(
                f"--resume: expected an adapter of lora_r={config.lora_r} on {targets} in "
                f"{checkpoint}, got one with other weights: {(left + result.unexpected_keys)[0]}"
            )


def base_name(config: TrainConfig, *, new: bool) -> str:
    """Where the frozen weights are, as an adapter's file names them: what transformers loads.

    Args:
        new: whether the run begins now. One of an earlier version may have kept no weights.
    """
    kept = RunFolder(Path(config.output_dir)).base_model
    if keeps_base(config.model) and (new or kept.is_dir()):
        return str(kept.resolve())
    return os.path.abspath(config.model) if Path(config.model).exists() else config.model


def keeps_base(model: str) -> bool:
    """Whether a run on `model` with an adapter keeps its base model's weights in its own folder,
    because transformers has no name for them: they are made on the spot, read from a .gguf file, or
    the sum of weights and another adapter."""
    made = model in ("tiny", "smollm2") or model.endswith(".gguf")
    return made or (Path(model) / CONFIG).is_file()


def base_of(folder: Path) -> str | None:
    """The model that the adapter in `folder` belongs to; None where there is no adapter."""
    if not (folder / CONFIG).is_file():
        return None
    beside = RunFolder(folder.parent).base_model  # the tiny model's, which moves with its run
    if beside.is_dir():
        return str(beside)
    try:
        return str(json.loads((folder / CONFIG).read_text())["base_model_name_or_path"])
    except (ValueError, KeyError) as error:
        raise Refusal(
            f"model: expected an adapter's base_model_name_or_path in {folder / CONFIG}, got none "
            f"({error!r}); save the adapter again"
        ) from error


def with_adapter_merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A plain model: its weights plus the adapter in `folder`."""
    with warnings.catch_warnings():  # peft uses a name that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    assert isinstance(merged, PreTrainedModel), f"expected a plain model, got {type(merged)}"
    return merged.requires_grad_(True)  # peft has frozen it, and it may be trained


def save(model: PreTrainedModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Writes what PeftModel.from_pretrained loads; of `weights`, by name, the adapter's.

    Not save_pretrained, which asks the network whether the base model's vocabulary has grown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    save_file(
        {PREFIX + name: weight.contiguous() for name, weight in found.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    model.peft_config[NAME].save_pretrained(str(folder), inference_mode=True)


def has_adapter(model: nn.Module) -> bool:
    return any(isinstance(module, LoraLayer) for module in model.modules())


class AdapterOff(nn.Module):
    """The reference of a policy with an adapter: the policy itself, called with the adapter off.

    It goes through the policy's own wrapper, hence the same kernels and the same precision.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert not torch.is_grad_enabled(), "the reference is read without gradients"
        with adapter_off(self.policy):
            return self.policy(*args, **kwargs)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model computes without its adapter inside this block.

    peft's own switch also sets requires_grad to False. A sharded weight that is first gathered
    without requires_grad never gets a gradient, so here only the layers' flag is changed.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers, "expected a model with an adapter"
    for layer in layers:
        layer._disable_adapters = True
    assert all(layer.disable_adapters for layer in layers), "peft's switch has another name"
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the plain model that computes the same: what an engine is sent.

    One at a time, whole even where they are sharded (every rank must then take part), tied ones
    once; each in its own dtype. The sum is taken in float32.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = whole_tensor(parameter)
        owner, _, leaf = name.rpartition(".")
        owner = owner.removesuffix(".base_layer")
        if owner in layers and leaf == "weight":
            layer = layers[owner]
            a, b = (whole_tensor(part[NAME].weight) for part in (layer.lora_A, layer.lora_B))
            delta = layer.scaling[NAME] * (b @ a)
            delta = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
            weight = (weight.to(delta.dtype) + delta).to(weight.dtype)
        yield f"{owner}.{leaf}", weight


def whole_tensor(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
