"""Settings every test shares: the seed, where Triton runs, how many threads, and no network.

And what tests of both packages look through: other sizes of a module's constants, and the calls of
the project's own ops.
"""

import os
import random
from types import ModuleType
from typing import Protocol

import pytest
import torch

# Triton decides at import time whether a kernel is interpreted, so this precedes every import of
# it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

torch.set_num_threads(min(2, os.cpu_count() or 1))


class SetSizes(Protocol):
    def __call__(self, module: ModuleType, **sizes: int) -> None: ...


@pytest.fixture
def set_sizes(monkeypatch: pytest.MonkeyPatch) -> SetSizes:
    """Gives constants of a module, a block's or a chunk's size, other values for the test.

    Small inputs then take several blocks.
    """

    def set_them(module: ModuleType, **sizes: int) -> None:
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)

    return set_them


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test draws the same numbers whichever tests have run before it."""
    random.seed(0)
    torch.manual_seed(0)
