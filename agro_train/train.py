"""The loop. Prompts -> rollouts -> rewards -> batch -> one update; everything else is in its own
room.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, get_scheduler
from transformers.utils import logging as transformers_logging

from agro_train import checkpoint, tiny
from agro_train.batch import build_batch
from agro_train.config import TrainConfig
from agro_train.data import derive_seed, load_prompts, load_recorded, prompts_for_step
from agro_train.evaluate import Evaluation, evaluate, mean_reward
from agro_train.model import (
    Policy,
    end_tokens,
    fingerprint,
    load_model,
    load_tokenizer,
    set_matmul_precision,
)
from agro_train.plots import plot_run
from agro_train.rewards import RewardFunction, load_reward, score
from agro_train.rollout import generate
from agro_train.step import update
from agro_train.tasks import TASKS
from agro_train.tracking import Display, RunFolder
from agro_train.types import Prompt, Rollout


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Runs the configuration to its last step. Returns the output folder.

    With `resume` it continues the run in config.output_dir from its newest checkpoint; on a CPU the
    result is then bitwise that of a run that was never interrupted.
    """
    run = setup(config, resume=resume)
    with Display(run.start, config.steps) as display:
        display.say(run.summary)
        evaluation = None if resume else run_evaluation(run, 0, display)
        for step in range(run.start, config.steps):
            began = time.perf_counter()
            rollouts, on_policy = collect(run, step)
            batch = build_batch(
                rollouts,
                on_policy,
                token_budget=config.token_budget,
                share_prompts=config.share_prompts,
            )
            stats = update(
                run.policy,
                run.reference,
                batch,
                config,
                run.accelerator,
                run.optimizer,
                run.scheduler,
            )
            metrics = {**describe(rollouts), **stats.metrics}
            metrics["time_s"] = time.perf_counter() - began
            metrics["tokens_per_s"] = metrics["tokens"] / metrics["time_s"]
            metrics["learning_rate"] = run.scheduler.get_last_lr()[0]
            run.folder.log_rollouts("rollouts", step + 1, rollouts)
            run.folder.log(step + 1, metrics)
            display.step(step + 1, metrics)
            last = step + 1 == config.steps
            if last or due(config.eval_every, step + 1):
                evaluation = run_evaluation(run, step + 1, display)
                plot_run(run.folder.path)
            if last or due(config.save_every, step + 1):
                save(run, step + 1)
        if evaluation is not None:
            display.before_and_after(run.folder.read_samples(0), evaluation.greedy)
        display.say(f"Everything is in {run.folder.path}: start with plots/overview.png")
    return run.folder.path


@dataclass(frozen=True)
class Run:
    """What `setup` puts together and the loop uses."""

    config: TrainConfig
    folder: RunFolder
    accelerator: Accelerator
    policy: torch.nn.Module
    reference: torch.nn.Module
    tokenizer: Any
    end_tokens: set[int]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    prompts: list[Prompt]
    held_out: list[Prompt]
    recorded: list[list[Rollout]]
    reward: RewardFunction
    base_model: str  # fingerprint of the reference's weights
    start: int  # steps already taken
    summary: str

    @property
    def model(self) -> PreTrainedModel:
        """The policy's transformers model, without wrappers."""
        return self.accelerator.unwrap_model(self.policy).model


