"""Puts a run together: checkpoint, models, prompts, optimiser, engine, rewards, folder."""

import copy
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel, get_scheduler
from transformers.utils import logging as transformers_logging

from agro_train import durable
from agro_train.algorithm import try_algorithm
from agro_train.config import TrainConfig
from agro_train.data.mix import Mix, in_recorded_order, plan
from agro_train.data.prompts import load_prompts
from agro_train.data.recorded import load_recorded
from agro_train.engines.engine import Engine
from agro_train.engines.transformers_engine import TransformersEngine
from agro_train.policy import checkpoint, tiny
from agro_train.policy.adapter import AdapterOff, add_adapter
from agro_train.policy.load import (
    end_tokens,
    fingerprint,
    identity,
    load_model,
    load_tokenizer,
    prepare,
    set_matmul_precision,
)
from agro_train.policy.policy import Policy, shard, with_gathered_model
from agro_train.policy.reference_cache import check_cache_folder, with_ref_logprobs
from agro_train.refusal import Refusal
from agro_train.rewards.functions import check_columns, load_rewards, with_readable_gold
from agro_train.run import Run
from agro_train.seeds import derive_seed
from agro_train.types import Prompt
from agro_train.watch.environment import record_start
from agro_train.watch.run_folder import RunFolder
from agro_train.watch.trackers import check_trackers, start_trackers

# How long ranks wait in a collective. The main one alone checks and writes checkpoints, which takes
# longer than NCCL's 10 minutes where the model is large and the disk slow.
LONGEST_WAIT = timedelta(hours=3)


