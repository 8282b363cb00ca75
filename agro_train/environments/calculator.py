"""A calculator: where the model's turn ends with a sum and "=", it is told what the sum comes to.

With `stop==` a turn ends there. The rollout is done with the first turn that ends in another way.
"""

import re
from typing import Any

SUM = re.compile(r"(\d+(?: ?\+ ?\d+)+) ?= ?$")


class Calculator:
    """Says no reward: `reward=number` reads the last turn."""

    def reset(self, **columns: Any) -> None:
        """The prompt is the row's own."""

    def step(self, completion: str) -> tuple[str | None, None]:
        """
        >>> Calculator().step("8,3+5+1=")
        ('9', None)
        >>> Calculator().step(",95")
        (None, None)
        """
        asked = SUM.search(completion)
        return (str(sum(map(int, asked[1].split("+")))) if asked else None), None