def setup(config: TrainConfig, *, resume: bool) -> Run:
    """Loads and checks everything; the output folder is touched only when nothing is left to go
    wrong.
    """
    folder = RunFolder(Path(config.output_dir))
    if not resume:
        folder.check_unused()
    newest = checkpoint.latest(folder.path) if resume else None
    reward = load_reward(config.reward)
    transformers_logging.disable_progress_bar()  # the run has one of its own
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    precision = set_matmul_precision(config.matmul_precision)

    tokenizer, base, warm_loss = load_base(config, folder.path if resume else None)
    base_model = fingerprint(base)
    state = checkpoint.read_state(newest) if newest is not None else None
    if state is not None and state.base_model != base_model:
        raise ValueError(
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
    recorded = load_recorded(config.recorded, tokenizer, config.prompt_template)
    trained = load_model(str(newest), config) if newest is not None else copy_of(base)
    policy, reference = Policy(trained), Policy(base).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, config.warmup_steps, config.steps
    )
    policy, optimizer, reference = accelerator.prepare(policy, optimizer, reference)
    if newest is not None and state is not None:
        checkpoint.load_optimizer(newest, optimizer, scheduler)
        folder.rewind(state.step)
    else:
        folder.create(config.to_yaml())
        if config.model == "tiny":
            base.save_pretrained(folder.path / "base_model")
            tokenizer.save_pretrained(folder.path / "base_model")
    weights = sum(parameter.numel() for parameter in trained.parameters())
    summary = (
        f"{config.model}: {weights / 1e6:.1f} M weights, {len(prompts)} prompts, {len(held_out)} held "
        f"out, {too_long} left out as too long, {len(recorded)} recorded groups; "
        f"{accelerator.device.type}, float32 products: {precision}"
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
        end_tokens=end_tokens(trained, tokenizer),
        optimizer=optimizer,
        scheduler=scheduler,
        prompts=prompts,
        held_out=held_out,
        recorded=recorded,
        reward=reward,
        base_model=base_model,
        start=state.step if state is not None else 0,
        summary=summary,
    )


def load_base(
    config: TrainConfig, resumed: Path | None
) -> tuple[Any, PreTrainedModel, float | None]:
    """Tokenizer, the model the run starts from (and the reference stays), and a warm start's last
    loss.
    """
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
        TASKS["tiny-arithmetic"]("train"),
        steps=config.warm_start_steps,
        seed=derive_seed(config.seed, "warm start"),
    )
    return tokenizer, model.to(getattr(torch, config.dtype)), loss


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A second model with equal weights of its own."""
    twin: PreTrainedModel = copy.deepcopy(model)
    return twin


def collect(run: Run, step: int) -> tuple[list[Rollout], list[bool]]:
    """The step's rollouts with rewards, and which of them the policy sampled just now.

    Of `prompts_per_step` groups the share `recorded_fraction` is recorded, the rest is generated.
    """
    config = run.config
    num_recorded = round(config.prompts_per_step * config.recorded_fraction) if run.recorded else 0
    num_fresh = config.prompts_per_step - num_recorded
    fresh: list[Rollout] = []
    if num_fresh:
        fresh = score(
            generate(
                run.model,
                run.tokenizer,
                prompts_for_step(run.prompts, num_fresh, step, config.seed),
                num_generations=config.num_generations,
                temperature=config.temperature,
                max_completion_length=config.max_completion_length,
                batch_size=config.generation_batch_size,
                end_tokens=run.end_tokens,
                seed=derive_seed(config.seed, "generate", step),
                step=step,
            ),
            run.reward,
        )
    groups: list[list[Rollout]] = []
    if num_recorded:
        groups = prompts_for_step(run.recorded, num_recorded, step, config.seed)
    # A recorded group may answer a prompt that is also fresh, or come twice: it stays a group of
    # its own.
    recorded = [
        replace(rollout, group=f"recorded-{i}-{rollout.group}")
        for i, group in enumerate(groups)
        for rollout in group
    ]
    return fresh + recorded, [True] * len(fresh) + [False] * len(recorded)


def describe(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Columns of metrics.jsonl that the completions alone tell."""
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    return {
        "reward": mean_reward(rollouts),
        "length": sum(lengths) / len(lengths),
        "truncated": sum(rollout.finish == "length" for rollout in rollouts) / len(rollouts),
        "tokens": float(sum(lengths)),
    }


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def run_evaluation(run: Run, step: int, display: Display) -> Evaluation | None:
    """Evaluates on the held-out prompts and records it; None where the run has none or wants
    none.
    """
    if not run.held_out or not run.config.eval_every:
        return None
    began = time.perf_counter()
    result = evaluate(
        run.model, run.tokenizer, run.held_out, run.reward, run.config, run.end_tokens, step
    )
    run.folder.log_rollouts("samples", step, result.greedy + result.sampled)
    run.folder.log(step, {**result.metrics, "eval_time_s": time.perf_counter() - began})
    display.evaluation(step, result.metrics)
    return result


def save(run: Run, step: int) -> None:
    checkpoint.save(
        run.folder.path,
        checkpoint.TrainerState(step=step, base_model=run.base_model),
        run.model,
        run.tokenizer,
        run.optimizer,
        run.scheduler,
        keep=run.config.save_total_limit,
    )
