"""`agro eval`: a model, a run or a checkpoint on held-out prompts."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from agro_train import config as configuration
from agro_train.commands.sampler import (
    Sampler,
    check_free,
    find_model,
    in_words,
    is_run,
    load_sampler,
)
from agro_train.data.recorded import write_rollouts
from agro_train.evaluate import Estimate, Evaluation, estimates, evaluate
from agro_train.metrics import proportion
from agro_train.refusal import Refusal
from agro_train.rewards.functions import load_rewards
from agro_train.run_folder import RunFolder

DESCRIPTION = (
    "pass@1, pass@k and maj@k on held-out prompts. A run's own configuration is used, with "
    "key=value settings over it."
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    folder, found, left_out = evaluate_model(options.model, options.settings)
    if any(left_out.values()):
        print(f"held-out prompts left out: {in_words(left_out)}")
    print("95 % intervals: bootstrap over the prompts")
    for name, estimate in found.items():
        print(f"{name:>9}  {estimate.value:.3f}  [{estimate.low:.3f}, {estimate.high:.3f}]")
    print(f"Results and every sample are in {folder}")
    return 0


def evaluate_model(
    name: str, settings: Sequence[str]
) -> tuple[Path, dict[str, Estimate], dict[str, int]]:
    """Evaluates a run's newest checkpoint, one of its checkpoints, or any model, on the held-out
    prompts of its configuration with `settings` over it.

    Writes results.json, samples.jsonl (every completion) and config.yaml to the folder it returns:
    `output_dir` where it is among the settings, else RUN/evaluations/CHECKPOINT for a run and
    evaluations/MODEL for any other model. Returns the estimates and, by reason, how many held-out
    prompts were left out, too.
    """
    source, step = find_model(name)
    home = Path(name) if is_run(Path(name)) else None
    if home is None and step is not None and is_run(Path(name).parent):
        home = Path(name).parent
    config = configuration.load(None if home is None else RunFolder(home).config, settings)
    config = replace(config, model=source)
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
            f"eval_prompts: expected held-out prompts to evaluate on, got none in {config.data}; "
            "give eval_prompts=N or eval_data=FILE"
        )
    result = evaluate(
        sampler.engine(),
        held_out,
        range(len(held_out)),
        rewards,
        config,
        sampler.step,
    )
    found = estimates(result, rewards, config)
    _write_evaluation(folder, sampler, result, found)
    return folder, found, left_out


def _write_evaluation(
    folder: Path, sampler: Sampler, result: Evaluation, found: dict[str, Estimate]
) -> None:
    folder.mkdir(parents=True)
    samples = [*result.greedy, *result.sampled]
    write_rollouts(folder / "samples.jsonl", samples)
    (folder / "config.yaml").write_text(sampler.config.to_yaml())
    results = {
        "model": sampler.source,
        "step": sampler.step,
        "prompts": len(result.greedy),
        "left_out": sampler.questions.left_out_held,
        "generations": sampler.config.eval_generations,
        "temperature": sampler.config.temperature,
        "truncated_rate": proportion(samples, lambda r: r.finish == "length"),
        "timeout_rate": proportion(samples, lambda r: r.failure == "timeout"),
        "error_rate": proportion(samples, lambda r: r.failure == "error"),
        **{name: asdict(estimate) for name, estimate in found.items()},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
