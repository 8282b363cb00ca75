"""Plain torch: stored logits, torch.compile, checkpointing, torch's own linear cross-entropy."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.head.providers.base import Inputs, Provider


def plain_logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """(N, V) fp32, the product rounded to the dtype of hidden, as model code leaves it."""
    logits = F.linear(hidden, weight).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None
) -> Tensor:
    """(N,) fp32."""
    logprobs_all = plain_logits(hidden, weight, softcap).log_softmax(-1)
    return logprobs_all.gather(-1, targets[:, None]).squeeze(-1)


def plain_logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Both (N,) fp32."""
    logprobs_all = plain_logits(hidden, weight, softcap).log_softmax(-1)
    logprobs = logprobs_all.gather(-1, targets[:, None]).squeeze(-1)
    return logprobs, -(logprobs_all.exp() * logprobs_all).sum(-1)


class PlainTorch(Provider):
    name = "torch"
    what = "F.linear, float, log_softmax, gather"
    stores_logits = True
    has_entropy = True

    def logprobs(self, inputs: Inputs) -> Tensor:
        return plain_logprobs(inputs.hidden, inputs.weight, inputs.targets, inputs.softcap)

    def logprobs_and_entropy(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return plain_logprobs_and_entropy(
            inputs.hidden, inputs.weight, inputs.targets, inputs.softcap
        )


class CompiledTorch(Provider):
    name = "torch_compile"
    what = "torch.compile of the plain program"
    stores_logits = True
    has_entropy = True

    def __init__(self) -> None:
        self._logprobs = torch.compile(plain_logprobs)
        self._logprobs_and_entropy = torch.compile(plain_logprobs_and_entropy)

    def logprobs(self, inputs: Inputs) -> Tensor:
        return self._logprobs(inputs.hidden, inputs.weight, inputs.targets, inputs.softcap)

    def logprobs_and_entropy(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return self._logprobs_and_entropy(
            inputs.hidden, inputs.weight, inputs.targets, inputs.softcap
        )


class CompiledCheckpoint(Provider):
    """The usual home-made loop: chunks of tokens, each compiled, each checkpointed."""

    name = "checkpointed_loop"
    what = "torch.compile over chunks of tokens, checkpointed"
    has_entropy = True
    setting = 256  # tokens a chunk

    def __init__(self) -> None:
        self._logprobs = torch.compile(plain_logprobs)
        self._logprobs_and_entropy = torch.compile(plain_logprobs_and_entropy)

    def logprobs(self, inputs: Inputs) -> Tensor:
        return torch.cat(self._over_chunks(self._logprobs, inputs))

    def logprobs_and_entropy(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        logprobs, entropy = zip(*self._over_chunks(self._logprobs_and_entropy, inputs), strict=True)
        return torch.cat(logprobs), torch.cat(entropy)

    def _over_chunks(self, function: Callable[..., Any], inputs: Inputs) -> list[Any]:
        chunks = zip(
            inputs.hidden.split(self.setting), inputs.targets.split(self.setting), strict=True
        )
        return [
            checkpoint(function, h, inputs.weight, t, inputs.softcap, use_reentrant=False)
            for h, t in chunks
        ]


class TorchLinearCrossEntropy(Provider):
    name = "torch_lce"
    what = "torch.nn.functional.linear_cross_entropy, its own choice of chunks"
    has_softcap = False
    multiplies_in_fp32 = True

    @classmethod
    def missing(cls) -> str | None:
        here = hasattr(torch.nn, "LinearCrossEntropyOptions")
        return None if here else f"not in torch {torch.__version__}; it came with 2.13"

    def options(self) -> Any:
        return torch.nn.LinearCrossEntropyOptions()

    def logprobs(self, inputs: Inputs) -> Tensor:
        loss: Tensor = F.linear_cross_entropy(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            reduction="none",
            options=self.options(),
        )
        return -loss


class TorchLinearCrossEntropyTuned(TorchLinearCrossEntropy):
    name = "torch_lce_tuned"
    what = "torch.nn.functional.linear_cross_entropy, the fastest of a few chunk sizes"
    setting = 1024  # rows a chunk

    def settings(self, inputs: Inputs) -> list[Any]:
        n = inputs.hidden.shape[0]
        return sorted({min(n, chunk) for chunk in (256, 1024, 4096)})

    def options(self) -> Any:
        return torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=self.setting, chunking_method=None
        )
