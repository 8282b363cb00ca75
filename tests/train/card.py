"""A device that is not there: tensors that say they are on it, whose numbers are in the host's
memory. What a real one refuses is refused, and what the host would wait for is noted.

A process that has called `make_card` has a device type "card" for the rest of its life, so tests
that need one run in a process of their own (`card_main.py`).
"""

import sys
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from agro_kernels.head import ROWS_STAY

ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / package}/" for package in ("agro_train", "agro_kernels"))
# The functions that begin a phase of a run; the innermost one on the stack counts.
PHASES = {
    "setup": "set-up",
    "collect": "generate",
    "score_batch": "score",
    "update": "update",
    "evaluate": "evaluate",
    "save": "save",
}

COPIES = {"_to_copy", "copy_"}
READS = {"_local_scalar_dense", "is_nonzero", "equal"}
# The shapes of their results depend on what the tensors hold.
UNKNOWN_SHAPE = {
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
# On a GPU these ask how many of the targets count, unless they are told that rows stay; here the
# CPU's kernels are called.
HEADS = ("linear_logprobs_fwd", "linear_logprobs_bwd")
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Event(NamedTuple):
    """Something between host and card.

    Of the kinds `upload` alone does not make the host wait: a copy from pinned memory that was
    asked for with non_blocking. `blocking upload` and `download` wait until the card has done all
    that came before, and so do `read` (a number, or whether tensors are equal) and `shape` (a
    result whose shape the card has to tell).
    """

    kind: str
    op: str
    phase: str
    site: str  # file and function of ours, the innermost; and transformers, where that asked
    line: str  # where in it


class CardTensor(Tensor):
    """A tensor on the card: `raw` holds its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "CardTensor":
        made: CardTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device("card", 0),
        )
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: a tensor of the card is used outside `Card`")

    def tolist(self) -> Any:
        return self.cpu().tolist()


def make_card() -> torch.device:
    """The device, made once a process. It is not available, so nothing chooses it by itself."""
    _setup_privateuseone_for_python_backend("card", _Module(), _Hook())
    # Where torch's C++ makes a tensor of a Python list, no mode is asked.
    library = Library("aten", "IMPL")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    # Else torch writes it out in other ops, which round otherwise than the one op of the host.
    library.impl("silu_backward", _refuse, "PrivateUse1")
    _KEPT.append(library)
    return torch.device("card", 0)


_KEPT: list[Library] = []  # a library that is collected takes its kernels with it


class _Module(_DummyBackendModule):  # type: ignore[misc]
    """What `torch.card` is."""

    def is_available(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Asked by recomputed layers, whether or not there is autocast."""
        return [torch.bfloat16]


class _Hook(torch._C._acc.PrivateUse1Hooks):  # type: ignore[misc]
    def is_available(self) -> bool:
        return False

    def has_primary_context(self, index: int) -> bool:
        del index
        return True

    def is_built(self) -> bool:
        return True


def _empty(size: Any, **options: Any) -> Tensor:
    return CardTensor(torch.empty(size, dtype=options.get("dtype")))


def _empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
    return CardTensor(torch.empty_strided(size, stride, dtype=options.get("dtype")))


def _refuse(*arguments: Any) -> Tensor:
    raise AssertionError(f"{arguments}: a tensor of the card is used outside `Card`")


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Tensor:
    del non_blocking
    Card.entered[-1].note("blocking upload", "_copy_from")
    _raw(target).copy_(_raw(source))
    return target  # type: ignore[no-any-return]


class Card(TorchDispatchMode):
    """While it is entered the card works; `events` are in their order."""

    entered: ClassVar[list["Card"]] = []

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.pinned: list[Tensor] = []  # kept, so that no other tensor comes to lie there

    def __enter__(self) -> "Card":
        self.entered.append(self)
        # A backward pass is run by this thread, so that its events have our code on their stack.
        self.threads = torch.autograd.set_multithreading_enabled(False)
        self.threads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.threads.__exit__(*error)
        self.entered.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(isinstance(tensor, CardTensor) for tensor in tensors)
        asked = kwargs.get("device")
        if asked is None:
            result_there = there
        else:
            result_there = torch.device(asked).type == "card"
            kwargs["device"] = torch.device("cpu") if result_there else asked
        if there or result_there:
            self._check(func, name, tensors, args, kwargs, there, result_there)
        made = {id(_raw(tensor)): tensor for tensor in tensors}
        pinned = kwargs.pop("pin_memory", None)
        results = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
        if pinned:
            self.pinned.append(results)
        if name == "copy_":
            return args[0]
        if not result_there:
            return results

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            same = made.get(id(leaf))  # what an op in place was given
            return CardTensor(leaf) if same is None else same

        return tree_map(wrap, results)

    def _check(
        self,
        func: Any,
        name: str,
        tensors: list[Tensor],
        args: Any,
        kwargs: Any,
        there: bool,
        result_there: bool,
    ) -> None:
        """Notes what the host waits for, and refuses what a card refuses."""
        if name in COPIES:
            source = args[0] if name == "_to_copy" else args[1]
            if name == "copy_":
                result_there = isinstance(args[0], CardTensor)
            if isinstance(source, CardTensor) != result_there:
                later = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
                up = "upload" if later and self._is_pinned(source) else "blocking upload"
                self.note(up if result_there else "download", name)
            return
        if name in INDEXING:
            self._check_indices(name, args)
        elif there:
            strangers = [t for t in tensors if not isinstance(t, CardTensor) and t.dim()]
            if strangers:
                raise _mixed(func)
        if not there:
            return
        unknown = name in UNKNOWN_SHAPE
        if name.startswith(HEADS):
            unknown = ROWS_STAY not in [each for each in args if isinstance(each, int)]
        if name == "repeat_interleave":
            unknown = kwargs.get("output_size") is None
        if name in READS:
            self.note("read", name)
        elif unknown:
            self.note("shape", name)

    def _is_pinned(self, tensor: Tensor) -> bool:
        place = tensor.untyped_storage().data_ptr()
        return any(place == each.untyped_storage().data_ptr() for each in self.pinned)

    def _check_indices(self, name: str, args: Any) -> None:
        itself, indices, values = args[0], args[1], args[2:3]
        if not isinstance(itself, CardTensor):
            raise _mixed(name)
        masks = [t for t in indices if t is not None and t.dtype in (torch.bool, torch.uint8)]
        fills = name != "index" and values[0].numel() == 1 and len(masks) == len(indices) == 1
        if masks and not (fills and not isinstance(values[0], CardTensor)):
            self.note("shape", name)
        if any(t is not None and not isinstance(t, CardTensor) for t in indices):
            self.note("blocking upload", name)
        if name != "index" and not isinstance(values[0], CardTensor) and values[0].dim():
            raise _mixed(name)

    def note(self, kind: str, op: str) -> None:
        phase, by, inner, function = "", "", None, ""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if inner is None and "/site-packages/transformers/" in frame.f_code.co_filename:
                by = " transformers"
            if frame.f_code.co_filename.startswith(OURS):
                inner, name = inner or frame, frame.f_code.co_name
                # A comprehension has a frame of its own until Python 3.11.
                function = function or ("" if name.startswith("<") else name)
                phase = phase or PHASES.get(frame.f_code.co_name, "")
            frame = frame.f_back
        if inner is None:
            self.events.append(Event(kind, op, phase, "", ""))
            return
        path = Path(inner.f_code.co_filename).relative_to(ROOT)
        site = f"{path} {function}{by}"
        self.events.append(Event(kind, op, phase, site, f"{path}:{inner.f_lineno}"))


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, CardTensor) else value


def _mixed(op: Any) -> RuntimeError:
    return RuntimeError(f"{op}: expected all tensors on one device, got some on the card")
