"""What a backward pass of the head is given, one record of it for every backend.

Letters: N tokens, D hidden size, V vocabulary.
"""

from typing import NamedTuple

from torch import Tensor

from agro_kernels.head import Head, Upstream
from agro_kernels.kept_logits import KeptLogits
from agro_kernels.many_targets import KnownEntries


class Backward(NamedTuple):
    """The arguments of each backend's `linear_logprobs_bwd`.

    It returns dhidden (N, D), dweight (V, D) and dbias (V,) in the dtypes of their tensors, (0,)
    for each that output_mask leaves out.
    """

    upstream: Upstream
    head: Head
    output_mask: list[bool]
    """Whether the gradients of hidden, of weight and of bias are asked for."""
    weight_grad: Tensor | None = None
    """(V, D) fp32 (float64 of float64): the weight's gradient is added to it, dweight is (0,)."""
    kept_logits: KeptLogits | None = None
    """What the forward pass wrote."""
    known: KnownEntries | None = None
    """Written over those of the logits' gradient."""

    def with_numbers(self) -> "Backward":
        """The same with the temperature as a number where it is one."""
        head = self.head.with_numbers()
        return self if head is self.head else self._replace(head=head)
