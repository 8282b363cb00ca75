"""agro_kernels."""

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
