"""The matmul lower bound that every provider is compared with: a form's matrix products alone."""

import functools
from collections.abc import Callable, Sequence

import torch

from benchmarks.head.providers.base import Inputs, gemms_of


class GemmFloor:
    """The matrix products of a form through torch.mm: no program that calls it can be faster.

    Each product goes over the vocabulary in blocks of its own size, into tensors allocated
    beforehand. A program with matrix products of its own may be below it.

    Args:
        form: a key of FORM_GEMMS.
        inputs: what the form would be given; nothing is differentiated.
        kept: the logits are made once, as where the backward pass finds them stored.
        blocks: the sizes that `tune` tries; the largest decides the memory, N times it.
    """

    name = "floor"
    kept_name = "floor_kept"
    what = "the matmul lower bound"

    def __init__(
        self,
        form: str,
        inputs: Inputs,
        blocks: Sequence[int] = (1024, 2048, 4096),
        *,
        kept: bool = False,
    ):
        self.gemms = gemms_of(form, kept=kept)
        self.hidden, self.weight = inputs.hidden.detach(), inputs.weight.detach()
        self.v = self.weight.shape[0]
        self.candidates = sorted({min(self.v, block) for block in blocks})
        self.block = dict.fromkeys(self.gemms, self.candidates[-1])
        n = self.hidden.shape[0]
        # Random numbers: on zeros a GPU would draw less power and run at a higher clock.
        self.tile = torch.randn(n * self.candidates[-1], device=self.hidden.device)
        self.tile = self.tile.to(self.hidden.dtype)
        self.dhidden = torch.empty_like(self.hidden)
        self.dweight = torch.empty_like(self.weight) if "dweight" in self.gemms else None

    def tune(self, seconds: Callable[[Callable[[], None]], float]) -> str:
        """Keeps the fastest block of each product; returns them, such as "logits 4096".

        seconds: times a call.
        """
        most = 4 * self.candidates[-1]  # vocabulary entries: a part of it is enough to choose
        for which in self.block:
            times = {}
            for block in self.candidates:
                call = functools.partial(self.product, which, block, most)
                call()
                times[block] = min(seconds(call) for _ in range(2))
            self.block[which] = min(times, key=times.__getitem__)
        return ", ".join(f"{which} {block}" for which, block in self.block.items())

    def product(self, which: str, block: int, most: int) -> None:
        """One pass over the first `most` entries of the vocabulary, of one of the products."""
        n = self.hidden.shape[0]
        for start in range(0, min(self.v, most), block):
            weight = self.weight[start : start + block]
            width = weight.shape[0]
            tile = self.tile[: n * width]
            if which == "logits":
                torch.mm(self.hidden, weight.T, out=tile.view(n, width))
            elif which == "dhidden":
                torch.mm(tile.view(n, width), weight, out=self.dhidden)
            elif self.dweight is not None:
                # A program may keep the tile either way; the transposed one is the faster here.
                out = self.dweight[start : start + width]
                torch.mm(tile.view(width, n), self.hidden, out=out)

    def __call__(self) -> None:
        for which in self.gemms:
            self.product(which, self.block[which], self.v)
