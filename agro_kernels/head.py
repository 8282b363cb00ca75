"""The inputs of a head op, records of them: made and checked once, passed on whole.

The public functions make a `Head` of what they are given; the ops' schemas, the backends and the
vocabulary-parallel form take it from there.

Letters: N tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from agro_kernels.arguments import (
    ROWS_STAY,
    check_bias,
    check_kept_ids,
    check_matrices,
    check_round_logits,
    check_shards,
    check_target_values,
    check_targets,
    check_token_temperature_values,
    check_weight_grad,
    checked_compact,
    checked_ignore_index,
    checked_keep_logits_bytes,
    checked_softcap,
    checked_temperature,
)
from agro_kernels.reference import ROUNDED_LOGITS

IGNORE_INDEX = -100


class Shards(Protocol):
    """What `shards` is to this file: `agro_kernels.parallel.VocabularyShards`, which imports it."""

    def check_call(self, **tensors: Tensor | None) -> None: ...
    def check_shard(self, weight: Tensor, targets: Tensor, ignore_index: int) -> None: ...
    def kept_bits(self, ids: Tensor) -> Tensor: ...
    def results(self, head: "Head", asked: "Asked") -> tuple[Tensor, Tensor, Tensor]: ...


class LogitOptions(TypedDict, total=False):
    """The keywords that say what the logits are; `linear_logprobs` says what they mean."""

    bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    round_logits: str | None
    kept_ids: Tensor | None


class HeadOptions(LogitOptions, total=False):
    """The keywords that every head op with targets takes."""

    ignore_index: int
    weight_grad: Tensor | None
    keep_logits_bytes: int | str
    compact: bool
    shards: Shards | None


class Head(NamedTuple):
    """The inputs of a head op, flattened to N tokens. The fields are in the order of the schemas.

    A tuple, because the dispatcher takes nothing but flat arguments: `op(*head, ...)` calls an op,
    and `ops.dispatch.with_head` makes the record again on the other side.
    """

    hidden: Tensor
    """(N, D) bf16, fp16, fp32 or float64, any strides."""
    weight: Tensor
    """(V, D), dtype and device of hidden, any strides."""
    targets: Tensor
    """(N,) int32 or int64: ids in [0, V), or ignore_index."""
    bias: Tensor | None
    """(V,), dtype of hidden."""
    temperature: float
    """1.0 where token_temperature is given."""
    token_temperature: Tensor | None
    """(N,) fp32: a temperature for each token, used instead of `temperature`. In a compiled graph
    () float64 on the CPU: a number, which the graph then is not made for; see `one_number`."""
    softcap: float
    """0.0 is none."""
    ignore_index: int
    round_logits: torch.dtype | None
    """The logits are rounded to this dtype before softcap and temperature; None: never."""
    kept: Tensor | None
    """(N, ceil(V / 32)) int32, one bit a vocabulary entry: what the sampler kept. None: all."""

    @staticmethod
    def of(
        hidden: Tensor, weight: Tensor, targets: Tensor, **options: Unpack[HeadOptions]
    ) -> "Head":
        """The record of public arguments (..., D), (V, D), (...) and options, after their checks.

        Casts as F.linear does under torch.autocast. weight_grad, keep_logits_bytes and shards are
        checked and not kept: not every op has them. With shards, kept is of this rank's rows.
        """
        bias, softcap = options.get("bias"), options.get("softcap")
        shards, weight_grad = options.get("shards"), options.get("weight_grad")
        temperature = options.get("temperature", 1.0)
        ignore_index = options.get("ignore_index", IGNORE_INDEX)
        round_logits, kept_ids = options.get("round_logits"), options.get("kept_ids")
        if shards is not None:
            check_shards(shards)
            shards.check_call(hidden=hidden, weight=weight, bias=bias, weight_grad=weight_grad)
        hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
        check_matrices(hidden, weight)
        check_targets(targets, "hidden", hidden)
        check_bias(bias, hidden, weight)
        temperature = checked_temperature(temperature, targets)
        softcap = checked_softcap(softcap)
        ignore_index = checked_ignore_index(ignore_index)
        check_kept_ids(kept_ids, targets)
        check_round_logits(round_logits)
        compact = checked_compact(options.get("compact", True))
        check_weight_grad(weight_grad, weight)
        checked_keep_logits_bytes(options.get("keep_logits_bytes", 0))
        if shards is not None:
            shards.check_shard(weight, targets, ignore_index)
        kept = None
        if kept_ids is not None:
            ids = kept_ids.reshape(-1, kept_ids.shape[-1])
            kept = pack_kept_ids(ids, weight.shape[0]) if shards is None else shards.kept_bits(ids)
        flat_targets = targets.reshape(-1)
        if not compact:
            flat_targets, ignore_index = rows_stay(flat_targets, ignore_index), ROWS_STAY
        return Head(
            hidden.reshape(targets.numel(), hidden.shape[-1]),
            weight,
            flat_targets,
            bias,
            *split_temperature(temperature),
            softcap,
            ignore_index,
            None if round_logits is None else ROUNDED_LOGITS[round_logits],
            kept,
        )

    def with_numbers(self) -> "Head":
        """The same with the temperature as a number where it is one."""
        if self.token_temperature is None or self.token_temperature.dim() > 0:
            return self
        temperature, none = one_number(self.temperature, self.token_temperature)
        return self._replace(temperature=temperature, token_temperature=none)

    def counted(self) -> Tensor:
        """(N,) bool: which targets are not ignore_index."""
        return self.targets != self.ignore_index

    @property
    def compact(self) -> bool:
        """Whether rows that do not count may be left out of the products."""
        return self.ignore_index != ROWS_STAY

    def requires_grad(self) -> bool:
        """Whether a backward pass may ask for any gradient."""
        leaves = (self.hidden, self.weight, self.bias)
        return any(tensor is not None and tensor.requires_grad for tensor in leaves)

    def part(self, rows: slice) -> "Head":
        """Some of the N tokens, without a copy."""
        temperatures = self.token_temperature
        return self._replace(
            hidden=self.hidden[rows],
            targets=self.targets[rows],
            token_temperature=None if temperatures is None else temperatures[rows],
            kept=None if self.kept is None else self.kept[rows],
        )

    def check_values(self) -> None:
        """The checks of values inside tensors, on the CPU only, as the ops make them."""
        check_target_values(self.targets, self.weight.shape[0], self.ignore_index)
        check_token_temperature_values(self.token_temperature, self.targets, self.ignore_index)


HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float temperature, "
    "Tensor? token_temperature, float softcap, int ignore_index, ScalarType? round_logits, "
    "Tensor? kept"
)


def rows_stay(targets: Tensor, ignore_index: int) -> Tensor:
    """Targets whose ignored ones are ROWS_STAY."""
    return targets.where(targets != ignore_index, ROWS_STAY)


class Asked(NamedTuple):
    """What is asked of a forward pass, beside the log-probabilities of a head."""

    with_entropy: bool = False
    """Of every token, too; otherwise it is (0,)."""
    lse: Tensor | None = None
    """(N,) from an earlier pass: then the logprobs cost no matrix product; entropy is (0,)."""
    weight_grad: Tensor | None = None
    """(V, D): the buffer that the backward pass adds the weight's gradient to."""
    keep_logits_bytes: int = 0
    """Memory for logits that the backward pass then need not make again; AUTO."""
    ids: Tensor | None = None
    """(N, K), without lse: many targets a token, in place of the head's; the logprobs (N, K)."""


