"""The calls of the project's own ops while a test runs something."""

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Notes the arguments of every call of one op, as the dispatcher sees them."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.arguments: list[tuple[object, ...]] = []
        """Of each call, in their order."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "agro" and func.overloadpacket.__name__ == self.op:
            self.arguments.append(args)
        return func(*args, **(kwargs or {}))
