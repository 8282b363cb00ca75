"""Policy and reference of a run: loaded, on their devices, and the optimiser of what is trained."""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel, get_scheduler

from agro_train.config import TrainConfig
from agro_train.policy import checkpoint
from agro_train.policy.adapter import AdapterOff, add_adapter
from agro_train.policy.attention import has_windows
from agro_train.policy.load import (
    barred,
    end_tokens,
    fingerprint,
    identity,
    load_base,
    load_model,
    load_unread,
)
from agro_train.policy.policy import Policy, settle_buckets, shard
from agro_train.policy.shards import Weights, allocate, fill
from agro_train.refusal import Refusal
from agro_train.run import Models, Start
from agro_train.run_folder import RunFolder


@dataclass(frozen=True)
class WarmStart:
    """The embedded model after its warm start, to be kept in the run's folder."""

    model: PreTrainedModel
    loss: float  # nats a token, of its last step


def base_source(config: TrainConfig, start: Start) -> str:
    """Where the weights that the run began with are: a resumed run has kept the embedded model's,
    which its warm start made."""
    if config.model == "tiny" and start.checkpoint is not None:
        return str(RunFolder(start.checkpoint.parent).base_model)
    return config.model


def load_models(
    config: TrainConfig, source: str, tokenizer: Any, start: Start, accelerator: Accelerator
) -> tuple[Models, WarmStart | None]:
    """Policy and reference, loaded, given an adapter where one is trained, and on their devices.

    To be sharded, a model stays in its files, where it can, until each rank reads its shards.
    """
    sharded, warm_loss = config.fsdp and not config.use_peft, None
    if sharded and source != "tiny":
        base, base_unread = load_unread(source, config, accelerator.print)
    else:
        (base, warm_loss), base_unread = load_base(source, config, tokenizer), None
    base_model = fingerprint(base, base_unread)
    if start.base_model not in (None, base_model):
        raise Refusal(
            f"--resume: expected a checkpoint of model={config.model}, got {start.checkpoint}, "
            "which started from other weights; give the model that the run began with"
        )
    ends = end_tokens(base, tokenizer)
    # Copied now, before an adapter or sharding changes it; any other model can be loaded again.
    warm_start = None if warm_loss is None else WarmStart(copy.deepcopy(base), warm_loss)
    reads_cache = config.recorded and accelerator.is_main_process
    first_without = barred(config, ends)
    reference_id = name_reference(base, base_unread, config, first_without) if reads_cache else ""
    trained_unread = base_unread
    if config.use_peft:
        trained = base
        add_adapter(trained, config, start.checkpoint)
    elif start.checkpoint is None:
        trained = copy.deepcopy(base)
    elif sharded:
        trained, trained_unread = load_unread(str(start.checkpoint), config, accelerator.print)
    else:
        trained = load_model(str(start.checkpoint), config)
    num_weights = sum(parameter.numel() for parameter in trained.parameters())
    unread = (trained_unread, base_unread)
    models = Models(
        *place_on_devices(trained, base, config, accelerator, first_without, unread),
        tokenizer,
        ends,
        base_model=base_model,
        reference_id=reference_id,
        num_weights=num_weights,
    )
    return models, warm_start


def name_reference(
    base: PreTrainedModel, unread: Weights | None, config: TrainConfig, first_without: set[int]
) -> str:
    """By which what was computed of a reference is found again."""
    name = identity(base, unread)
    if has_windows(base.config):  # what was computed before windows were minded is not read
        name += "; within windows"
    if first_without:  # the reference is then another distribution
        name += f"; first {config.min_new_tokens} tokens without {sorted(first_without)}"
    return name


def place_on_devices(
    trained: PreTrainedModel,
    base: PreTrainedModel,
    config: TrainConfig,
    accelerator: Accelerator,
    first_without: Collection[int] = (),
    unread: tuple[Weights | None, Weights | None] = (None, None),
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Policy and frozen reference on their devices: sharded, replicated, or just there.

    With an adapter they are the same weights.

    Args:
        unread: of each, where the weights are; None: in the model.
    """
    modules = [Policy(trained, first_without, share_prompts=config.share_prompts)]
    if not config.use_peft:
        reference = Policy(base, first_without, modules[0].form)
        modules.append(reference.requires_grad_(False))
    if config.fsdp:
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for module, weights in zip(modules, unread, strict=False):  # an adapter's run has one
            if weights is None:
                module.to(accelerator.device)
            shard(module, config.mixed_precision, mesh)
            if weights is not None:
                allocate(module, accelerator.device)
                fill(module.model, weights)
    else:  # what has no gradients has none to average
        modules = [
            accelerator.prepare_model(
                module, evaluation_mode=not any(p.requires_grad for p in module.parameters())
            )
            for module in modules
        ]
        settle_buckets(modules[0], config.gradient_checkpointing)
    policy = modules[0]
    return policy, AdapterOff(policy) if config.use_peft else modules[1]


def make_optimizer(
    config: TrainConfig, policy: torch.nn.Module, start: Start
) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW over what is trained, and its schedule; both as they were where a run is resumed."""
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert trainable, "no weight of the policy is trainable"
    optimizer = torch.optim.AdamW(
        trainable,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, config.warmup_steps, config.steps
    )
    if start.checkpoint is not None:
        checkpoint.load_optimizer(start.checkpoint, policy, optimizer, scheduler)
        if scheduler.base_lrs[0] != config.learning_rate:
            set_learning_rate(optimizer, scheduler, config.learning_rate)
    return optimizer, scheduler


def set_learning_rate(optimizer: torch.optim.Optimizer, scheduler: Any, highest: float) -> None:
    """Gives a schedule another highest learning rate, from its next step on."""
    scheduler.base_lrs = [highest] * len(optimizer.param_groups)
    now = [highest * share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, now, strict=True):
        group["initial_lr"], group["lr"] = highest, rate
    scheduler._last_lr = now
