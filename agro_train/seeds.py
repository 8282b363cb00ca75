"""Seeds and orders as pure functions of a run's seed: nothing has to be saved to continue."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def shuffled(
    items: Sequence[T], first: int, count: int, seed: int, purpose: str = "order"
) -> list[T]:
    """Items first .. first + count of an endless sequence of epochs, each a fresh permutation.

    A pure function of its arguments: nothing has to be saved to continue where a run stopped.
    Lists of one length have one order, unless they are shuffled for another purpose.
    """
    picked = []
    orders: dict[int, list[int]] = {}
    for index in range(first, first + count):
        epoch, position = divmod(index, len(items))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(derive_seed(seed, purpose, epoch))
            orders[epoch] = torch.randperm(len(items), generator=generator).tolist()
        picked.append(items[orders[epoch][position]])
    return picked


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from a run's seed, a purpose and counters; the same everywhere, always."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
