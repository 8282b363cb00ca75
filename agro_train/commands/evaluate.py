"""`agro eval`: a model, a run or a checkpoint on held-out prompts."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from agro_train import config as configuration
from agro_train.commands.sampler import Sampler, check_free, find_model, is_run, load_sampler
from agro_train.data.recorded import rollout_to_json
from agro_train.evaluate import Estimate, Evaluation, estimates, evaluate
from agro_train.metrics import proportion
from agro_train.refusal import Refusal
from agro_train.rewards.functions import load_rewards


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
    run = Path(name) if is_run(Path(name)) else None
    if run is None and step is not None and is_run(Path(name).parent):
        run = Path(name).parent
    config = configuration.load(
        None if run is None else run / "config.yaml", [*settings, f"model={source}"]
    )
    folder = (run or Path()) / "evaluations" / Path(source).resolve().name
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
    found = estimates(result, config)
    _write_evaluation(folder, sampler, result, found)
    return folder, found, left_out


def _write_evaluation(
    folder: Path, sampler: Sampler, result: Evaluation, found: dict[str, Estimate]
) -> None:
    folder.mkdir(parents=True)
    samples = [*result.greedy, *result.sampled]
    lines = "".join(rollout_to_json(r) + "\n" for r in samples)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8", errors="surrogatepass")
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
