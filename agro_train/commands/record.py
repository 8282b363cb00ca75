"""The commands around training: `agro rollout`, `agro score`, `agro eval`. One process each."""

import os
from pathlib import Path

from agro_train.commands.sampler import check_free, load_sampler
from agro_train.config import TrainConfig
from agro_train.data.recorded import rollout_to_json
from agro_train.refusal import Refusal
from agro_train.rewards.functions import load_rewards, score
from agro_train.seeds import derive_seed


def record(config: TrainConfig, output: Path, count: int | None) -> tuple[int, dict[str, int]]:
    """Writes num_generations scored completions of `count` (None: all) training prompts to
    `output`, lines that `recorded=` takes. Returns how many, and the prompts left out by reason.

    The file appears when it is complete.
    """
    check_free(output, "output")
    rewards = load_rewards(config)
    sampler = load_sampler(config)
    prompts = sampler.questions.prompts[:count]
    if not prompts:
        raise Refusal(
            f"data: expected gold answers that math-verify can parse, got none in {config.data}; "
            "choose another reward, or mend the column of answers"
        )
    partial = output.with_name(f".partial-{output.name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with partial.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for start in range(0, len(prompts), config.prompts_per_step):
            chosen = range(len(prompts))[start : start + config.prompts_per_step]
            rollouts = sampler.engine().complete(
                [prompts[number] for number in chosen],
                seeds=[derive_seed(config.seed, "record", number) for number in chosen],
                num_generations=config.num_generations,
                temperature=config.temperature,
                step=sampler.step,
            )
            for rollout in score(rollouts, rewards):
                file.write(rollout_to_json(rollout) + "\n")
                written += 1
    os.replace(partial, output)
    return written, sampler.questions.left_out
