"""Puts a run together: everything is loaded and checked before the output folder is touched."""

import copy
import importlib.util
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel, get_scheduler
from transformers.utils import logging as transformers_logging

from agro_train import durable
from agro_train.algorithm import try_algorithm
from agro_train.callbacks import load_callbacks
from agro_train.config import TrainConfig, load_resumed
from agro_train.data.demonstrations import load_demonstrations
from agro_train.data.mix import Mix, in_recorded_order, plan, steps_of_epochs
from agro_train.data.recorded import Recorded, load_recorded, read_rollouts
from agro_train.engines.engine import Engine
from agro_train.engines.process_engine import ProcessEngine
from agro_train.engines.transformers_engine import TransformersEngine
from agro_train.engines.turns import Dialogue
from agro_train.environments.pool import Environments
from agro_train.fresh import Ahead, FreshGroups, Group, InStep, Questioner, groups_of_json
from agro_train.interrupt import Interrupts
from agro_train.lock import FolderLock
from agro_train.plan.advice import fits
from agro_train.plan.architecture import find_architecture
from agro_train.plan.machine import Machine
from agro_train.plan.memory import plan as plan_memory
from agro_train.policy import checkpoint
from agro_train.policy.adapter import AdapterOff, add_adapter, keeps_base
from agro_train.policy.attention import check_attention, setting_of
from agro_train.policy.load import (
    barred,
    check_4bit,
    end_tokens,
    fingerprint,
    identity,
    load_base,
    load_model,
    load_sizes,
    load_tokenizer,
    load_unread,
    set_matmul_precision,
)
from agro_train.policy.policy import Policy, shard, unwrap, with_gathered_model
from agro_train.policy.reference_cache import check_cache_folder, with_ref_logprobs
from agro_train.policy.shards import Weights, allocate, fill
from agro_train.questions import (
    Questions,
    chat_options,
    check_files,
    load_questions,
    start_dialogue,
)
from agro_train.ranks import Ranks
from agro_train.refusal import Refusal
from agro_train.rewards.functions import load_rewards
from agro_train.run import Models, Run, Start
from agro_train.run_folder import RunFolder
from agro_train.types import Rollout
from agro_train.watch.environment import record_start
from agro_train.watch.trackers import check_trackers, start_trackers

if TYPE_CHECKING:
    from agro_train.engines.vllm_engine import VllmEngine

# How long ranks wait in a collective. The main one alone checks and writes checkpoints, which takes
# longer than NCCL's 10 minutes where the model is large and the disk slow.
LONGEST_WAIT = timedelta(hours=3)


@dataclass(frozen=True)
class WarmStart:
    """The embedded model after its warm start, to be kept in the run's folder."""

    model: PreTrainedModel
    loss: float  # nats a token, of its last step


def setup(config: TrainConfig, *, resume: bool, interrupts: Interrupts | None = None) -> Run:
    """Loads, checks, and only then writes to the output folder (or rewinds a resumed record). Until
    then there is nothing in it but the lock, which the run holds to its end.

    What needs no weights is checked before they are loaded. Raises Refusal for what cannot work.

    Args:
        interrupts: told of signals, if they are to end the run between two steps.
    """
    folder = RunFolder(Path(config.output_dir))
    lock = FolderLock(folder.lock)
    if not resume:
        check_dtype(config)
    check_files(config, recorded=True)
    check_packages(config)
    accelerator = start_accelerator(config)
    check_launch(accelerator)
    config.check_processes(accelerator.num_processes)
    Ranks.of(accelerator).from_main(lock.take)
    try:
        return _set_up(config, folder, lock, accelerator, interrupts or Interrupts(), resume)
    except BaseException:
        lock.release()
        raise


