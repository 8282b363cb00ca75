"""Who can compute log-probabilities from hidden states: this project and its peers, one class each.

A benchmark asks each provider the same questions in the same way:

    provider = PROVIDERS["trl_chunked"]()
    provider.missing()                                  # None, or what to install
    provider.reason_against("forward_backward", True, inputs)   # None, or why it cannot do that
    step = Step(provider, "forward_backward", inputs, with_entropy=True)
    step()                                              # forward, then backward: time this
    step.results()                                      # logprobs, entropy, dhidden, dweight

What a peer needs is imported only when the peer is made. The forms, with the number of matrix
products of 2 N D V operations that each needs when the logits are not stored:

    forward             logprobs, no gradient                                            1
    forward_backward    and the gradients of hidden and weight for a given dlogprobs     4
    frozen_weight       and the gradient of hidden alone (LoRA, a frozen lm_head)        3
    known_coefficients  sum of coefficients * logprobs and its gradients, coefficients
                        (and, for ours, lse) known beforehand                            3
"""

import functools
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import agro_kernels
from benchmarks.shapes import Shape

# form -> which of the products of one head are needed, in order; the floor runs exactly these.
FORM_GEMMS: dict[str, tuple[str, ...]] = {
    "forward": ("logits",),
    "forward_backward": ("logits", "logits", "dhidden", "dweight"),
    "frozen_weight": ("logits", "logits", "dhidden"),
    "known_coefficients": ("logits", "dhidden", "dweight"),
}
FORMS = tuple(FORM_GEMMS)


@dataclass
class Inputs:
    """What every provider is given. hidden and weight require a gradient as the form asks."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,) int64, every one counted
    coefficients: Tensor  # (N,) fp32: dlogprobs, or the known coefficients
    entropy_coefficients: Tensor  # (N,) fp32: dentropy
    softcap: float | None = None
    lse: Tensor | None = None  # (N,) fp32, for the known coefficients; of an earlier pass


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", *, logit_std: float = 5.0, seed: int = 0
) -> Inputs:
    """Random normal inputs whose logits have standard deviation logit_std.

    Every second target is drawn towards its token's hidden state, so that half the probabilities
    are near 1, as a trained model's are: exp and 1 - p are then as hard as they get.
    """
    n, d, v = shape.tokens, shape.head.hidden_size, shape.head.vocabulary
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, device=device)
    # Made in its own dtype: an fp32 copy of a large head would be most of the memory in use.
    weight = torch.empty(v, d, dtype=dtype, device=device)
    weight.normal_(0.0, logit_std / d**0.5, generator=generator)
    targets = torch.randint(0, v, (n,), generator=generator, device=device)
    # A step along the target's row raises its logit by 6 logit_std, above all the others.
    rows = weight[targets[::2]].float()
    hidden[::2] += 6.0 * logit_std * rows / rows.square().sum(-1, keepdim=True)
    coefficients = torch.randn(n, generator=generator, device=device)
    entropy_coefficients = 0.1 * torch.randn(n, generator=generator, device=device)
    return Inputs(
        hidden.to(dtype), weight, targets, coefficients, entropy_coefficients, shape.head.softcap
    )


# --- What a provider is ---------------------------------------------------------------------------


class Provider(ABC):
    """One way to compute log-probabilities. Subclasses say what it cannot do, in their own words.

    `setting` is what can be tuned (a chunk size); a benchmark may try `settings()` and keep one.
    """

    name: ClassVar[str]
    what: ClassVar[str]  # one line, for the legend
    packages: ClassVar[tuple[str, ...]] = ()  # on PyPI, beyond torch
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    stores_logits: ClassVar[bool] = False  # an (N, V) tensor exists at some time
    has_entropy: ClassVar[bool] = False
    has_softcap: ClassVar[bool] = True
    has_known_coefficients: ClassVar[bool] = False  # a form of its own, not forward and backward
    # bf16 inputs are upcast for some products, so that torch.set_float32_matmul_precision matters.
    multiplies_in_fp32: ClassVar[bool] = False
    needs_compiler: ClassVar[bool] = False  # refuses to run where torch.compile is switched off
    setting: Any = None

    @classmethod
    def missing(cls) -> str | None:
        """None if it can be imported here, else what to install."""
        absent = [package for package in cls.packages if not _version(package)]
        return f"not installed: {', '.join(absent)}" if absent else None

    @classmethod
    def versions(cls) -> str:
        """Such as "trl 1.16.0"; empty for what comes with torch or with this project."""
        return ", ".join(f"{package} {_version(package)}" for package in cls.packages)

    def reason_against(self, form: str, with_entropy: bool, inputs: Inputs) -> str | None:
        """None if it can compute this, else why not, for the table."""
        if inputs.hidden.device.type not in self.devices:
            return f"not for {inputs.hidden.device.type}"
        if with_entropy and not self.has_entropy:
            return "gives no entropy"
        if inputs.softcap is not None and not self.has_softcap:
            return "takes no softcap"
        return None

    def settings(self, inputs: Inputs) -> list[Any]:
        """What may be tuned for these inputs; empty if there is nothing to tune."""
        return []

    @abstractmethod
    def logprobs(self, inputs: Inputs) -> Tensor:
        """(N,), differentiable."""

    def logprobs_and_entropy(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Both (N,), both differentiable."""
        raise NotImplementedError(f"{self.name} gives no entropy")

    def weighted_sum(self, inputs: Inputs) -> Tensor:
        """sum of coefficients * logprobs, 0-d; written as anyone would where it has no own form."""
        return (inputs.coefficients * self.logprobs(inputs)).sum()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass
