"""The machine that a plan is for: how many processors, of which kind, with what memory."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from agro_train.keys import key, keys_of


class Datasheet(NamedTuple):
    """A processor by its maker's numbers: dense bfloat16 products, nominal bandwidth."""

    memory: float  # bytes
    bfloat16: float  # FLOP/s
    bandwidth: float  # bytes/s
    link: float  # bytes/s that one GPU receives from those of its own node


DATASHEETS = {
    "a100": Datasheet(80e9, 312e12, 2.039e12, 300e9),
    "h100": Datasheet(80e9, 989.4e12, 3.35e12, 450e9),
    "h200": Datasheet(141e9, 989.4e12, 4.8e12, 450e9),
    "b200": Datasheet(180e9, 2250e12, 7.7e12, 900e9),
    "mi300x": Datasheet(192e9, 1307.4e12, 5.3e12, 448e9),
    "mi355x": Datasheet(288e9, 2516.6e12, 8.0e12, 538e9),
}
BETWEEN_NODES = 50e9  # bytes/s a GPU: 400 Gb/s, the usual network card of such nodes
# What is not tensors: the CUDA context, the libraries' workspaces, buffers of collectives. Assumed.
RESERVED = 2e9


@dataclass(frozen=True)
class Machine:
    """What a plan is told beside a run's configuration."""

    gpus: int = key(8, "processes, one a GPU, of all nodes together", least=1)
    gpu: Literal["a100", "h100", "h200", "b200", "mi300x", "mi355x", "cpu"] = key(
        "h100", "of which kind; cpu: the processes compute on processors, no time is predicted"
    )
    memory: float = key(0.0, "GB (1e9 bytes) of one GPU; 0: what its kind has", least=0)
    gpus_per_node: int = key(8, "processes on one node, if there are as many", least=1)
    network: float = key(
        0.0, "GB/s that one GPU receives from the others; 0: its kind's, 50 between nodes", least=0
    )
    efficiency: float = key(
        0.4, "share of the GPU's bfloat16 products that a training pass reaches", above=0, most=1
    )

    @property
    def cuda(self) -> bool:
        """Whether it has GPUs (AMD's are called so, too)."""
        return self.gpu != "cpu"

    @property
    def bytes(self) -> float:
        """Memory of one GPU; 0: not known."""
        if self.memory or not self.cuda:
            return self.memory * 1e9
        return DATASHEETS[self.gpu].memory

    @property
    def reserved(self) -> float:
        return RESERVED if self.cuda else 0.0

    @property
    def beside(self) -> int:
        """Processes of one node."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def link(self) -> float:
        """Bytes a second that one GPU receives from the others."""
        if self.network:
            return self.network * 1e9
        return DATASHEETS[self.gpu].link if self.gpus <= self.gpus_per_node else BETWEEN_NODES


MACHINE_KEYS = keys_of(Machine)
