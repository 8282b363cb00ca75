"""Liger Kernel's chunked fused linear loss, and its scaled cross-entropy for Hopper."""

import torch
from torch import Tensor

from benchmarks.head.providers.base import Inputs, Provider


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


class LigerScaled(Provider):
    """Its CuTe kernels need two packages more; on other GPUs it is plain torch in chunks."""

    name = "liger_scaled"
    what = "Liger's fused linear scaled cross-entropy, on a Hopper"
    packages = ("liger-kernel", "nvidia-cutlass-dsl", "apache-tvm-ffi")
    devices = ("cuda",)
    has_entropy = True
    has_softcap = False

    def __init__(self) -> None:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction,
        )

        self._apply = LigerFusedLinearScaledCrossEntropyFunction.apply

    def reason_against(self, form: str, with_entropy: bool, inputs: Inputs) -> str | None:
        reason = super().reason_against(form, with_entropy, inputs)
        if reason is None and torch.cuda.get_device_capability(inputs.hidden.device) != (9, 0):
            return "has kernels for a Hopper only"
        return reason

    def logprobs(self, inputs: Inputs) -> Tensor:
        nll: Tensor = self._apply(inputs.hidden, inputs.weight, inputs.targets)
        return -nll

    def logprobs_and_entropy(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        nll, entropy = self._apply(inputs.hidden, inputs.weight, inputs.targets, 1.0, -100, 1, True)
        return -nll, entropy
