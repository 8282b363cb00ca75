"""The rows of a head that count, gathered: ignored targets, and more, cost nothing after this."""

from dataclasses import dataclass

from torch import Tensor

from agro_kernels.head import Head


@dataclass(frozen=True)
class CountedRows:
    """M of the N rows of a head."""

    head: Head
    """Of the M rows."""
    index: Tensor | None
    """(M,) int64: which of the N rows these are. None: all of them."""
    num_tokens: int
    """N."""

    def take(self, values: Tensor) -> Tensor:
        """(N, ...) -> (M, ...), contiguous."""
        return values.contiguous() if self.index is None else values.index_select(0, self.index)

    def put_back(self, values: Tensor) -> Tensor:
        """(M, ...) -> (N, ...), zeros in the rows that do not count."""
        if self.index is None:
            return values
        zeros = values.new_zeros(self.num_tokens, *values.shape[1:])
        return zeros.index_copy_(0, self.index, values)


def counted_rows(head: Head, counted: Tensor, *, wait: bool = True) -> CountedRows:
    """The rows of the (N,) bool mask `counted`, gathered; what the others hold is never read.

    How many rows count is known to the device only, so a GPU is waited for, once. Where that is
    not possible or not wanted (wait False) all rows stay, the others with zero hidden states and
    ignored.
    """
    num_tokens = counted.shape[0]
    if not wait:
        head = head._replace(
            hidden=head.hidden.masked_fill(~counted[:, None], 0.0),
            targets=head.targets.where(counted, head.ignore_index),
        )
    index = counted.nonzero().squeeze(1) if wait else None
    if index is not None and index.shape[0] == num_tokens:
        index = None
    rows = CountedRows(head, index, num_tokens)
    of_rows = head._replace(
        hidden=head.hidden if index is None else rows.take(head.hidden),
        targets=rows.take(head.targets),
        token_temperature=_taken(rows, head.token_temperature),
        kept=_taken(rows, head.kept),
    )
    return CountedRows(of_rows, index, num_tokens)


def _taken(rows: CountedRows, values: Tensor | None) -> Tensor | None:
    return None if values is None else rows.take(values)
