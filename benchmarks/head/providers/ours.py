"""agro_kernels."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

import agro_kernels
from agro_kernels.kept_logits import CPU_TILE
from benchmarks.head.providers.base import Inputs, Provider, gemms_of


class Ours(Provider):
    name = "ours"
    what = "agro_kernels"
    has_entropy = True
    has_known_coefficients = True

    def options(self, inputs: Inputs) -> dict[str, Any]:
        return {"softcap": inputs.softcap}

    def logprobs(self, inputs: Inputs) -> Tensor:
        return agro_kernels.linear_logprobs(
            inputs.hidden, inputs.weight, inputs.targets, **self.options(inputs)
        )

    def logprobs_and_entropy(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return agro_kernels.linear_logprobs_with_entropy(
            inputs.hidden, inputs.weight, inputs.targets, **self.options(inputs)
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


class OursKeeping(Ours):
    """With room for a share of the logits, which the backward pass then does not make again."""

    what = "agro_kernels, keep_logits_bytes for a share of the logits"
    devices = ("cpu",)
    stores_logits = True
    has_known_coefficients = False
    share: ClassVar[float]

    def reason_against(self, form: str, with_entropy: bool, inputs: Inputs) -> str | None:
        if gemms_of(form, kept=True) == gemms_of(form):
            return "keeps nothing where the logits are made once"
        return super().reason_against(form, with_entropy, inputs)

    def options(self, inputs: Inputs) -> dict[str, Any]:
        n, v = inputs.hidden.shape[0], inputs.weight.shape[0]
        row = v * inputs.hidden.element_size() + 4 * math.ceil(v / CPU_TILE)
        return super().options(inputs) | {"keep_logits_bytes": math.ceil(self.share * n * row)}


class OursKeepingQuarter(OursKeeping):
    name = "ours_keeping_quarter"
    share = 0.25


class OursKeepingHalf(OursKeeping):
    name = "ours_keeping_half"
    share = 0.5


class OursKeepingMost(OursKeeping):
    """About as many as make it as fast as the fastest peer that stores them all."""

    name = "ours_keeping_most"
    share = 0.85


class OursKeepingAll(OursKeeping):
    name = "ours_keeping_all"
    share = 1.0


KEEPING = (
    OursKeepingQuarter.name,
    OursKeepingHalf.name,
    OursKeepingMost.name,
    OursKeepingAll.name,
)


@torch.no_grad()
def earlier_lse(inputs: Inputs) -> Tensor:
    """(N,) fp32: what known_coefficients takes from the pass that its coefficients came from."""
    return agro_kernels.linear_logprobs_with_stats(
        inputs.hidden, inputs.weight, inputs.targets, softcap=inputs.softcap
    ).lse
