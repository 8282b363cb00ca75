"""AGRO as a trainer of TRL, used as RLOOTrainer is. Needs `pip install '.[trl]'`.

The reward is the share of even digits in a completion. TRL prints its log of each step; at the end
comes the mean reward of the first and of the last three steps.
"""

import argparse

from datasets import Dataset

from agro_train.integrations.trl import AGROConfig, AGROTrainer


def even_digits(completions: list[str], **columns: object) -> list[float]:
    return [sum(c in "02468" for c in text) / max(1, len(text)) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    options = parser.parse_args()

    args = AGROConfig(
        "runs/trl-agro",
        beta=0.05,  # in units of reward
        num_generations=8,
        per_device_train_batch_size=64,  # completions
        max_completion_length=16,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        logging_steps=1,
        report_to=[],
        bf16=False,  # on a GPU that has it leave this line out
    )
    dataset = Dataset.from_list([{"prompt": f"{a}+{a}="} for a in range(10, 90)])
    trainer = AGROTrainer(options.model, even_digits, args, train_dataset=dataset)
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    first, last = sum(rewards[:3]) / len(rewards[:3]), sum(rewards[-3:]) / len(rewards[-3:])
    print(f"reward {first:.3f} at first, {last:.3f} at last")


if __name__ == "__main__":
    main()
