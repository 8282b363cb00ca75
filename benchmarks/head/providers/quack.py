"""QuACK's chunked linear cross-entropy."""

from torch import Tensor

from benchmarks.head.providers.base import Inputs, Provider


class Quack(Provider):
    """Its result is one number for all tokens, so its gradients are those of equal coefficients."""

    name = "quack"
    what = "QuACK's chunked linear cross-entropy, summed over all tokens"
    packages = ("quack-kernels",)
    devices = ("cuda",)
    stores_logits = True  # of 4096 tokens at a time
    has_softcap = False
    has_known_coefficients = True

    def __init__(self) -> None:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        self._function = chunked_linear_cross_entropy

    def reason_against(self, form: str, with_entropy: bool, inputs: Inputs) -> str | None:
        reason = super().reason_against(form, with_entropy, inputs)
        c = inputs.coefficients
        if reason is None and (form != "known_coefficients" or bool((c != c[0]).any())):
            return "gives one number for all tokens"
        if reason is None and inputs.hidden.shape[0] % 8 > 0:
            return "takes multiples of 8 tokens"
        return reason

    def logprobs(self, inputs: Inputs) -> Tensor:
        raise NotImplementedError("quack gives one number for all tokens")

    def weighted_sum(self, inputs: Inputs) -> Tensor:
        loss: Tensor = self._function(inputs.hidden, inputs.weight, inputs.targets, reduction="sum")
        return -inputs.coefficients[0] * loss
