"""The loop: prompts -> rollouts -> rewards -> batch -> one policy update a pass."""

import signal
import time
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

from accelerate.utils import gather_object

from agro_train import durable
from agro_train.callbacks import BrokenCallback
from agro_train.data.batch import build_batch
from agro_train.data.mix import in_recorded_order, replayed_groups
from agro_train.data.rollout_log import read_rollouts, sampling_logprob, write_rollouts
from agro_train.engines.engine import BrokenEngine
from agro_train.evaluate import Evaluation, evaluate, passes, summarise
from agro_train.fresh import groups_to_json
from agro_train.interrupt import Interrupted
from agro_train.metrics import describe, peak_memory_gb
from agro_train.policy.checkpoint import Learner, TrainerState
from agro_train.policy.export import export
from agro_train.policy.saver import Saver, in_shards
from agro_train.rewards.functions import refuse_broken, refuse_unasked
from agro_train.run import Run
from agro_train.step import update
from agro_train.types import Rollout
from agro_train.watch.display import Display
from agro_train.watch.plots import plot_run
from agro_train.watch.report import write_report


def train(run: Run) -> Path:
    """Takes a run that `setup` has put together to its last step. Returns the output folder.

    A resumed run goes on from its newest checkpoint; on a CPU the result is then bitwise that of
    a run that was never interrupted. If that was its last step, only what is missing is made.

    Raises:
        Interrupted: a signal came, on any rank. The steps that were taken are saved.
    """
    try:
        with run.interrupts.noted():
            _take_steps(run)
    except (Interrupted, BrokenEngine) as error:
        number = error.number if isinstance(error, Interrupted) else run.interrupts.received
        if number is None:
            raise
        # vLLM, in this process group, may have ended by the same ctrl-C.
        taken = max(run.folder.checkpoints(), default=0)
        raise Interrupted(
            number,
            f"interrupted by {signal.Signals(number).name}; {taken} of {run.config.steps} steps "
            f"are saved, and agro train --resume {run.folder.path} goes on from there",
        ) from None
    finally:
        run.lock.release()
    return run.folder.path


def _take_steps(run: Run) -> None:
    config, start = run.config, run.start.step
    with Display(
        start, config.steps, samples_every=config.samples_every, quiet=not run.main
    ) as display:
        display.say(run.summary)
        taken = saved = start
        saver = Saver(run.folder.path, run.ranks, keep=config.save_total_limit)
        evaluation = None
        try:
            run.callbacks.tell("on_train_begin", config, run.folder.path)
            if not run.start.evaluated and (start == config.steps or due(config.eval_every, start)):
                evaluation, _ = run_evaluation(run, start, display)
            for step in range(start, config.steps):
                run.check_interrupts()
                metrics, rollouts = take_step(run, step)
                if run.main:
                    write_rollouts(run.folder.rollouts(step + 1), rollouts)
                run.log(step + 1, metrics)
                display.step(step + 1, metrics, rollouts)
                taken = step + 1
                ends = run.callbacks.tell("on_step_end", taken, metrics, rollouts)
                last = ends or taken == config.steps
                if last or due(config.eval_every, taken):
                    evaluation, ends = run_evaluation(run, taken, display)
                    last |= ends
                if not last:
                    run.fresh.advance(taken)
                if last or due(config.save_every, taken):
                    saved = taken
                    save(run, saver, taken, last=last)
                if last and taken < config.steps:
                    display.say(f"A callback ended the run after {taken} steps")
                    break
        except (BrokenEngine, BrokenCallback, Interrupted) as error:
            if isinstance(error, Interrupted) and taken > saved:
                display.say(f"{error.name}: step {taken} is being saved; once more ends it at once")
            if taken > saved:  # what was learned is not lost with what broke
                saved = taken
                save(run, saver, taken, last=True)
            saved_whole(run, saver)
            raise
        finally:
            saver.close()
            run.fresh.close()
        if run.main:
            if in_shards(run.models.policy):
                export_last(run)
            plot_run(run.folder.path)
            write_report(run.folder.path)
            if evaluation is not None:
                first = run.folder.samples(0)
                before = read_rollouts(first) if first.exists() else []
                display.before_and_after(before, evaluation.greedy)
        display.say(f"Everything is in {run.folder.path}: start with report.html")
        run.callbacks.tell("on_train_end", taken)
    run.accelerator.wait_for_everyone()  # while the main rank plots, the others stay
    run.accelerator.end_training()


def take_step(run: Run, step: int) -> tuple[dict[str, float], list[Rollout]]:
    """One policy update, the run's number `step` from 0: its row of metrics and the completions it
    learned from, over all ranks, group after group. Writes nothing."""
    config = run.config
    began = time.perf_counter()
    with run.droppable():
        rollouts, groups, on_policy = collect(run, step)
    batch = build_batch(
        rollouts,
        groups,
        on_policy,
        token_budget=config.token_budget,
        share_prompts=config.share_prompts,
        min_new_tokens=config.min_new_tokens,
        mask_truncated=config.mask_truncated_completions,
    )
    stats = update(
        run.models.policy,
        run.models.reference,
        batch,
        config,
        run.accelerator,
        run.optimizer,
        run.scheduler,
    )
    rollouts = [
        # What the policy gave it before this update, where the engine did not tell.
        replace(rollout, sampling_logprob=logprob)
        if rollout.source == "fresh" and sampling_logprob(rollout) is None
        else rollout
        for rollout, logprob in zip(gather_object(rollouts), stats.logprobs, strict=True)
    ]
    metrics = {**describe(rollouts, step, stats.weights), **stats.metrics, **run.fresh.metrics()}
    if run.demonstrations:
        kept = sum(rollout.demonstrated for rollout in rollouts)
        metrics["sample/demonstrations_left_out"] = float(run.mix[step].fresh - kept)
    metrics["epoch"] = epoch(run, step)
    metrics["time_s"] = time.perf_counter() - began
    metrics["tokens_per_s"] = metrics["tokens"] / metrics["time_s"]
    metrics["memory_gb"] = max(gather_object([peak_memory_gb(run.accelerator.device)]))
    metrics["learning_rate"] = run.scheduler.get_last_lr()[0]
    # By group and not by rank: which groups later steps replay is told by their places here, and
    # must not depend on how many ranks there were.
    in_order = sorted(zip(stats.groups, rollouts, strict=True), key=itemgetter(0))
    return metrics, [rollout for _, rollout in in_order]


