"""TRL's selective and chunked log-probabilities."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.head.providers.base import Inputs, Provider


class _Trl(Provider):
    packages = ("trl", "transformers")
    has_entropy = True


class TrlSelective(_Trl):
    name = "trl_selective"
    what = "F.linear, then TRL's selective_log_softmax"
    stores_logits = True

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


class TrlChunked(_Trl):
    name = "trl_chunked"
    what = "TRL's chunked log-probabilities"
    multiplies_in_fp32 = True

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
