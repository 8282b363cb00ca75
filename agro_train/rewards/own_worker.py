"""The program of one worker for a function of the user's,
`python -m THIS_MODULE TIMEOUT_S MODULE:FUNCTION`.

The function runs in a process of its own because nothing else ends every call: one that waits in
native code sees no signal handler and no exception. It is imported here and nowhere else. Nothing
of the trainer that is slow to import is, so that a worker starts in a moment.
"""

import base64
import importlib
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from agro_train.refusal import Refusal
from agro_train.rewards.worker_main import serve

RewardFunction = Callable[..., Sequence[float | None]]


def start(spec: str) -> Callable[[str], dict[str, Any]]:
    return partial(work, load_function(spec))


def load_function(spec: str) -> RewardFunction:
    """The function of `module:function`. Raises Refusal, one sentence, where there is none."""
    module_name, _, function_name = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise Refusal(
            f"reward: expected an importable module in {spec!r}, got none ({error}); it is looked "
            f"up in the Python path and in {Path.cwd()}"
        ) from error
    except (Exception, SystemExit) as error:  # whatever the user's module does while it is imported
        traceback.print_exc()
        raise Refusal(
            f"reward: expected an importable module in {spec!r}, got {error!r} while it was "
            "imported; the traceback above shows where"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise Refusal(
            f"reward: expected a function {function_name} in {module.__file__}, got {function!r}"
        )
    return function  # type: ignore[no-any-return]


def work(function: RewardFunction, job: str) -> dict[str, Any]:
    """{"values": one number or None a completion}, or {"error": text, "traceback": text}, for a
    call whose arguments are in a pickle, in base64."""
    try:
        return {"values": call(function, pickle.loads(base64.b64decode(job)))}
    except (Exception, SystemExit) as error:  # the user's code; SystemExit would end the worker
        return {"error": repr(error), "traceback": traceback.format_exc()}


def call(function: RewardFunction, arguments: Mapping[str, Sequence[Any]]) -> list[float | None]:
    """The function's values, one a completion. Raises Refusal for what are not such values."""
    count = len(arguments["completions"])
    values = function(**arguments)
    if not isinstance(values, Sequence) or len(values) != count:
        got = f"{len(values)}" if isinstance(values, Sequence) else type(values).__name__
        raise Refusal(
            f"reward: expected a list of {count} numbers from the reward function, got {got}"
        )
    for value in values:
        if value is not None and not isinstance(value, Real):
            raise Refusal(
                f"reward: expected a number or None from the reward function, got {value!r}"
            )
    return [None if value is None else float(value) for value in values]


if __name__ == "__main__":
    serve(partial(start, sys.argv[2]), timeout_s=float(sys.argv[1]))
