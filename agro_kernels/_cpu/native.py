"""Loads the library that csrc is built into, and says what its functions take.

The environment variable AGRO_CPU_ISA, read when the library is loaded, chooses the instruction set:
avx512bf16, avx512, avx2, neon or scalar, or none for the blocked torch path. Unset, the best one
that the CPU has is used. It is there for tests and for comparing machines.
"""

import ctypes
import functools
import os
import warnings
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

# The interface that this file describes: csrc/agro_cpu.h, AGRO_INTERFACE_VERSION.
INTERFACE_VERSION = 4
LIBRARY_PATH = Path(__file__).with_name("_native.so")

# What the functions return.
OK, BAD_ARGUMENT, OUT_OF_MEMORY, UNKNOWN_ISA = range(4)


class Head(ctypes.Structure):
    """`agro_head`: the inputs that every op shares."""

    _fields_ = [
        ("hidden", c_void_p),
        ("weight", c_void_p),
        ("targets", c_void_p),
        ("bias", c_void_p),
        ("token_temperature", c_void_p),
        ("n", c_int64),
        ("d", c_int64),
        ("v", c_int64),
        ("hidden_stride", c_int64),
        ("weight_stride", c_int64),
        ("ignore_index", c_int64),
        ("temperature", c_float),
        ("softcap", c_float),
        ("dtype", c_int32),
        ("num_threads", c_int32),
    ]


class Kept(ctypes.Structure):
    """`agro_kept`: logits that the forward pass keeps for the backward pass."""

    _fields_ = [("logits", c_void_p), ("maxima", c_void_p), ("columns", c_int64)]


class Entries(ctypes.Structure):
    """`agro_entries`: entries of the logits' gradient that are known already."""

    _fields_ = [("ids", c_void_p), ("values", c_void_p), ("count", c_int64)]


_HEAD, _KEPT, _ENTRIES = (ctypes.POINTER(struct) for struct in (Head, Kept, Entries))
# name: (type of the result, types of the arguments)
_SIGNATURES = {
    "agro_linear_logprobs_fwd": (c_int32, [_HEAD, *[c_void_p] * 3, _KEPT]),
    "agro_linear_logprobs_bwd": (
        c_int32,
        [*[c_void_p] * 4, _HEAD, *[c_void_p] * 6, _KEPT, _ENTRIES],
    ),
    "agro_available_isas": (c_char_p, []),
    "agro_isa": (c_char_p, []),
    "agro_set_isa": (c_int32, [c_char_p]),
    "agro_exp": (None, [c_void_p, c_void_p, c_int64]),
    "agro_tanh": (None, [c_void_p, c_void_p, c_int64]),
}


def open_library(path: Path) -> ctypes.CDLL:
    """The library at `path` with its functions declared; OSError if it cannot serve."""
    library = ctypes.CDLL(str(path))
    try:
        version = library.agro_interface_version
    except AttributeError as error:
        raise OSError(f"{path}: it is not the library that csrc is built into") from error
    version.restype, version.argtypes = c_int32, []
    if version() != INTERFACE_VERSION:  # the structs would be laid out differently
        raise OSError(
            f"{path}: it was built from version {version()} of csrc/agro_cpu.h, this package "
            f"needs version {INTERFACE_VERSION}"
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def choose_isa(library: ctypes.CDLL, name: str) -> None:
    """Use the named instruction set from now on, in every thread."""
    if library.agro_set_isa(name.encode()) != OK:
        available = library.agro_available_isas().decode().replace(",", ", ")
        raise ValueError(
            f"AGRO_CPU_ISA: expected one of {available}, which are built in and run on this CPU, "
            f"or none for the torch path, got {name!r}; unset it to use the first of them"
        )


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None where the blocked torch path serves. Asked at the first CPU call."""
    isa = os.environ.get("AGRO_CPU_ISA", "")
    if isa == "none":
        return None
    try:
        library = open_library(LIBRARY_PATH)
    except OSError as error:
        warnings.warn(
            f"agro_kernels: the native CPU kernels cannot be loaded ({error}), so the blocked "
            "torch path serves CPU tensors: right, in bounded memory, but slower; install a C++17 "
            "compiler and run `pip install -v --force-reinstall --no-deps` on the package, which "
            "prints what a build lacks, or set AGRO_CPU_ISA=none to do without",
            stacklevel=2,
        )
        return None
    if isa:
        choose_isa(library, isa)
    return library


def check_status(status: int, what: str) -> None:
    """Raise what the status of a call of the library means."""
    if status == OUT_OF_MEMORY:
        raise MemoryError(
            f"{what}: the working memory of the native CPU kernels could not be allocated; pass "
            "fewer tokens at a time, or use fewer threads (torch.set_num_threads)"
        )
    if status != OK:
        raise RuntimeError(f"{what}: the native CPU kernels refused their arguments ({status})")
