"""Code of the user's own, a reward function or a class of environments, in a process of its own.

It is one process a rank, which keeps whatever the code keeps between calls. A call that raises,
ends the process or takes too long is a `Failed`. After the last two the next call starts another.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from agro_train.rewards.workers import NoResult, Workers
from agro_train.types import Failure

LATE_CALLS = 3  # after so many calls that took too long, the others are not made
START_S = 600.0  # for importing the code: its module may load a model

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Failed:
    """A call that gave no answer."""

    failure: Failure
    why: str  # continues a sentence that begins with the code's name
    trace: str = ""  # of the error that it raised
    again: bool = False  # in a call that had been made before, by a process that was killed


class OwnCode(Workers):
    """The process of the code that is called `spec`, module:name, served by the module `worker`."""

    def __init__(self, worker: str, spec: str, timeout_s: float) -> None:
        """Raises Refusal where there is no such code."""
        super().__init__(
            worker,
            spec,
            size=1,  # the code may count its calls
            timeout_s=timeout_s,
            start_s=START_S,
            advice=f"its process imports {spec}, so look there",
        )
        self.start()

    def ask(self, job: Any) -> dict[str, Any] | Failed:
        """What the worker answers. Raises CannotStart where a new process cannot take over."""
        (answer,) = self.map([job])
        if answer is NoResult.TIMED_OUT:
            return Failed("timeout", f"took longer than {self.timeout_s:g} s")
        if answer is NoResult.DIED:
            return Failed("error", "ended its process")
        if "error" in answer:
            return Failed("error", f"failed: {answer['error']}", answer["traceback"])
        return dict(answer)


def one_by_one(
    call: Callable[[Asked], Answer | Failed], asked: Iterable[Asked], *, late: int = 0
) -> Iterator[Answer | Failed]:
    """What `call` gives for each. After LATE_CALLS that took too long, `late` of them before these,
    the others are not made. A call that is made again, for a process that was killed, is none of
    those: it was killed for another one."""
    for one in asked:
        found = call(one) if late < LATE_CALLS else Failed("timeout", "was not called")
        if isinstance(found, Failed):
            late += found.failure == "timeout" and not found.again
        yield found