class Results:
    """What a step made; None where its form does not ask for it."""

    logprobs: Tensor | None  # (N,)
    entropy: Tensor | None  # (N,)
    dhidden: Tensor | None  # (N, D)
    dweight: Tensor | None  # (V, D)

    def bytes(self) -> int:
        tensors = (self.logprobs, self.entropy, self.dhidden, self.dweight)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Step:
    """One form of one provider on given inputs: what is timed."""

    def __init__(self, provider: Provider, form: str, inputs: Inputs, *, with_entropy: bool):
        if form not in FORMS:
            raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
        if with_entropy and form == "known_coefficients":
            raise ValueError("known_coefficients: the sum has no entropy; ask for logprobs alone")
        self.provider, self.form, self.inputs = provider, form, inputs
        self.with_entropy = with_entropy
        inputs.hidden.requires_grad_(form != "forward")
        inputs.weight.requires_grad_(form not in ("forward", "frozen_weight"))
        self.outputs: tuple[Tensor, ...] = ()

    def __call__(self) -> None:
        """Forward, then backward where the form has one. Gradients are made anew, not added up."""
        self.release()
        self.forward()
        if self.form != "forward":
            self.backward()

    def forward(self) -> None:
        with torch.set_grad_enabled(self.form != "forward"):
            if self.form == "known_coefficients":
                self.outputs = (self.provider.weighted_sum(self.inputs),)
            elif self.with_entropy:
                self.outputs = self.provider.logprobs_and_entropy(self.inputs)
            else:
                self.outputs = (self.provider.logprobs(self.inputs),)

    def backward(self) -> None:
        if self.form == "known_coefficients":
            self.outputs[0].backward()
            return
        upstream = (self.inputs.coefficients, self.inputs.entropy_coefficients)
        torch.autograd.backward(
            self.outputs,
            [u.to(o.dtype) for o, u in zip(self.outputs, upstream, strict=False)],
        )

    def release(self) -> None:
        """Let go of the last results, as an optimiser's zero_grad(set_to_none=True) does."""
        self.outputs = ()
        self.inputs.hidden.grad = self.inputs.weight.grad = None

    def results(self) -> Results:
        known = self.form == "known_coefficients"
        return Results(
            None if known else self.outputs[0].detach(),
            self.outputs[1].detach() if self.with_entropy else None,
            self.inputs.hidden.grad,
            self.inputs.weight.grad,
        )


# --- Ours -----------------------------------------------------------------------------------------