def setup(config: TrainConfig, *, resume: bool) -> Run:
    """Loads, checks, and only then creates the output folder (or rewinds a resumed record)."""
    folder = RunFolder(Path(config.output_dir))
    if not resume:
        folder.check_unused()
    check_trackers(config.report_to)
    try_algorithm(config)
    rewards = load_rewards(config)
    mix = plan(config)
    accelerator = start_accelerator(config)
    check_launch(accelerator)
    newest = newest_checkpoint(folder.path, accelerator) if resume else None
    state = checkpoint.read_state(newest) if newest is not None else None
    taken = 0 if state is None else state.step
    evaluated = state is not None and folder.evaluated(taken)
    ended = folder.page.exists() and (evaluated or not config.evaluates)
    if taken > config.steps or (taken == config.steps and ended):
        raise Refusal(
            f"steps: expected more than the {taken} that {folder.path} has already taken, got "
            f"{config.steps}; add steps=N to go on"
        )
    if config.recorded and accelerator.is_main_process:
        check_cache_folder()
    precision = set_matmul_precision(config.matmul_precision)
    transformers_logging.disable_progress_bar()  # the run has one of its own

    tokenizer, base, warm_loss = load_base(config, folder.path if newest is not None else None)
    base_model = fingerprint(base)
    if state is not None and state.base_model != base_model:
        raise Refusal(
            f"--resume: expected a checkpoint of model={config.model}, got {newest}, which started "
            "from other weights; give the model that the run began with"
        )
    prompts, held_out, too_long = load_prompts(
        config.data,
        config.eval_data,
        config.eval_prompts,
        tokenizer,
        config.prompt_template,
        config.max_prompt_length,
    )
    if config.model == "tiny":
        tiny.check_prompts([*prompts, *held_out])
    context = getattr(base.config, "max_position_embeddings", None)
    recorded = load_recorded(
        config.recorded,
        tokenizer,
        config.prompt_template,
        vocab_size=base.config.vocab_size,
        context=context,
    )
    for spec in config.reward:
        check_columns(spec, [*prompts, *held_out])
    check_context(config, [*prompts, *held_out], context)
    num_loaded = len(prompts) + len(held_out)
    prompts, held_out = (readable(part, config, accelerator) for part in (prompts, held_out))
    unreadable = num_loaded - len(prompts) - len(held_out)
    check_ranks(config, accelerator, len(held_out), mix)
    ends = end_tokens(base, tokenizer)
    # Copied now, before an adapter or sharding changes it; any other model can be loaded again.
    warm_model = None if warm_loss is None else copy.deepcopy(base)
    reads_cache = config.recorded and accelerator.is_main_process
    reference_id = identity(base) if reads_cache else ""
    if config.use_peft:
        trained = base
        add_adapter(trained, config, newest)
    else:
        trained = copy.deepcopy(base) if newest is None else load_model(str(newest), config)
    weights = sum(parameter.numel() for parameter in trained.parameters())
    policy, reference = place_on_devices(trained, base, config, accelerator)
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
    if newest is not None:
        checkpoint.load_optimizer(newest, policy, optimizer, scheduler)
    engine: Engine
    if config.use_vllm:
        from agro_train.engines.vllm_engine import start  # without vLLM there is nothing to import

        longest = max(len(prompt.ids) for prompt in [*prompts, *held_out])
        engine = start(config, policy, accelerator, tokenizer, ends, longest)
    else:
        engine = TransformersEngine(
            partial(with_gathered_model, policy, accelerator), tokenizer, ends, config
        )
    if config.recorded:
        per_step = config.recorded_prompts_per_step
        visits = range(len(recorded.groups))
        used = set(in_recorded_order(visits, 0, config.steps * per_step, config.seed))
        recorded = with_ref_logprobs(
            recorded, used, reference, reference_id, config, accelerator, accelerator.print
        )
    accelerator.wait_for_everyone()  # no rank creates the folder while another checks it
    if accelerator.is_main_process:
        if state is not None:
            checkpoint.set_aside(folder.path, taken)
            folder.rewind(taken, config.to_yaml())
        else:
            folder.create(config.to_yaml())
            if warm_model is not None:
                warm_model.save_pretrained(folder.path / "base_model")
                tokenizer.save_pretrained(folder.path / "base_model")
                durable.sync_tree(folder.path / "base_model")
        run_id = record_start(folder.path, taken, accelerator, resumed=resume)
        start_trackers(accelerator, config, folder.path, run_id, taken)
    summary = f"{config.model}: {weights / 1e6:.1f} M weights, "
    if config.use_peft:
        summary += f"{sum(p.numel() for p in trainable) / 1e6:.2f} M of them trained, "
    summary += (
        f"{len(prompts)} prompts, {len(held_out)} held out, {sum(too_long)} left out as too long, "
    )
    if unreadable:
        summary += f"{unreadable} left out as their gold answer cannot be parsed, "
    summary += f"{len(recorded.groups)} recorded groups"
    if recorded.num_unrewarded:
        summary += f" with {recorded.num_unrewarded} completions without a reward"
    summary += (
        f"; {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"float32 products: {precision}"
    )
    if warm_loss is not None:
        summary += f"; warm start ended at {warm_loss:.3f} nats a token"
    return Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        policy=policy,
        reference=reference,
        tokenizer=tokenizer,
        engine=engine,
        optimizer=optimizer,
        scheduler=scheduler,
        prompts=prompts,
        held_out=held_out,
        recorded=recorded,
        mix=mix,
        rewards=rewards,
        base_model=base_model,
        start=taken,
        evaluated=evaluated,
        summary=summary,
    )


def start_accelerator(config: TrainConfig) -> Accelerator:
    return Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=not torch.cuda.is_available(),
        log_with=config.report_to or None,
        project_dir=Path(config.output_dir) / "tensorboard",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )


def newest_checkpoint(folder: Path, accelerator: Accelerator) -> Path | None:
    """Where a resumed run goes on; None for one that has to start again, for it was ended before
    its first checkpoint. The main rank reads the files for all.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [checkpoint.newest(folder, accelerator.print)]
        except Refusal as error:
            found = [error]
        if found == [None]:
            accelerator.print(f"{folder}: no checkpoint was written yet; starting again at step 0")
    (newest,) = broadcast_object_list(found)
    if isinstance(newest, Refusal):
        raise newest
    path: Path | None = newest
    return path


def readable(prompts: list[Prompt], config: TrainConfig, accelerator: Accelerator) -> list[Prompt]:
    """The prompts whose gold answer the reward can read; each rank looks at its share."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    bounds = [len(prompts) * i // ranks for i in range(ranks + 1)]
    mine = with_readable_gold(prompts[bounds[rank] : bounds[rank + 1]], config)
    kept: list[Prompt] = gather_object(mine)
    if prompts and not kept:
        raise Refusal(
            f"data: expected gold answers that math-verify can parse, got none in {len(prompts)} "
            f"prompts, the first of which is {prompts[0].text[:40]!r}"
        )
    return kept


