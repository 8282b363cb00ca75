"""Environments for the tests: good ones, and ones that fail in each way."""

import os
import random
import time
from typing import Any


class Counts:
    """Says how many turns it has had, twice; then it is done, with a reward."""

    def __init__(self) -> None:
        self.turns = 0

    def reset(self, **columns: Any) -> None:
        del columns

    def step(self, completion: str) -> tuple[str | None, float | None]:
        del completion
        self.turns += 1
        return (str(self.turns), None) if self.turns < 3 else (None, float(self.turns))


class Never(Counts):
    """Is never done, and gives nothing."""

    def step(self, completion: str) -> tuple[str, None]:
        del completion
        return "1+1", None


class Asks(Counts):
    """Has a prompt of its own, and draws random numbers."""

    def reset(self, answer: str = "7", **columns: Any) -> Any:  # type: ignore[override]
        del columns
        return [{"role": "user", "content": f"{answer}+{random.randrange(10)}="}]

    async def step(self, completion: str) -> Any:  # type: ignore[override]
        del completion
        self.turns += 1
        return [{"role": "user", "content": str(random.random())[2:6]}], 0.25


class Hangs(Counts):
    """On the text "hang"."""

    def step(self, completion: str) -> Any:
        if completion == "hang":
            time.sleep(60)
        if completion == "die":
            os._exit(3)
        return super().step(completion)


class Slow(Hangs):
    """In each turn, but not too slow."""

    def step(self, completion: str) -> Any:
        time.sleep(0.7)
        return super().step(completion)


class Fickle(Hangs):
    """Answers the same turn in another way each time."""

    def step(self, completion: str) -> Any:
        found = super().step(completion)
        return (f"{found[0]} {os.getpid()}", None)


class Different(Counts):
    """Has another prompt for each rollout."""

    made = 0

    def reset(self, **columns: Any) -> Any:
        del columns
        Different.made += 1
        return f"{Different.made}+1="


class Raises(Counts):
    def step(self, completion: str) -> Any:
        raise KeyError(completion)


class NoPair(Counts):
    def step(self, completion: str) -> Any:
        return completion


class NoReset:
    def step(self, completion: str) -> None:
        del completion


class BadReset(Counts):
    def reset(self, **columns: Any) -> Any:
        del columns
        return 5


class LongPrompt(Counts):
    def reset(self, **columns: Any) -> Any:
        del columns
        return "1+" * 300