def _set_up(
    config: TrainConfig,
    folder: RunFolder,
    lock: FolderLock,
    accelerator: Accelerator,
    interrupts: Interrupts,
    resume: bool,
) -> Run:
    ranks = Ranks.of(accelerator)
    if not resume:
        ranks.from_main(folder.check_unused)
    try_algorithm(config)
    rewards = load_rewards(config)
    environments = Environments.of(config)
    callbacks = load_callbacks(config.callbacks, ranks)
    changed = changes(folder, config) if resume else {}
    start = Start()
    if resume:
        start = resume_point(folder, accelerator)
        if not config.num_train_epochs:  # else it has to be known how many prompts there are
            check_unfinished(config, folder, start)
    model, _ = ranks.from_main(partial(checkpoint.find_model, config.model, accelerator.print))
    config = replace(config, model=model)
    check_4bit(config)
    if config.recorded and ranks.main:
        check_cache_folder()
    precision = set_matmul_precision(config.matmul_precision)
    transformers_logging.disable_progress_bar()  # the run has one of its own

    source = base_source(config, start)
    tokenizer, sizes = load_tokenizer(source, config.chat_template), load_sizes(source)
    questions = load_questions(
        config, tokenizer, sizes.context, ranks, gold_needed=True, resumed=resume
    )
    dialogue = start_dialogue(config, environments, tokenizer, sizes.context, questions)
    recorded = load_recorded(
        config.recorded,
        tokenizer,
        config.prompt_template,
        vocab_size=sizes.vocab_size,
        context=sizes.context,
        truncated=config.truncates,
        options=chat_options(config, resumed=resume),
        gold_column=config.gold_column,
    )
    if config.num_train_epochs:
        steps = steps_of_epochs(config, len(questions.prompts), len(recorded.groups))
        config = replace(config, steps=steps)
        check_unfinished(config, folder, start)
    past = ranks.from_main(partial(past_groups, config, folder, start, accelerator))
    mix = plan(config, past)
    check_ranks(config, ranks, len(questions.held_out), mix)
    if accelerator.device.type == "cuda" and ranks.main:
        memory = torch.cuda.get_device_properties(accelerator.device).total_memory
        warn_of_memory(config, ranks.world, memory, accelerator.print)
    demonstrations = {}
    if config.demonstrations:
        demonstrations = load_demonstrations(
            questions.prompts, config.demonstrations, tokenizer, sizes.context
        )

    models, warm_start = load_models(config, source, tokenizer, start, accelerator)
    check_first_tokens(config, recorded, demonstrations.values(), models.end_tokens)
    optimizer, scheduler = make_optimizer(config, models.policy, start)
    ask = Questioner(config, questions.prompts, mix, ranks, rewards, demonstrations)
    engine, fresh = start_engine(config, models, questions, accelerator, ask, start, dialogue)
    recorded = with_known_references(config, recorded, models, accelerator)
    open_folder(
        config, folder, start, tokenizer, warm_start, accelerator, resume=resume, changed=changed
    )
    return Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        start=start,
        models=models,
        questions=questions,
        recorded=recorded,
        mix=mix,
        rewards=rewards,
        demonstrations=demonstrations,
        engine=engine,
        fresh=fresh,
        optimizer=optimizer,
        scheduler=scheduler,
        summary=summarise(config, models, questions, recorded, accelerator, precision, warm_start)
        + "".join(f"; {name} is now {now}, was {was}" for name, (was, now) in changed.items()),
        lock=lock,
        interrupts=interrupts,
        callbacks=callbacks,
    )


def check_dtype(config: TrainConfig) -> None:
    """Raises Refusal for a run that would train weights in bfloat16, whose numbers have 8 bits:
    AdamW's step is about as large as the learning rate, and lost where that is below 1/512 of the
    weight. A run that an older version has begun so may still be resumed."""
    if config.dtype == "bfloat16" and not config.use_peft:
        raise Refusal(
            f"dtype: expected float32 for weights that are trained, got bfloat16, where most steps "
            f"of learning_rate={config.learning_rate:g} are rounded away; dtype=float32 "
            "mixed_precision=bf16 computes in bfloat16 around float32 weights, and use_peft=true "
            "trains a float32 adapter of bfloat16 ones"
        )


