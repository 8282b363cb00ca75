"""Offline: AGRO on completions that somebody else has made, from a JSON lines file.

    python offline.py                   # on a file that it writes: sums worked out, right and wrong
    python offline.py recorded=mine.jsonl model=smollm2 data=questions.jsonl  # and any setting

Nothing is sampled for training. `agro train` prints the accuracy on held-out sums before and after:
0.08 and about 0.9, in a minute on two cores. The model starts as one that forgets the carry.
"""

import json
import sys
from pathlib import Path

from agro_train.cli import main
from agro_train.data.tasks import tiny_arithmetic

SETTINGS = [
    "model=tiny",
    "warm_start_steps=400",
    "data=tiny-arithmetic",  # the evaluation's questions: without data= nothing is evaluated
    "recorded=sums.jsonl",
    "learning_rate=3e-4",
    "steps=40",
    "max_completion_length=24",
    "eval_every=40",
    "output_dir=runs/offline",
]


def write_sums(path: Path) -> None:
    """Two completions of each prompt, with the carry and without: what a row must have."""
    with path.open("w", encoding="utf-8") as file:
        for row in tiny_arithmetic("train"):  # '37+58=', with answer 95
            for completion in (row["solution"], row["slip"]):
                reward = float(completion.rpartition(",")[2] == row["answer"])
                line = {"prompt": row["prompt"], "completion": completion, "reward": reward}
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    if not any(word.startswith("recorded=") for word in sys.argv[1:]):
        write_sums(Path("sums.jsonl"))
    # What `agro train` does. Of a setting that comes twice the later one counts.
    raise SystemExit(main(["train", *SETTINGS, *sys.argv[1:]]))
