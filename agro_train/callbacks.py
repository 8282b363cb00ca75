"""`callbacks=module:Class`: objects of the user's own that a run tells what it does.

They are made and called on the main rank alone, between two steps.
"""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from agro_train.config import TrainConfig
from agro_train.ranks import Ranks
from agro_train.refusal import Refusal
from agro_train.types import Rollout
from agro_train.user_function import load_function

METHODS = ("on_train_begin", "on_step_end", "on_evaluate", "on_save", "on_train_end")


class Callback(Protocol):
    """What a class may have; a method that it lacks is not called. It is made without arguments.

    Where `on_step_end` or `on_evaluate` returns True, the run ends after that step as if it were
    the last: evaluated, saved and drawn.
    """

    def on_train_begin(self, config: TrainConfig, folder: Path) -> None:
        """Before the first step of this start of the run."""

    def on_step_end(
        self, step: int, metrics: Mapping[str, float], rollouts: Sequence[Rollout]
    ) -> bool | None:
        """After each step, counted from 1, with its row of metrics.jsonl and what it learned
        from."""

    def on_evaluate(
        self, step: int, metrics: Mapping[str, float], rollouts: Sequence[Rollout]
    ) -> bool | None:
        """After each evaluation, with the held-out completions, greedy ones first."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        """After each checkpoint."""

    def on_train_end(self, step: int) -> None:
        """After the last step, when plots and report are there."""


class BrokenCallback(Refusal):
    """A callback failed; the message says which, and its traceback has been printed."""


class Callbacks:
    """The configured ones. Every rank calls each method of this class; the main one passes it on,
    and all have the answer."""

    def __init__(self, callbacks: Mapping[str, Any], ranks: Ranks) -> None:
        """
        Args:
            callbacks: by what the setting calls them; only the main rank needs any.
        """
        self._callbacks, self._ranks = callbacks, ranks
        self._any = bool(ranks.from_main(lambda: bool(callbacks)))

    def tell(self, method: str, *arguments: Any) -> bool:
        """Calls a method of METHODS; whether a callback asks for the run's end. Raises
        BrokenCallback where one raises."""
        assert method in METHODS, f"no callback has {method}"
        return self._any and self._ranks.from_main(lambda: self._tell(method, arguments))

    def _tell(self, method: str, arguments: Sequence[Any]) -> bool:
        ends = False
        for name, callback in self._callbacks.items():
            function = getattr(callback, method, None)
            if function is None:
                continue
            with _told_as(BrokenCallback, f"{method} of {name} to return"):
                ends |= function(*arguments) is True
        return ends


def load_callbacks(specs: Sequence[str], ranks: Ranks) -> Callbacks:
    """One object of each class. Raises Refusal for one that cannot be found or made, or that has no
    method that a run calls."""

    def make() -> dict[str, Any]:
        return {spec: _made(spec) for spec in specs}

    found: dict[str, Any] = {}
    ranks.from_main(lambda: found.update(make()))
    return Callbacks(found, ranks)


def _made(spec: str) -> Any:
    kind = load_function("callbacks", spec)
    with _told_as(Refusal, f"{spec} to be made without arguments"):
        callback = kind()
    if not any(callable(getattr(callback, method, None)) for method in METHODS):
        raise Refusal(
            f"callbacks: expected a class with one of {', '.join(METHODS)} in {spec}, got none; "
            "name its methods so"
        )
    return callback


@contextmanager
def _told_as(kind: type[Exception], expected: str) -> Iterator[None]:
    """Whatever the user's code raises inside, with its traceback, as an error of this kind."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        raise kind(
            f"callbacks: expected {expected}, got {error!r}; the traceback above shows where"
        ) from error
