"""Several turns with a tool: the model writes a sum and "=", the environment writes what it makes.

    python environment_with_a_tool.py

A rollout is the model's turns and the environment's between them; only what the model sampled is
trained. The environment is told the row's columns, and its last word is the reward. `agro train`
shows the reward and, as `environment/turns`, how many turns the model took.
"""

import re
import sys

from agro_train.cli import main

SETTINGS = [
    "environment=environment_with_a_tool:Calculator",
    "reward=environment",  # the sum of the numbers that `step` returned
    "stop=['=']",  # a turn of the model's ends with it, or with the end token
    "max_turns=4",
    "output_dir=runs/environment-with-a-tool",
]


class Calculator:
    """One object a rollout."""

    def reset(self, answer: str, **columns: object) -> None:
        """The row's columns. Returns None: the prompt is the row's own."""
        self.answer = answer

    def step(self, completion: str) -> tuple[str | None, float | None]:
        """What the model reads next, or None where the rollout is done; and a number, or None."""
        asked = re.search(r"(\d+(?:\+\d+)+)=$", completion)
        if asked:
            return str(sum(map(int, asked[1].split("+")))), None
        return None, float(completion.rpartition(",")[2] == self.answer)


if __name__ == "__main__":
    raise SystemExit(main(["train", *SETTINGS, *sys.argv[1:]]))