class Ours(Provider):
    name = "ours"
    what = "agro_kernels"
    has_entropy = True
    has_known_coefficients = True

    def logprobs(self, inputs: Inputs) -> Tensor:
        return agro_kernels.linear_logprobs(
            inputs.hidden, inputs.weight, inputs.targets, softcap=inputs.softcap
        )

    def logprobs_and_entropy(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return agro_kernels.linear_logprobs_with_entropy(
            inputs.hidden, inputs.weight, inputs.targets, softcap=inputs.softcap
        )

    def weighted_sum(self, inputs: Inputs) -> Tensor:
        return agro_kernels.weighted_logprob_sum(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            inputs.coefficients,
            lse=inputs.lse,
            softcap=inputs.softcap,
        )


# --- Plain torch ----------------------------------------------------------------------------------


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


# --- Other packages -------------------------------------------------------------------------------


class TrlSelective(Provider):
    name = "trl_selective"
    what = "F.linear, then TRL's selective_log_softmax"
    packages = ("trl", "transformers")
    stores_logits = True
    has_entropy = True

    def __init__(self) -> None:
        from trl.trainer import utils

        self._logprobs = utils.selective_log_softmax
        self._logprobs_and_entropy = utils.selective_log_softmax_and_entropy

    def logprobs(self, inputs: Inputs) -> Tensor:
        result: Tensor = self._logprobs(self._logits(inputs), inputs.targets)
        return result

    def logprobs_and_entropy(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        logprobs, entropy = self._logprobs_and_entropy(self._logits(inputs), inputs.targets)
        return logprobs, entropy

    @staticmethod
    def _logits(inputs: Inputs) -> Tensor:
        logits = F.linear(inputs.hidden, inputs.weight)
        cap = inputs.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class TrlChunked(Provider):
    name = "trl_chunked"
    what = "TRL's chunked log-probabilities"
    packages = ("trl", "transformers")
    multiplies_in_fp32 = True
    has_entropy = True

    def __init__(self) -> None:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        self._function = ChunkedLogProbFunction
        self.setting = _CHUNKED_LOGPROB_CHUNK_SIZE  # vocabulary entries a chunk

    def logprobs(self, inputs: Inputs) -> Tensor:
        return self._apply(inputs, ())[0]

    def logprobs_and_entropy(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        logprobs, entropy, *_ = self._apply(inputs, ("entropy",))
        return logprobs, entropy

    def _apply(self, inputs: Inputs, outputs: tuple[str, ...]) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = self._function.apply(
            inputs.hidden,
            inputs.weight,
            None,
            inputs.targets,
            1.0,
            self.setting,
            inputs.softcap,
            1.0,
            outputs,
        )
        return results


class LigerChunked(Provider):
    name = "liger_chunked"
    what = "the log-probabilities inside Liger's chunked GRPO loss"
    packages = ("liger-kernel",)
    has_softcap = False
    multiplies_in_fp32 = True

    def __init__(self) -> None:
        from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

        self._chunk_forward = LigerFusedLinearPPOBase.chunk_forward

    def logprobs(self, inputs: Inputs) -> Tensor:
        result: Tensor = self._chunk_forward(
            inputs.hidden[None], inputs.weight, inputs.targets[None]
        )
        return result[0]


class CutCrossEntropy(Provider):
    name = "cce"
    what = "cut-cross-entropy's Triton kernels"
    packages = ("cut-cross-entropy",)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    implementation: ClassVar[str] = "cce"

    def __init__(self) -> None:
        from cut_cross_entropy import linear_cross_entropy

        self._function = linear_cross_entropy

    def logprobs(self, inputs: Inputs) -> Tensor:
        loss: Tensor = self._function(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            softcap=inputs.softcap,
            reduction="none",
            impl=self.implementation,
        )
        return -loss


class CutCrossEntropyCompiled(CutCrossEntropy):
    name = "cce_torch_compile"
    what = "cut-cross-entropy's impl='torch_compile'"
    devices = ("cpu", "cuda")
    stores_logits = True
    needs_compiler = True
    implementation = "torch_compile"


PROVIDERS: dict[str, type[Provider]] = {
    provider.name: provider
    for provider in (
        Ours,
        PlainTorch,
        CompiledTorch,
        CompiledCheckpoint,
        TorchLinearCrossEntropy,
        TorchLinearCrossEntropyTuned,
        TrlSelective,
        TrlChunked,
        LigerChunked,
        CutCrossEntropy,
        CutCrossEntropyCompiled,
    )
}


# --- The floor ------------------------------------------------------------------------------------


class GemmFloor:
    """The bare matrix products of a form through torch.mm: nothing that calls it can be faster.

    Each product goes over the vocabulary in blocks of its own size, into tensors made beforehand.

    Args:
        form: a key of FORM_GEMMS.
        inputs: what the form would be given; nothing is differentiated.
        blocks: the sizes that `tune` tries; the largest decides the memory, N times it.
    """

    name = "floor"
    what = "the bare matrix products"

    def __init__(self, form: str, inputs: Inputs, blocks: Sequence[int] = (1024, 2048, 4096)):
        self.form = form
        self.hidden, self.weight = inputs.hidden.detach(), inputs.weight.detach()
        self.v = self.weight.shape[0]
        self.candidates = sorted({min(self.v, block) for block in blocks})
        self.block = dict.fromkeys(FORM_GEMMS[form], self.candidates[-1])
        n = self.hidden.shape[0]
        # Random numbers: on zeros a GPU would draw less power and run at a higher clock.
        self.tile = torch.randn(n * self.candidates[-1], device=self.hidden.device)
        self.tile = self.tile.to(self.hidden.dtype)
        self.dhidden = torch.empty_like(self.hidden)
        self.dweight = torch.empty_like(self.weight) if "dweight" in FORM_GEMMS[form] else None

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
        for which in FORM_GEMMS[self.form]:
            self.product(which, self.block[which], self.v)
