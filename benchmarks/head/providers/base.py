"""The interface of a provider, the inputs that all are given, and the forms that are measured.

A provider computes log-probabilities from hidden states: this project, or a peer. A new peer is one
subclass of Provider in a file of this folder, and one line in registry.py. A benchmark uses all of
them in the same way:

    provider = PROVIDERS["trl_chunked"]()
    provider.missing()                                  # None, or what to install
    provider.reason_against("forward_backward", True, inputs)   # None, or why it cannot do that
    step = Step(provider, "forward_backward", inputs, with_entropy=True)
    step()                                              # forward, then backward: time this
    step.results()                                      # logprobs, entropy, dhidden, dweight

A peer's packages are imported by its constructor, so those that are not installed do no harm. The
forms, with the number of matrix products of 2 N D V operations that each needs when the logits are
not stored:

    forward             logprobs, no gradient                                            1
    forward_backward    and the gradients of hidden and weight for a given dlogprobs     4
    frozen_weight       and the gradient of hidden alone (LoRA, a frozen lm_head)        3
    known_coefficients  sum of coefficients * logprobs and its gradients, coefficients
                        (and, for ours, lse) known beforehand                            3
"""

import importlib.metadata
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.measure.shapes import Shape

# form -> the products of one head that it needs, in order; the floor runs exactly these.
FORM_GEMMS: dict[str, tuple[str, ...]] = {
    "forward": ("logits",),
    "forward_backward": ("logits", "logits", "dhidden", "dweight"),
    "frozen_weight": ("logits", "logits", "dhidden"),
    "known_coefficients": ("logits", "dhidden", "dweight"),
}
FORMS = tuple(FORM_GEMMS)


def gemms_of(form: str, *, kept: bool = False) -> tuple[str, ...]:
    """The products of a form; kept: of one whose backward pass finds all logits stored."""
    gemms = FORM_GEMMS[form]
    return gemms[1:] if kept and gemms.count("logits") > 1 else gemms


FORM_TITLES = {  # in tables and charts
    "forward": "forward",
    "forward_backward": "forward and backward",
    "frozen_weight": "frozen weight",
    "known_coefficients": "known coefficients",
}


@dataclass
class Inputs:
    """What every provider is given. A Step sets requires_grad of hidden and weight."""

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
    """One way to compute log-probabilities; the class attributes say what it can do.

    `setting` is what can be tuned, such as a chunk size; a benchmark may try `settings()` and keep
    the fastest.
    """

    name: ClassVar[str]
    what: ClassVar[str]  # one line, for the legend
    packages: ClassVar[tuple[str, ...]] = ()  # on PyPI, beyond torch
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    stores_logits: ClassVar[bool] = False  # an (N, V) tensor is materialised
    has_entropy: ClassVar[bool] = False
    has_softcap: ClassVar[bool] = True
    has_known_coefficients: ClassVar[bool] = False  # a form of its own, not forward and backward
    # bf16 inputs are upcast for some products, so that torch.set_float32_matmul_precision matters.
    multiplies_in_fp32: ClassVar[bool] = False
    needs_compiler: ClassVar[bool] = False  # raises where torch.compile is disabled
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
        """The values of `setting` to try on these inputs; empty: there is nothing to tune."""
        return []

    @abstractmethod
    def logprobs(self, inputs: Inputs) -> Tensor:
        """(N,), differentiable."""

    def logprobs_and_entropy(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Both (N,), both differentiable."""
        raise NotImplementedError(f"{self.name} gives no entropy")

    def weighted_sum(self, inputs: Inputs) -> Tensor:
        """Sum of coefficients * logprobs, 0-d; from `logprobs` where there is no own form."""
        return (inputs.coefficients * self.logprobs(inputs)).sum()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass
class Results:
    """The results of a step; None where its form has no such result."""

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
        """Drops the last results, as an optimiser's zero_grad(set_to_none=True) does."""
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
