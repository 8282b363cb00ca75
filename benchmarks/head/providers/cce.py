"""Apple's cut-cross-entropy, its kernels and its torch.compile form."""

from typing import ClassVar

from torch import Tensor

from benchmarks.head.providers.base import Inputs, Provider


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
