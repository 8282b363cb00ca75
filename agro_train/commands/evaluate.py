"""`agro eval`: a model, a run or a checkpoint on held-out prompts."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agro_train import config as configuration
from agro_train.commands.sampler import (
    Sampler,
    check_free,
    in_words,
    load_sampler,
)
from agro_train.data.rollout_log import write_rollouts
from agro_train.evaluate import Estimate, Evaluation, estimates, evaluate
from agro_train.metrics import proportion
from agro_train.policy import checkpoint
from agro_train.refusal import Refusal
from agro_train.rewards.functions import load_rewards, refuse_unasked
from agro_train.run_folder import RunFolder

DESCRIPTION = (
    "pass@1, pass@k and maj@k on held-out prompts. A run's own configuration is used, with "
    "key=value settings over it."
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("settings", nargs="*", metavar="key=value")


def run(options: Namespace) -> int:
    folder, results, found = evaluate_model(options.model, options.settings)
    if any(results["left_out"].values()):
        print(f"held-out prompts left out: {in_words(results['left_out'])}")
    print("95 % intervals: bootstrap over the prompts")
    for name, estimate in found.items():
        print(f"{name:>9}  {estimate.value:.3f}  [{estimate.low:.3f}, {estimate.high:.3f}]")
    print(
        f"{'cut off':>9}  {results['truncated_rate']:.3f}  of the completions, at "
        f"max_completion_length={results['max_completion_length']}"
    )
    print(f"Results and every sample are in {folder}")
    return 0


def evaluate_model(
    name: str, settings: Sequence[str]
) -> tuple[Path, dict[str, Any], dict[str, Estimate]]:
    """Evaluates a run's newest checkpoint, one of its checkpoints, or any model, on the held-out
    prompts of its configuration with `settings` over it.

    Writes results.json, samples.jsonl (every completion) and config.yaml to the folder it returns:
    `output_dir` where it is among the settings, else RUN/evaluations/CHECKPOINT for a run and
    evaluations/MODEL for any other model. Returns what results.json has, and the estimates among
    it, too.
    """
    source, step = checkpoint.find_model(name, print)
    home = Path(name) if RunFolder(Path(name)).is_run() else None
    if home is None and step is not None and RunFolder(Path(name).parent).is_run():
        home = Path(name).parent
    if home is not None:
        config = replace(configuration.load(RunFolder(home).config, settings), model=source)
    else:  # the model is named here, so that another one's settings do not stand in
        config = configuration.load(None, [*settings, f"model={json.dumps(source)}"])
    folder = RunFolder(home or Path()).evaluations / Path(source).resolve().name
    if any(setting.startswith("output_dir=") for setting in settings):
        folder = Path(config.output_dir)
    check_free(folder, "output_dir")
    rewards = load_rewards(config)
    sampler = load_sampler(config)
    held_out, left_out = sampler.questions.held_out, sampler.questions.left_out_held
    if not held_out and any(left_out.values()):
        raise Refusal(
            f"eval_prompts: expected held-out prompts to evaluate on, got none but "
            f"{left_out['too_long']} that are too long and {left_out['unreadable_gold']} whose "
            "gold answer cannot be parsed; raise max_prompt_length or mend the answers"
        )
    if not held_out:
        raise Refusal(
            "eval_prompts: expected held-out prompts to evaluate on, got none in "
            f"{config.data or 'recorded files'}; give eval_prompts=N or eval_data=FILE"
        )
    result = evaluate(
        sampler.engine(),
        held_out,
        range(len(held_out)),
        rewards,
        config,
        sampler.step,
    )
    refuse_unasked([*result.greedy, *result.sampled])
    found = estimates(result, rewards, config)
    return folder, _write_evaluation(folder, sampler, result, found), found


def _write_evaluation(
    folder: Path, sampler: Sampler, result: Evaluation, found: dict[str, Estimate]
) -> dict[str, Any]:
    folder.mkdir(parents=True)
    samples = [*result.greedy, *result.sampled]
    write_rollouts(folder / "samples.jsonl", samples)
    RunFolder(folder).config.write_text(sampler.config.to_yaml())
    results: dict[str, Any] = {
        "model": sampler.source,
        "step": sampler.step,
        "prompts": len(result.greedy),
        "left_out": sampler.questions.left_out_held,
        "generations": sampler.config.eval_generations,
        "temperature": sampler.config.temperature,
        "max_completion_length": sampler.config.max_completion_length,
        "truncated_rate": proportion(samples, lambda r: r.finish == "length"),
        "timeout_rate": proportion(samples, lambda r: r.failure == "timeout"),
        "error_rate": proportion(samples, lambda r: r.failure == "error"),
        **{name: asdict(estimate) for name, estimate in found.items()},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results