def check_context(config: TrainConfig, prompts: Sequence[Prompt], context: int | None) -> None:
    """Raises Refusal where a completion could run out of the model's context."""
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    if context is not None and longest + config.max_completion_length > context:
        raise Refusal(
            f"max_completion_length: expected at most {context - longest}, what the longest prompt "
            f"of {longest} tokens leaves of the model's {context}, got "
            f"{config.max_completion_length}; lower it or max_prompt_length"
        )


def check_launch(accelerator: Accelerator) -> None:
    """Raises Refusal for what a launcher's configuration would silently do to the gradient."""
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise Refusal(
            f"accelerate launch: expected distributed_type MULTI_GPU or MULTI_CPU, got {kind}; the "
            "trainer shards by itself, with fsdp=true"
        )
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise Refusal(
            f"accelerate launch: expected gradient_accumulation_steps 1, got {steps}; token_budget "
            "cuts a step into micro-batches, of any number"
        )


def check_ranks(
    config: TrainConfig, accelerator: Accelerator, num_held_out: int, mix: Sequence[Mix]
) -> None:
    """Raises Refusal for what the launch cannot carry."""
    ranks = accelerator.num_processes
    if config.fsdp and not torch.distributed.is_initialized():
        raise Refusal(
            "fsdp: expected a distributed launch, got a single process; start it with "
            "accelerate launch -m agro_train, or set fsdp=false"
        )
    num_fresh = min((step.fresh for step in mix if step.fresh), default=0)
    for what, count in (
        ("prompts_per_step", config.prompts_per_step),
        ("fresh prompts in a step", num_fresh),
        ("held-out prompts", num_held_out),
    ):
        if 0 < count < ranks:
            raise Refusal(
                f"{what}: expected none or one for each of {ranks} processes, got {count}"
            )


def load_base(
    config: TrainConfig, resumed: Path | None
) -> tuple[Any, PreTrainedModel, float | None]:
    """Tokenizer, the model the run starts from (the reference), and a warm start's last loss."""
    if config.model != "tiny":
        return load_tokenizer(config.model), load_model(config.model, config), None
    if resumed is not None:
        source = str(resumed / "base_model")
        return load_tokenizer(source), load_model(source, config), None
    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(len(tokenizer), derive_seed(config.seed, "weights"))
    loss = tiny.warm_start(
        model,
        tokenizer,
        tiny.lessons(config.data),
        steps=config.warm_start_steps,
        seed=derive_seed(config.seed, "warm start"),
    )
    model.set_attn_implementation(config.attn_implementation)
    prepare(model, config)
    return tokenizer, model.to(getattr(torch, config.dtype)), loss


def place_on_devices(
    trained: PreTrainedModel, base: PreTrainedModel, config: TrainConfig, accelerator: Accelerator
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Policy and frozen reference on their devices: sharded, replicated, or just there.

    With an adapter they are the same weights.
    """
    modules = [Policy(trained)]
    if not config.use_peft:
        modules.append(Policy(base).requires_grad_(False))
    if config.fsdp:
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for module in modules:
            module.to(accelerator.device)
            shard(module, config.mixed_precision, mesh)
    else:  # what has no gradients has none to average
        modules = [
            accelerator.prepare_model(
                module, evaluation_mode=not any(p.requires_grad for p in module.parameters())
            )
            for module in modules
        ]
    policy = modules[0]
    return policy, AdapterOff(policy) if config.use_peft else modules[1]