def collect(run: Run, step: int) -> tuple[list[Rollout], list[int], list[bool]]:
    """This rank's rollouts with rewards, the number of each one's group within the step over all
    ranks, and which of them are samples of the policy as it is now.

    The step's groups are numbered through: fresh ones, then replayed ones, then recorded ones.
    """
    config, mix = run.config, run.mix[step]
    rollouts: list[Rollout] = []
    # A prompt that comes twice in a step makes two groups: their numbers differ.
    groups: list[int] = []
    fresh = run.fresh.take(step)
    if mix.fresh and step == run.start.step:
        # All ranks' at once: one that stopped alone would leave the others waiting.
        everyone = gather_object([r for group in fresh for r in group.rollouts])
        refuse_unasked(everyone)
        refuse_broken(everyone)
    for group in fresh:
        # A worked answer that the reward does not call right would teach the wrong thing.
        kept = [r for r in group.rollouts if r.source == "fresh" or passes(r)]
        rollouts += kept
        groups += [group.number] * len(kept)
    on_policy = [rollout.source == "fresh" and rollout.step == step for rollout in rollouts]
    known = [*replayed(run, step), *recorded(run, step)]
    for number in range(config.prompts_per_step)[run.ranks.rank_slice]:
        if number >= mix.fresh:
            known_group = known[number - mix.fresh]
            rollouts += known_group
            groups += [number] * len(known_group)
            on_policy += [False] * len(known_group)
    return rollouts, groups, on_policy


def replayed(run: Run, step: int) -> list[list[Rollout]]:
    """The step's groups from earlier steps. The main rank, which wrote them, reads them for all."""
    if not run.mix[step].replayed:
        return []
    return run.ranks.from_main(
        lambda: replayed_groups(run.folder.rollouts, run.mix, step, run.config)
    )


def recorded(run: Run, step: int) -> list[tuple[Rollout, ...]]:
    """The step's groups from recorded files."""
    count = run.mix[step].recorded
    return in_recorded_order(run.recorded.groups, step * count, count, run.config.seed)


def epoch(run: Run, step: int) -> float:
    """How often the run has come through its prompts before a step, or through its recorded groups
    where there is nothing else."""
    if run.config.offline:
        return step * run.mix[step].recorded / len(run.recorded.groups)
    return run.mix[step].first_fresh / len(run.questions.prompts)


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def run_evaluation(run: Run, step: int, display: Display) -> tuple[Evaluation | None, bool]:
    """Evaluates on the held-out prompts, records and plots it; None where the run wants none. Also
    whether a callback then asks for the run's end."""
    held_out = run.questions.held_out
    if not held_out or not run.config.eval_every:
        return None, False
    run.check_interrupts()
    began = time.perf_counter()
    mine = run.ranks.rank_slice
    numbers = range(len(held_out))[mine]
    with run.droppable():
        result = evaluate(run.engine, held_out[mine], numbers, run.rewards, run.config, step)
    result = Evaluation(gather_object(result.greedy), gather_object(result.sampled))
    metrics = summarise(result)
    if run.main:
        write_rollouts(run.folder.samples(step), result.greedy + result.sampled)
        run.log(step, {**metrics, "eval_time_s": time.perf_counter() - began})
        plot_run(run.folder.path)
    display.evaluation(step, metrics)
    told = [*result.greedy, *result.sampled]
    return result, run.callbacks.tell("on_evaluate", step, metrics, told)


def save(run: Run, saver: Saver, step: int, *, last: bool) -> None:
    """Saves the run after a step. Shards are then written beside the next steps, unless it is the
    `last` time."""
    saved_whole(run, saver)
    saver.save(
        TrainerState(step=step, base_model=run.models.base_model),
        Learner(run.models.policy, run.models.tokenizer, run.optimizer, run.scheduler),
        ahead=groups_to_json(run.ranks.gather(run.fresh.in_flight(step))),
    )
    if last or not saver.busy:
        saved_whole(run, saver)


def export_last(run: Run) -> None:
    """Writes the newest checkpoint as transformers loads it, in the place of an earlier end's."""
    if run.folder.model.exists():
        durable.delete_folder(run.folder.model)
    newest = max(run.folder.checkpoints())
    export(run.folder.checkpoint(newest), run.folder.model, run.config)


def saved_whole(run: Run, saver: Saver) -> None:
    """Waits for a checkpoint that was begun, and tells of it."""
    if (step := saver.complete()) is not None:
        run.accelerator.wait_for_everyone()  # while the main rank writes, the others stay
        run.callbacks.tell("on_save", step, run.folder.checkpoint(step))
