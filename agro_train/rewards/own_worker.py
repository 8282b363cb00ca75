"""The program of one worker for a function of the user's,
`python -m THIS_MODULE TIMEOUT_S MODULE:FUNCTION`.

The function runs in a process of its own because nothing else ends every call: one that waits in
native code sees no signal handler and no exception. It is imported here and nowhere else. Nothing
of the trainer that is slow to import is, so that a worker starts in a moment.
"""

import base64
import inspect
import pickle
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache, partial
from numbers import Real
from typing import TYPE_CHECKING, Any

from agro_train.refusal import Refusal
from agro_train.rewards.worker_main import serve
from agro_train.user_function import load_function

if TYPE_CHECKING:
    import asyncio

RewardFunction = Callable[..., Any]


def start(spec: str) -> Callable[[str], dict[str, Any]]:
    return partial(work, load_function("reward", spec))


def work(function: RewardFunction, job: str) -> dict[str, Any]:
    """{"values": one number or None a completion}, or {"error": text, "traceback": text}, for a
    call whose arguments are in a pickle, in base64."""
    try:
        return {"values": call(function, pickle.loads(base64.b64decode(job)))}
    except (Exception, SystemExit) as error:  # the user's code; SystemExit would end the worker
        return {"error": repr(error), "traceback": traceback.format_exc()}


def call(function: RewardFunction, arguments: Mapping[str, Sequence[Any]]) -> list[float | None]:
    """The function's values, one a completion. Raises Refusal for what are not such values.

    What an async function returns is awaited. Arrays and tensors count as lists, and their elements
    as numbers.
    """
    count = len(arguments["completions"])
    values = settled(function(**arguments))
    if hasattr(values, "tolist"):
        values = values.tolist()  # of an array or a tensor: Python's own numbers
    if not isinstance(values, Sequence) or len(values) != count:
        got = f"{len(values)}" if isinstance(values, Sequence) else repr(values)[:60]
        raise Refusal(
            f"reward: expected a list of {count} numbers from the reward function, got {got}"
        )
    values = [value.item() if hasattr(value, "item") else value for value in values]
    for value in values:
        if value is not None and not isinstance(value, Real):
            raise Refusal(
                f"reward: expected a number or None from the reward function, got {value!r}"
            )
    return [None if value is None else float(value) for value in values]


def settled(result: Any) -> Any:
    """What the user's code returned, awaited where it is async."""
    return event_loop().run(_awaited(result)) if inspect.isawaitable(result) else result


@cache
def event_loop() -> "asyncio.Runner":
    """One for all calls: a client that a function keeps belongs to the loop it was made in."""
    import asyncio  # slow to import, and few functions need it

    return asyncio.Runner()


async def _awaited(values: Awaitable[Any]) -> Any:
    return await values


if __name__ == "__main__":
    serve(partial(start, sys.argv[2]), timeout_s=float(sys.argv[1]))
