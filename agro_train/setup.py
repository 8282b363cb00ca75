"""Puts a run together: everything is loaded and checked before the output folder is touched."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from agro_train import durable
from agro_train.algorithm import try_algorithm
from agro_train.callbacks import load_callbacks
from agro_train.checks import (
    check_dtype,
    check_first_tokens,
    check_launch,
    check_packages,
    check_ranks,
    warn_of_memory,
)
from agro_train.config import TrainConfig
from agro_train.data.demonstrations import load_demonstrations
from agro_train.data.mix import in_recorded_order, plan, steps_of_epochs
from agro_train.data.recorded import Recorded, load_recorded
from agro_train.engines.engine import Engine
from agro_train.engines.process_engine import ProcessEngine
from agro_train.engines.transformers_engine import TransformersEngine
from agro_train.engines.turns import Dialogue
from agro_train.environments.pool import Environments
from agro_train.fresh import Ahead, FreshGroups, InStep, Questioner
from agro_train.interrupt import Interrupts
from agro_train.lock import FolderLock
from agro_train.models import WarmStart, base_source, load_models, make_optimizer
from agro_train.policy import checkpoint
from agro_train.policy.adapter import keeps_base
from agro_train.policy.attention import setting_of
from agro_train.policy.load import (
    check_4bit,
    load_model,
    load_sizes,
    load_tokenizer,
    set_matmul_precision,
)
from agro_train.policy.policy import unwrap, with_gathered_model
from agro_train.policy.reference_cache import check_cache_folder, with_ref_logprobs
from agro_train.questions import (
    Questions,
    chat_options,
    check_files,
    load_questions,
    start_dialogue,
)
from agro_train.ranks import Ranks
from agro_train.refusal import Refusal
from agro_train.resume import changes, check_unfinished, groups_in_flight, past_groups, resume_point
from agro_train.rewards.functions import load_rewards
from agro_train.run import Models, Run, Start
from agro_train.run_folder import RunFolder
from agro_train.watch.environment import record_start
from agro_train.watch.trackers import start_trackers

if TYPE_CHECKING:
    from agro_train.engines.vllm_engine import VllmEngine

# How long ranks wait in a collective. The main one alone checks and writes checkpoints, which takes
# longer than NCCL's 10 minutes where the model is large and the disk slow.
LONGEST_WAIT = timedelta(hours=3)


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
