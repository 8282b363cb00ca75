"""Reward functions for the trainer's tests. A process of their own imports them at every run, so
nothing that takes long to import belongs here.

The ones that fail do so for prompts with a completion that begins with token 3.
"""

import ctypes
import os
import time
from collections.abc import Sequence


def even_share(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward that any weights earn some of: the share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def first_even(completion_ids: list[list[int]], **_: object) -> list[float]:
    """1.0 where the first token's id is even: right and wrong from any weights."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def by_length(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def halves(completions: list[str], **_: object) -> list[float | None]:
    return [0.5] * 3 + [None] * (len(completions) - 3)


def nothing(completions: list[str], **_: object) -> list[None]:
    return [None] * len(completions)


def broken_reward(**_: object) -> list[float]:
    raise RuntimeError("no server")


def flaky_reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Raises for the prompts of about every fourth completion by its content, else 1.0."""
    if any(sum(ids) % 16 == 3 for ids in completion_ids):
        raise RuntimeError("an odd completion")
    return [1.0] * len(completion_ids)


def odd_ones_hang(completion_ids: list[list[int]], **_: object) -> list[float]:
    """As flaky_reward, but it does not return."""
    if any(sum(ids) % 16 == 3 for ids in completion_ids):
        wait_in_native_code()
    return [1.0] * len(completion_ids)


def raising(completion_ids: list[list[int]], **_: object) -> list[float]:
    if has_three(completion_ids):
        raise KeyError("three")
    return by_length(completion_ids)


def leaving(completions: list[str], **_: object) -> list[float]:
    if "b" in completions:
        raise SystemExit("no server")
    return [1.0] * len(completions)


def dying(completion_ids: list[list[int]], **_: object) -> list[float]:
    if has_three(completion_ids):
        os.abort()
    return by_length(completion_ids)


def shapeless(completion_ids: list[list[int]], **_: object) -> Sequence[object]:
    return ["a"] if has_three(completion_ids) else by_length(completion_ids)


def hanging(completion_ids: list[list[int]], **_: object) -> list[float]:
    while has_three(completion_ids):
        try:
            time.sleep(1000)
        except BaseException:  # which code that waits for a server may well do
            pass
    return by_length(completion_ids)


def hanging_in_native_code(completion_ids: list[list[int]], **_: object) -> list[float]:
    if has_three(completion_ids):
        wait_in_native_code()
    return by_length(completion_ids)


def wait_in_native_code() -> None:
    """For ever, with the interpreter locked: no signal handler runs, and no other thread."""
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def has_three(completion_ids: list[list[int]]) -> bool:
    return any(ids[0] == 3 for ids in completion_ids)
