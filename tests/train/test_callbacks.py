"""callbacks=module:Class: what they are told, how they end a run, and what becomes of a bad one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from agro_train.callbacks import METHODS, BrokenCallback, Callback, Callbacks, load_callbacks
from agro_train.ranks import Ranks
from agro_train.refusal import Refusal


class Recording:
    """Remembers what it is told; ends a run after its second step."""

    told: ClassVar[list[tuple[Any, ...]]] = []

    def on_train_begin(self, config: Any, folder: Path) -> None:
        self.told.append(("begin", config.steps, folder.name))

    def on_step_end(self, step: int, metrics: Any, rollouts: Sequence[Any]) -> bool:
        self.told.append(("step", step, metrics["groups"], len(rollouts)))
        return step == 2

    def on_evaluate(self, step: int, metrics: Any, rollouts: Sequence[Any]) -> None:
        self.told.append(("evaluate", step, "eval_accuracy" in metrics, len(rollouts)))

    def on_save(self, step: int, checkpoint: Path) -> None:
        self.told.append(("save", step, checkpoint.is_dir()))

    def on_train_end(self, step: int) -> None:
        self.told.append(("end", step))


class OnlySteps:
    def on_step_end(self, step: int, metrics: Any, rollouts: Any) -> int:
        return 1  # as true as True, and yet no wish to end the run


class Raising:
    def on_step_end(self, step: int, metrics: Any, rollouts: Any) -> None:
        raise RuntimeError(f"no server for step {step}")


class NeedsArguments:
    def __init__(self, path: str) -> None:
        raise AssertionError("not reached")


class NoMethod:
    def on_step(self) -> None:
        raise AssertionError("not reached")


HERE = "tests.train.test_callbacks"


def test_protocol_and_list_of_methods_are_the_same() -> None:
    assert set(METHODS) == {name for name in vars(Callback) if name.startswith("on_")}


def test_true_alone_asks_for_the_end_and_missing_methods_are_passed_over() -> None:
    callbacks = load_callbacks([f"{HERE}:OnlySteps", f"{HERE}:Recording"], Ranks())
    Recording.told.clear()
    assert callbacks.tell("on_step_end", 1, {"groups": 4.0}, []) is False
    assert callbacks.tell("on_step_end", 2, {"groups": 4.0}, []) is True
    assert callbacks.tell("on_train_end", 2) is False
    assert Recording.told == [("step", 1, 4.0, 0), ("step", 2, 4.0, 0), ("end", 2)]
    assert Callbacks({}, Ranks()).tell("on_train_end", 2) is False


def test_error_is_one_sentence_after_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = load_callbacks([f"{HERE}:Raising"], Ranks())
    with pytest.raises(BrokenCallback) as error:
        callbacks.tell("on_step_end", 3, {}, [])
    assert str(error.value) == (
        f"callbacks: expected on_step_end of {HERE}:Raising to return, got "
        "RuntimeError('no server for step 3'); the traceback above shows where"
    )
    assert "in on_step_end" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "callbacks: expected module:function, got 'nothing'"),
        (f"{HERE}:Absent", "callbacks: expected a function Absent in "),
        (f"{HERE}:NeedsArguments", "to be made without arguments, got TypeError"),
        (f"{HERE}:NoMethod", "callbacks: expected a class with one of on_train_begin, "),
    ],
)
def test_class_that_is_none_is_refused(spec: str, message: str) -> None:
    with pytest.raises(Refusal) as error:
        load_callbacks([spec], Ranks())
    assert message in str(error.value)
