"""What the head ops do inside: their matrix products, and the largest tensor they make."""

from collections.abc import Iterator

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agro_kernels._torch import linear_logprobs as blocked
from agro_kernels.ops.dispatch import with_head
from agro_kernels.ops.linear_logprobs import with_kept, with_upstream

BLOCKED = {
    "linear_logprobs_fwd": with_head(with_kept(blocked.linear_logprobs_fwd)),
    "linear_logprobs_bwd": with_upstream(blocked.linear_logprobs_bwd),
    "target_logprobs": with_head(blocked.target_logprobs),
}


class Recorder(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor that any operation returned.

    A mode sees an op as one operation; inside this one the ops run on the blocked torch path, whose
    operations it sees.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.largest = 0
        """Elements, if of four bytes each."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if func.namespace == "agro":
            with self:
                return BLOCKED[name](*args)
        result = func(*args, **(kwargs or {}))
        self.products += name in ("mm", "addmm", "addmm_")
        for tensor in _tensors(result):
            self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
        return result


def _tensors(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)
