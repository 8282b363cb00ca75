"""The program of the process that environments live in, `python -m THIS_MODULE TIMEOUT_S SPEC`.

A job is one call: of `reset`, or of `step` with a rollout's newest turn. It carries all that came
before, so that a new process, after one that was killed, can bring a rollout to where it was.
"""

import base64
import pickle
import random
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from agro_train.environments.environment import METHODS, Message, messages_of, step_of
from agro_train.refusal import Refusal
from agro_train.rewards.own_worker import settled
from agro_train.rewards.worker_main import serve
from agro_train.user_function import load_function

Said = tuple[list[Message] | None, float | None]  # messages and reward; reset gives no reward


@dataclass
class _Live:
    environment: Any
    calls: int  # of reset and step


def start(spec: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Raises Refusal where the class is not there, or lacks a method."""
    kind = load_function("environment", spec)
    missing = [name for name in METHODS if not callable(getattr(kind, name, None))]
    if missing:
        raise Refusal(
            f"environment: expected a class with the methods {' and '.join(METHODS)} in {spec!r}, "
            f"got one without {' and '.join(missing)}; docs/environments.md shows both"
        )
    return partial(work, kind, {})


def work(kind: Callable[[], Any], live: dict[int, _Live], job: dict[str, Any]) -> dict[str, Any]:
    """{"messages": messages or None, "reward": number or None}, or {"error": text, "traceback":
    text}. A job of `over` alone has the environments of those rollouts closed.

    Args:
        live: the environments of rollouts that are not over, by the rollout's key.
    """
    try:
        if "over" in job:
            for key in live.keys() & set(job["over"]):
                close(live.pop(key).environment)
            return {"messages": None, "reward": None}
        messages, reward = call(kind, live, **job)
    except (Exception, SystemExit) as error:  # the user's code; SystemExit would end the worker
        return {"error": _reason(error), "traceback": traceback.format_exc()}
    return {"messages": messages, "reward": reward}


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, Refusal) else repr(error)


def call(
    kind: Callable[[], Any],
    live: dict[int, _Live],
    key: int,
    columns: str,
    texts: list[str],
    seeds: list[int],
    said: list[Any],
) -> Said:
    """What the newest call of a rollout says.

    Args:
        columns: of the dataset's row, a pickle in base64.
        texts: the model's turns so far; the first call, of `reset`, has none.
        seeds: of each call, for `random` and `numpy.random`.
        said: what the calls before this one said.
    """
    one = live.get(key)
    if one is None or one.calls != len(texts):
        one = live[key] = _Live(kind(), calls=0)
    while True:
        found = _next(one, columns, texts, seeds[one.calls])
        one.calls += 1
        if one.calls > len(texts):
            return found
        if list(found) != said[one.calls - 1]:
            raise Refusal(
                "environment: expected the same answers to the same turns, when a new process "
                f"took up a rollout, got {str(found)[:60]!r} and before "
                f"{str(said[one.calls - 1])[:60]!r}"
            )


def _next(one: _Live, columns: str, texts: list[str], seed: int) -> Said:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if one.calls == 0:
        row = pickle.loads(base64.b64decode(columns))
        return messages_of("reset", settled(one.environment.reset(**row))), None
    return step_of(settled(one.environment.step(texts[one.calls - 1])))


def close(environment: Any) -> None:
    if callable(getattr(environment, "close", None)):
        settled(environment.close())


if __name__ == "__main__":
    serve(partial(start, sys.argv[2]), timeout_s=float(sys.argv[1]))
