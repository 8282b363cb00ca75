"""The inputs of an op of logits that the caller holds, one record of them.

The ops' schemas list them flat; the backends take the record.
"""

from typing import NamedTuple

from torch import Tensor

from agro_kernels.head import one_number


class LogitRows(NamedTuple):
    """Logits of N tokens, in any number of leading axes, and what is asked of them."""

    logits: Tensor
    """(..., V) bf16, fp16, fp32 or float64, any strides."""
    targets: Tensor
    """(...) int32 or int64: ids in [0, V), or ignore_index."""
    temperature: float
    """1.0 where token_temperature is given."""
    token_temperature: Tensor | None
    """(N,) fp32, used instead of `temperature`; or a number as a tensor, as `Head` has it."""
    ignore_index: int
    softcap: float = 0.0
    """0.0 is none."""

    @staticmethod
    def capped(
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        token_temperature: Tensor | None,
        softcap: float,
        ignore_index: int,
    ) -> "LogitRows":
        """In the order of the schemas that have a softcap."""
        return LogitRows(logits, targets, temperature, token_temperature, ignore_index, softcap)

    def with_numbers(self) -> "LogitRows":
        """The same with the temperature as a number where it is one."""
        if self.token_temperature is None or self.token_temperature.dim() > 0:
            return self
        temperature, none = one_number(self.temperature, self.token_temperature)
        return self._replace(temperature=temperature, token_temperature=none)
