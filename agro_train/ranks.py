"""One process among those of a launch: its part of a list, and what the main one does for all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from agro_train.refusal import Refusal

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are. By default the only one."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, accelerator: Any) -> "Ranks":
        return cls(accelerator.process_index, accelerator.num_processes)

    @property
    def main(self) -> bool:
        """The main rank alone writes files."""
        return self.rank == 0

    @property
    def rank_slice(self) -> slice:
        """Of a list, this rank's items: every world-th from its own number on."""
        return slice(self.rank, None, self.world)

    def block(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's neighbours in a list; all ranks' blocks, in their order, are the list."""
        first, end = (len(items) * number // self.world for number in (self.rank, self.rank + 1))
        return items[first:end]

    def gather(self, items: list[T]) -> list[T]:
        """All ranks' items, in the order of ranks. Every rank must call it."""
        everyone: list[T] = items if self.world == 1 else gather_object(items)
        return everyone

    def from_main(self, function: Callable[[], T]) -> T:
        """function(), which the main rank alone calls, for all ranks; if it raises Refusal, so do
        all, and none waits for ever. Every rank must call this."""
        found: list[Any] = [None]
        if self.main:
            try:
                found = [function()]
            except Refusal as error:
                found = [error]
        (result,) = found if self.world == 1 else broadcast_object_list(found)
        if isinstance(result, Refusal):
            raise result
        value: T = result
        return value
