"""Liger Kernel's chunked fused linear loss."""

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
