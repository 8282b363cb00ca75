"""agro_kernels."""

import torch
from torch import Tensor

import agro_kernels
from benchmarks.head.providers.base import Inputs, Provider


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


@torch.no_grad()
def earlier_lse(inputs: Inputs) -> Tensor:
    """(N,) fp32: what known_coefficients takes from the pass that its coefficients came from."""
    return agro_kernels.linear_logprobs_with_stats(
        inputs.hidden, inputs.weight, inputs.targets, softcap=inputs.softcap
    ).lse
