"""A reward of your own beside a built-in one: 1 for the right answer, 0.1 more for a short one.

    python own_reward.py         # or, in this folder: agro train reward=[number,own_reward:brief]

The function gets lists, one entry a completion, and any column of the dataset by its name. It runs
in a process of its own, so that it may hang or crash. `agro train` shows each function's mean.
"""

import sys

from agro_train.cli import main

SETTINGS = [
    "reward=[number,own_reward:brief]",
    "reward_weights=[1,0.1]",
    "output_dir=runs/own-reward",
]


def brief(completions: list[str], answer: list[str], **columns: object) -> list[float | None]:
    """1 for the bare answer, less the longer the text is; None, no opinion, of an empty one."""
    return [
        min(1.0, len(gold) / len(text)) if text else None
        for text, gold in zip(completions, answer, strict=True)
    ]


if __name__ == "__main__":
    raise SystemExit(main(["train", *SETTINGS, *sys.argv[1:]]))
