"""The program of one reward worker: calls of one function in, its values out, a line each.

    python -m agro_train.rewards.own_worker TIMEOUT_S MODULE:FUNCTION

A function of the user's runs in a process of its own because nothing else ends every call: one that
waits in native code sees no signal handler and no exception. It is imported here and nowhere else.
Nothing of the trainer is, so that a worker starts in a moment.
"""

import base64
import importlib
import json
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from agro_train.refusal import Refusal

RewardFunction = Callable[..., Sequence[float | None]]


def main(timeout_s: float, spec: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's, whose end ends this one
    # What the function prints must not get between the results, nor what it reads out of the jobs.
    jobs = os.fdopen(os.dup(0))
    results = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    try:
        function = load_function(spec)
    except Refusal as error:
        results.write(" ".join(str(error).split()) + "\n")
        return
    results.write("ready\n")
    results.flush()
    for line in jobs:
        # The parent kills a worker that takes too long; without a parent this alarm does.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 10)
        answer = work(function, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        results.write(json.dumps(answer) + "\n")
        results.flush()


def load_function(spec: str) -> RewardFunction:
    """The function of `module:function`. Raises Refusal, one sentence, where there is none."""
    module_name, _, function_name = spec.partition(":")
    if not (module_name and function_name):
        raise Refusal(f"reward: expected number, math or module:function, got {spec!r}")
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
    main(float(sys.argv[1]), sys.argv[2])
