"""`agro rollout`: scored completions of a model, as a file that `recorded=` takes."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from agro_train import config as configuration
from agro_train import durable
from agro_train.commands.sampler import check_free, in_words, load_sampler
from agro_train.config import TrainConfig
from agro_train.data.rollout_log import rollout_to_json
from agro_train.policy.load import barred, end_tokens
from agro_train.policy.logprobs import with_sampling_logprobs
from agro_train.policy.policy import Policy
from agro_train.refusal import Refusal
from agro_train.rewards.functions import load_rewards, refuse_unasked, score
from agro_train.seeds import derive_seed

DESCRIPTION = (
    "Sample num_generations completions for every training prompt of a configuration, score them, "
    "and write a file that recorded= takes; model= may be a run's folder or checkpoint."
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="CONFIG | key=value")
    parser.add_argument("--output", help="default: OUTPUT_DIR/recorded.jsonl")
    parser.add_argument("--prompts", type=int, help="how many prompts; default: all")


def run(options: Namespace) -> int:
    config = configuration.from_arguments(options.settings)
    if options.prompts is not None and options.prompts < 1:
        raise Refusal(f"--prompts: expected at least 1, got {options.prompts}")
    path = Path(options.output) if options.output else Path(config.output_dir) / "recorded.jsonl"
    written, left_out = record(config, path, options.prompts)
    if any(left_out.values()):
        print(f"prompts left out: {in_words(left_out)}")
    print(f"{path}: {written} completions; train on them with recorded=[{path}]")
    return 0


def record(config: TrainConfig, output: Path, count: int | None) -> tuple[int, dict[str, int]]:
    """Writes num_generations scored completions of `count` (None: all) training prompts to
    `output`, lines that `recorded=` takes. Returns how many, and the prompts left out by reason.

    The file appears when it is complete.
    """
    check_free(output, "output")
    if not config.data:
        raise Refusal("data: expected prompts to complete, got none; give data=FILE")
    rewards = load_rewards(config)
    sampler = load_sampler(config)
    prompts = sampler.questions.prompts[:count]
    if not prompts:
        raise Refusal(
            f"data: expected gold answers that math-verify can parse, got none in {config.data}; "
            "choose another reward, or mend the column of answers"
        )
    policy = Policy(sampler.model, barred(config, end_tokens(sampler.model, sampler.tokenizer)))
    output.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with durable.writing(output) as file:
        for start in range(0, len(prompts), config.prompts_per_step):
            chosen = range(len(prompts))[start : start + config.prompts_per_step]
            rollouts = sampler.engine().complete(
                [prompts[number] for number in chosen],
                seeds=[derive_seed(config.seed, "record", number) for number in chosen],
                num_generations=config.num_generations,
                temperature=config.temperature,
                step=sampler.step,
            )
            rollouts = with_sampling_logprobs(rollouts, policy, config, sampler.model.device)
            scored = score(rollouts, rewards)
            refuse_unasked(scored)
            for rollout in scored:
                file.write(rollout_to_json(rollout) + "\n")
                written += 1
    return written, sampler.questions.left_out