def check_first_tokens(
    config: TrainConfig, recorded: Recorded, demonstrations: Iterable[Rollout], ends: set[int]
) -> None:
    """Raises Refusal for a completion that ends before min_new_tokens: the policy cannot draw it,
    so its probability is 0."""
    rows = [r for group in recorded.groups for r in group] if not config.truncates else []
    for rollout in (*rows, *demonstrations):
        firsts = (places[: config.min_new_tokens] for places in rollout.sampled)
        if any(rollout.completion_ids[i] in ends for places in firsts for i in places):
            raise Refusal(
                f"min_new_tokens: expected no end token among the first {config.min_new_tokens} of "
                f"a {rollout.source} completion, got one in that of {rollout.prompt[:40]!r}, whose "
                "probability is then 0; lower it, or leave the completion out"
            )


def check_packages(config: TrainConfig) -> None:
    """Raises Refusal for a package that a setting needs and that is not there."""
    check_trackers(config.report_to)
    check_attention(config.attn_implementation)
    if config.use_vllm and config.vllm_mode == "colocate" and not importlib.util.find_spec("vllm"):
        raise Refusal(
            "use_vllm: expected the package vllm, got none; pip install '.[vllm]' in this "
            "project's folder, or set vllm_mode=server"
        )


def changes(folder: RunFolder, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """What a resumed run does in another way from now on: its settings before, and now."""
    before, now = (vars(c) for c in (load_resumed(folder.path), config))
    return {name: (before[name], now[name]) for name in now if before[name] != now[name]}


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Raises Refusal for a launch that lacks something, or a precision that the device lacks."""
    try:
        return Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=not torch.cuda.is_available(),
            log_with=config.report_to or None,
            project_dir=RunFolder(Path(config.output_dir)).tensorboard,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        )
    except ValueError as error:
        raise Refusal(
            "accelerate launch: expected a launch and a mixed_precision that accelerate takes, got "
            f"mixed_precision={config.mixed_precision}: {error}"
        ) from error


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


def resume_point(folder: RunFolder, accelerator: Accelerator) -> Start:
    """Where a resumed run goes on."""
    newest = newest_checkpoint(folder.path, accelerator)
    if newest is None:
        return Start()
    state = checkpoint.read_state(newest)
    return Start(state.step, newest, state.base_model, folder.evaluated(state.step))


def check_unfinished(config: TrainConfig, folder: RunFolder, start: Start) -> None:
    """Raises Refusal for a resumed run that has nothing left to do."""
    ended = folder.page.exists() and (start.evaluated or not config.evaluates)
    if start.step > config.steps or (start.step == config.steps and ended):
        name = "num_train_epochs" if config.num_train_epochs else "steps"
        raise Refusal(
            f"{name}: expected more than the {start.step} steps that {folder.path} has already "
            f"taken, got {config.steps}; add {name}=N to go on"
        )


def past_groups(
    config: TrainConfig, folder: RunFolder, start: Start, accelerator: Accelerator
) -> dict[int, int | None]:
    """By past step, the first is 0, the fresh groups in its record, None where that is gone; empty
    where all are there, or none might be replayed."""
    there = folder.all_rollouts()
    lost = [step for step in range(start.step) if step + 1 not in there]
    if not (lost and config.replayed_prompts_per_step):
        return {}
    accelerator.print(
        f"{folder.path}: the rollouts of {len(lost)} past steps are gone; fresh groups take "
        "the place of those that would be replayed"
    )
    past: dict[int, int | None] = dict.fromkeys(lost)
    for step in set(range(start.step)) - past.keys():
        rows = read_rollouts(there[step + 1])
        past[step] = sum(row.source == "fresh" for row in rows) // config.num_generations
    return past


def newest_checkpoint(folder: Path, accelerator: Accelerator) -> Path | None:
    """The run's newest checkpoint; None for a run that has to start again, for it was ended before
    its first one. The main rank reads the files for all.
    """

    def find() -> Path | None:
        found = checkpoint.newest(folder, accelerator.print)
        if found is None:
            accelerator.print(f"{folder}: no checkpoint was written yet; starting again at step 0")
        return found

    return Ranks.of(accelerator).from_main(find)


def check_ranks(config: TrainConfig, ranks: Ranks, num_held_out: int, mix: Sequence[Mix]) -> None:
    """Raises Refusal for what the launch cannot carry."""
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
        if 0 < count < ranks.world:
            raise Refusal(
                f"{what}: expected none or one for each of {ranks.world} processes, got {count}"
            )


def warn_of_memory(
    config: TrainConfig, world: int, memory: float, say: Callable[[str], None]
) -> None:
    """Tells `say` where the plan of the run is larger than a GPU's `memory` (bytes). The run goes
    on: a plan is a prediction, and completions may be shorter than they may be. What would save
    memory is not looked for, because the other ranks wait."""
    machine = Machine(gpus=world, memory=memory / 1e9, gpus_per_node=world)
    try:
        planned = plan_memory(config, machine, find_architecture(config.model))
    except Refusal as error:
        say(f"memory was not planned: {error}")
        return
    except Exception as error:  # of any model's own code: a prediction must not end a run
        say(f"memory was not planned: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return
    if not fits(planned, machine):
        say(
            f"memory: {planned.peak / 1e9:.1f} of a GPU's {memory / 1e9:.1f} GB are predicted for "
            f"the stage {planned.worst.name}; the run goes on, see agro plan for what saves memory"
        )


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
    reference_id = identity(base, base_unread) if reads_cache else ""
    first_without = barred(config, ends)
    if first_without:  # the reference is then another distribution
        reference_id += f"; first {config.min_new_tokens} tokens without {sorted(first_without)}"
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
    policy, reference = place_on_devices(
        trained, base, config, accelerator, first_without, (trained_unread, base_unread)
    )
    models = Models(
        policy=policy,
        reference=reference,
        tokenizer=tokenizer,
        end_tokens=ends,
        base_model=base_model,
        reference_id=reference_id,
        num_weights=num_weights,
    )
    return models, warm_start


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


def start_engine(
    config: TrainConfig,
    models: Models,
    questions: Questions,
    accelerator: Accelerator,
    ask: Questioner,
    start: Start,
    dialogue: Dialogue | None = None,
) -> tuple[Engine, FreshGroups]:
    """What samples completions, vLLM or transformers, and who has it sample the fresh groups."""
    policy, tokenizer, ends = models.policy, models.tokenizer, models.end_tokens
    vllm: VllmEngine | None = None
    if config.use_vllm:
        from agro_train.engines import vllm_start  # without vLLM there is nothing to import

        longest = max(questions.longest, dialogue.longest_prompt if dialogue else 0)
        vllm = vllm_start.start(config, policy, accelerator, tokenizer, ends, longest, dialogue)
    if config.max_staleness:
        beside = vllm or ProcessEngine(policy, accelerator, tokenizer, ends, config, dialogue)
        ahead = Ahead(ask, beside, start.step, groups_in_flight(start, ask))
        return ahead, ahead
    engine: Engine = vllm or TransformersEngine(
        partial(with_gathered_model, policy, accelerator), tokenizer, ends, config, dialogue
    )
    return engine, InStep(ask, engine)


def groups_in_flight(start: Start, ask: Questioner) -> list[Group]:
    """This rank's part of what the checkpoint holds of the steps to come: of each such step all its
    groups, or none where the engine ended before they were there."""
    path = None if start.checkpoint is None else start.checkpoint / checkpoint.AHEAD
    if path is None or not path.is_file():
        return []
    groups = list(groups_of_json(path.read_text()))
    count = Counter(group.step for group in groups)
    last = start.step
    while last < len(ask.mix) and count[last] == ask.mix[last].fresh:
        last += 1
    return [g for g in groups if g.step < last and g.number in ask.numbers(g.step)]


def with_known_references(
    config: TrainConfig, recorded: Recorded, models: Models, accelerator: Accelerator
) -> Recorded:
    """The recorded groups with the reference's log-probabilities of those that the run will use."""
    if not config.recorded:
        return recorded
    visits = range(len(recorded.groups))
    count = config.steps * config.recorded_prompts_per_step
    used = set(in_recorded_order(visits, 0, count, config.seed))
    return with_ref_logprobs(
        recorded,
        used,
        models.reference,
        models.reference_id,
        config,
        accelerator,
        accelerator.print,
    )


def open_folder(
    config: TrainConfig,
    folder: RunFolder,
    start: Start,
    tokenizer: Any,
    warm_start: WarmStart | None,
    accelerator: Accelerator,
    *,
    resume: bool,
    changed: Mapping[str, tuple[Any, Any]],
) -> None:
    """Creates the output folder, or rewinds that of a resumed run to its checkpoint, and starts the
    trackers. From here on there is something on disk."""
    accelerator.wait_for_everyone()  # no rank creates the folder while another checks it
    if not accelerator.is_main_process:
        return
    if start.checkpoint is not None:
        checkpoint.set_aside(folder.path, start.step)
        folder.rewind(start.step, config.to_yaml())
    else:
        folder.create(config.to_yaml())
        if warm_start is not None:
            keep_base(warm_start.model, folder, tokenizer)
        elif config.use_peft and keeps_base(config.model):
            keep_base(load_model(config.model, config), folder, tokenizer)
    run_id = record_start(folder.path, start.step, accelerator, resumed=resume, changed=changed)
    start_trackers(accelerator, config, folder.path, run_id, start.step)


def keep_base(model: PreTrainedModel, folder: RunFolder, tokenizer: Any) -> None:
    """Writes the weights that the run begins with to its folder, as transformers loads them."""
    model.save_pretrained(folder.base_model)
    tokenizer.save_pretrained(folder.base_model)
    durable.sync_tree(folder.base_model)


def summarise(
    config: TrainConfig,
    models: Models,
    questions: Questions,
    recorded: Recorded,
    accelerator: Accelerator,
    precision: str,
    warm_start: WarmStart | None,
) -> str:
    """The line that a run prints first: what it trains on what."""
    too_long, unreadable = (
        sum(left_out[reason] for left_out in (questions.left_out, questions.left_out_held))
        for reason in ("too_long", "unreadable_gold")
    )
    line = f"{config.model}: {models.num_weights / 1e6:.1f} M weights, "
    if config.use_peft:
        trained = sum(p.numel() for p in models.policy.parameters() if p.requires_grad)
        line += f"{trained / 1e6:.2f} M of them trained, "
    line += f"{len(questions.prompts)} prompts, {len(questions.held_out)} held out, "
    line += f"{too_long} left out as too long, "
    if unreadable:
        line += f"{unreadable} left out as their gold answer cannot be parsed, "
    line += f"{len(recorded.groups)} recorded groups"
    against_sampler = config.off_policy_taper_against == "sampler"
    for reason, words in (("alone", "of one completion"), ("too_long", "as too long")):
        if recorded.left_out.get(reason):
            line += f", {recorded.left_out[reason]} left out {words}"
    if recorded.num_tokenised:
        line += f", {recorded.num_tokenised} of their completions tokenised anew from text"
    if recorded.num_unrewarded:
        line += f" with {recorded.num_unrewarded} completions without a reward"
    if recorded.num_without_sampler and config.tapers and against_sampler:
        line += (
            f" ({recorded.num_without_sampler} completions without sampling_logprob: the "
            "reference's stands in)"
        )
    line += (
        f"; {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"attention: {setting_of(unwrap(models.policy).model)}, float32 products: {precision}"
    )
    if warm_start is not None:
        line += f"; warm start ended at {warm_start.loss:.3f} nats a token"
    return line


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
    modules = [Policy(trained, first_without)]
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
    policy = modules[0]
    return policy, AdapterOff(policy) if config.use_peft else modules[1]
