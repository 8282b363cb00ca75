"""`module:function` in a setting: a function of the user's own, found by its name."""

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agro_train.refusal import Refusal


def load_function(key: str, spec: str) -> Callable[..., Any]:
    """The function that `spec`, a `module:function`, names.

    The module is looked up in the Python path and in the current folder.

    Args:
        key: the setting that `spec` is the value of, for messages.

    Raises:
        Refusal: there is no such module or function, or the module fails while it is imported;
            what it raised is then printed before.
    """
    module_name, _, function_name = spec.partition(":")
    if not (module_name and function_name):
        raise Refusal(f"{key}: expected module:function, got {spec!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise Refusal(
            f"{key}: expected an importable module in {spec!r}, got none ({error}); it is looked "
            f"up in the Python path and in {Path.cwd()}"
        ) from error
    except (Exception, SystemExit) as error:  # whatever the user's module does while it is imported
        traceback.print_exc()
        raise Refusal(
            f"{key}: expected an importable module in {spec!r}, got {error!r} while it was "
            "imported; the traceback above shows where"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise Refusal(
            f"{key}: expected a function {function_name} in {module.__file__}, got {function!r}; "
            "define it there"
        )
    found: Callable[..., Any] = function
    return found