class Upstream(NamedTuple):
    """What a backward pass is given for each token: (N,) each, fp32 (float64 of float64)."""

    dlogprobs: Tensor | None
    """The gradients of the results: None where there is none."""
    dlse: Tensor | None
    dentropy: Tensor | None
    lse: Tensor
    """The forward pass's."""
    entropy: Tensor | None
    """The forward pass's, for dentropy; None without it."""
    dsum: Tensor | None = None
    """The gradient of the sum of all V logits, after softcap and temperature: each one's share."""

    def gradients(self) -> list[Tensor]:
        """Those that there are."""
        given = (self.dlogprobs, self.dlse, self.dentropy, self.dsum)
        return [gradient for gradient in given if gradient is not None]

    def times(self, scale: Tensor) -> "Upstream":
        """With scaled gradients, of the same results."""
        dlogprobs, dlse, dentropy, dsum = (
            None if gradient is None else gradient * scale
            for gradient in (self.dlogprobs, self.dlse, self.dentropy, self.dsum)
        )
        return Upstream(dlogprobs, dlse, dentropy, self.lse, self.entropy, dsum)

    def each(self, function: Callable[[Tensor], Tensor]) -> "Upstream":
        """With a function of all tensors."""
        dlogprobs, dlse, dentropy, lse, entropy, dsum = (
            None if value is None else function(value) for value in self
        )
        assert lse is not None
        return Upstream(dlogprobs, dlse, dentropy, lse, entropy, dsum)


def cast_for_autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What F.linear does under torch.autocast: all to its dtype, except float64."""
    # The meta device has no autocast, nor a dtype for it: F.linear leaves its tensors alone, too.
    if not isinstance(hidden, Tensor) or hidden.is_meta:
        return hidden, weight, bias
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)

    def cast(tensor: Tensor) -> Tensor:
        castable = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return tensor.to(dtype) if castable and tensor.dtype != torch.float64 else tensor

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


def split_temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """The ops take a number and, apart from it, one temperature a token (N,) fp32.

    Under torch.compile a number becomes a tensor (), which one graph takes for all values: a number
    among an op's arguments would be a constant of the graph, compiled again for every other one.
    """
    if isinstance(temperature, Tensor):
        return 1.0, temperature.reshape(-1).float()
    if torch.compiler.is_compiling() and temperature != 1.0:
        return 1.0, as_tensor(temperature)
    return temperature, None


def as_tensor(number: float) -> Tensor:
    """() float64 on the CPU. A product, which torch.compile knows to be one of tensors."""
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def one_number(temperature: float, token_temperature: Tensor | None) -> tuple[float, Tensor | None]:
    """What `split_temperature` makes, with a number that was made a tensor as a number again."""
    if token_temperature is None or token_temperature.dim() > 0:
        return temperature, token_temperature
    return float(token_temperature), None


def pack_kept_ids(kept_ids: Tensor, vocabulary: int) -> Tensor:
    """(N, K) ids -> (N, ceil(V / 32)) bits, as the ops take them."""
    bits: Tensor = torch.ops.agro.pack_kept_ids(kept_ids, vocabulary)
    return bits


def check_names(function: str, options: Mapping[str, object], known: Any = HeadOptions) -> None:
    """Python's own errors for a function that has the keywords of the TypedDict `known`."""
    for name in options:
        if name not in known.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    for name in known.__required_keys__:
        if name not in options:
            raise TypeError(f"{function}() missing 1 required keyword-only argument: {name!r}")
