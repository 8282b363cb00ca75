"""The program of the process that environments live in, `python -m THIS_MODULE TIMEOUT_S SPEC`.

A job is one call: of `reset`, or of `step` with a turn of a rollout's. A process that has not made
the calls before it, because it was started after another one was killed, says which come first.
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
    text}, or {"made": number} where that many of the rollout's calls have been made here, and not
    all that come before the job's. A job of `over` alone has the environments of those rollouts
    closed.

    Args:
        live: the environments of rollouts that are not over, by the rollout's key.
    """
    try:
        if "over" in job:
            for key in live.keys() & set(job["over"]):
                close(live.pop(key).environment)
            return {"messages": None, "reward": None}
        found = call(kind, live, **job)
    except (Exception, SystemExit) as error:  # the user's code; SystemExit would end the worker
        return {"error": _reason(error), "traceback": traceback.format_exc()}
    if isinstance(found, int):
        return {"made": found}
    messages, reward = found
    return {"messages": messages, "reward": reward}


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, Refusal) else repr(error)


def call(
    kind: Callable[[], Any],
    live: dict[int, _Live],
    key: int,
    number: int,
    seed: int,
    columns: str | None = None,
    text: str = "",
) -> Said | int:
    """What a call of a rollout says; where others come first, how many of them have been made.

    Args:
        number: of the call in the rollout; 0 is that of `reset`.
        seed: for `random` and `numpy.random`.
        columns: of the dataset's row, for `reset`: a pickle in base64.
        text: the model's turn, for `step`.
    """
    one = live.get(key)
    if one is None or one.calls > number:
        one = live[key] = _Live(kind(), calls=0)
    if one.calls < number:
        return one.calls
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if columns is not None:
        row = pickle.loads(base64.b64decode(columns))
        found: Said = messages_of("reset", settled(one.environment.reset(**row))), None
    else:
        found = step_of(settled(one.environment.step(text)))
    one.calls += 1
    return found


def close(environment: Any) -> None:
    if callable(getattr(environment, "close", None)):
        settled(environment.close())


if __name__ == "__main__":
    serve(partial(start, sys.argv[2]), timeout_s=float(sys.argv[1]))
