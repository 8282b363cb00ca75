"""The inputs of a head op, one record of them: made and checked once, passed on whole.

The public functions make a `Head` of what they are given; the ops' schemas, the backends and the
vocabulary-parallel form take it from there. The checks of the public arguments are here too. One
sentence each: argument, expected, got, next step.

Letters: N tokens, D hidden size, V vocabulary.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from agro_kernels.reference import ROUNDED_LOGITS

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
IGNORE_INDEX = -100
# The ignore_index of a head without `compact`: what says so to the backends. Fits int32.
ROWS_STAY = -(2**31)
AUTO = -1  # keep_logits_bytes="auto", as the ops take it
# What a temperature or a softcap may be: logits of any model divided by it stay numbers. Tensors of
# temperatures are read in fp32.
SMALLEST, LARGEST = 1e-30, 1e30


class Shards(Protocol):
    """What `shards` is to this file: `agro_kernels.parallel.VocabularyShards`, which imports it."""

    def check_call(self, **tensors: Tensor | None) -> None: ...
    def check_shard(self, weight: Tensor, targets: Tensor, ignore_index: int) -> None: ...
    def kept_bits(self, ids: Tensor) -> Tensor: ...
    def results(
        self,
        head: "Head",
        asked: "Asked",
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def results_dtype(inputs: Tensor) -> torch.dtype:
    """Of sums and results: fp32, and float64 of float64 inputs."""
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


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


def check_shards(shards: object) -> None:
    if not hasattr(shards, "check_shard"):
        raise TypeError(
            f"shards: expected agro_kernels.parallel.VocabularyShards or None, got "
            f"{type(shards).__name__}; make it with VocabularyShards.of(weight, group)"
        )


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


# --- Arguments: type, shape, dtype, device --------------------------------------------------------


def check_names(function: str, options: Mapping[str, object], known: Any = HeadOptions) -> None:
    """Python's own errors for a function that has the keywords of the TypedDict `known`."""
    for name in options:
        if name not in known.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    for name in known.__required_keys__:
        if name not in options:
            raise TypeError(f"{function}() missing 1 required keyword-only argument: {name!r}")


def as_number(value: object) -> float | None:
    """The float that a Python or NumPy number is; None of what is no number, or a bool."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an int of more digits than a float can have
        return math.inf


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} as {like_name}, got {value.device}; "
            f"move it with .to({like_name}.device)"
        )


def check_matrices(hidden: Tensor, weight: Tensor) -> None:
    """hidden (..., D) and weight (V, D)."""
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    if hidden.dtype not in FLOATING:
        raise TypeError(
            f"hidden: expected bfloat16, float16, float32 or float64, got {hidden.dtype}; "
            "pass the hidden states of the model's last layer, not token ids"
        )
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight: expected shape (V, D) with D > 0 and V > 0, got {tuple(weight.shape)}; "
            "pass lm_head.weight"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden: expected shape (..., {weight.shape[1]}) to match weight "
            f"{tuple(weight.shape)}, got {tuple(hidden.shape)}; pass hidden states, not logits"
        )
    check_like_hidden("weight", weight, hidden)


def check_bias(bias: Tensor | None, hidden: Tensor, weight: Tensor) -> None:
    if bias is None:
        return
    check_tensor("bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: expected shape (V,) = ({weight.shape[0]},) to match weight "
            f"{tuple(weight.shape)}, got {tuple(bias.shape)}; pass lm_head.bias"
        )
    check_like_hidden("bias", bias, hidden)


def check_like_hidden(name: str, value: Tensor, hidden: Tensor) -> None:
    """The dtype and the device."""
    if value.dtype != hidden.dtype:
        raise TypeError(
            f"{name}: expected {hidden.dtype} as hidden, got {value.dtype}; "
            "cast one of them or run under torch.autocast"
        )
    check_device(name, value, "hidden", hidden)


def checked_softcap(softcap: float | None) -> float:
    """The number; 0.0 of None."""
    if softcap is None:
        return 0.0
    return checked_divisor(
        "softcap",
        softcap,
        "a float or None",
        if_no_number="pass the model's final_logit_softcapping",
        if_out_of_range="pass None for no cap",
    )


def checked_divisor(
    name: str, value: object, kinds: str, *, if_no_number: str, if_out_of_range: str
) -> float:
    """A positive number of a size that the logits can be divided by."""
    number = as_number(value)
    if number is None:
        raise TypeError(f"{name}: expected {kinds}, got {type(value).__name__}; {if_no_number}")
    check_positive(name, number, number, "which fp32 can divide by", if_out_of_range)
    return number


def check_positive(
    name: str, number: float, given: object, why_limited: str, next_step: str
) -> None:
    """From SMALLEST to LARGEST; given: what the number was made of."""
    if not 0.0 < number < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {given}; {next_step}")
    if not SMALLEST <= number <= LARGEST:
        raise ValueError(
            f"{name}: expected a number from {SMALLEST} to {LARGEST}, {why_limited}, got {given}; "
            f"{next_step}"
        )


def check_logits(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, ignore_index: int
) -> tuple[float | Tensor, int]:
    """The temperature and ignore_index, as numbers."""
    check_tensor("logits", logits)
    if logits.dtype not in FLOATING:
        raise TypeError(
            f"logits: expected bfloat16, float16, float32 or float64, got {logits.dtype}; "
            "pass the output of the model's lm_head"
        )
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits: expected shape (..., V) with V > 0, got {tuple(logits.shape)}; "
            "pass the output of the model's lm_head"
        )
    check_targets(targets, "logits", logits)
    return checked_temperature(temperature, targets), checked_ignore_index(ignore_index)


def check_targets(targets: Tensor, like_name: str, like: Tensor) -> None:
    """targets (...) against hidden (..., D) or logits (..., V)."""
    check_tensor("targets", targets)
    check_target_dtype(targets)
    if targets.shape != like.shape[:-1]:
        raise ValueError(
            f"targets: expected shape {tuple(like.shape[:-1])} to match {like_name} "
            f"{tuple(like.shape)}, got {tuple(targets.shape)}; "
            f"shift so that {like_name}[i] predicts targets[i] before calling"
        )
    check_device("targets", targets, like_name, like)


def has_many_targets(hidden: Tensor, targets: Tensor) -> bool:
    """Whether targets are (..., K) beside hidden (..., D), and not (...), after their checks."""
    if not isinstance(hidden, Tensor) or not isinstance(targets, Tensor):
        return False
    if hidden.dim() == 0 or targets.dim() != hidden.dim():
        return False
    check_target_dtype(targets)
    if targets.shape[:-1] != hidden.shape[:-1]:
        of_tokens = tuple(hidden.shape[:-1])
        raise ValueError(
            f"targets: expected shape {of_tokens}, or (..., K) with (...) = {of_tokens}, to match "
            f"hidden {tuple(hidden.shape)}, got {tuple(targets.shape)}; shift so that hidden[i] "
            "predicts targets[i] before calling"
        )
    if targets.shape[-1] == 0:
        raise ValueError(
            f"targets: expected at least one id a token, got shape {tuple(targets.shape)}; pass "
            "ignore_index where none counts"
        )
    return True


def check_target_dtype(targets: Tensor) -> None:
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"targets: expected int32 or int64 token ids, got {targets.dtype}; cast with .long()"
        )


def checked_temperature(temperature: float | Tensor, targets: Tensor) -> float | Tensor:
    """The tensor, or the number."""
    if isinstance(temperature, Tensor):
        if temperature.shape != targets.shape:
            raise ValueError(
                f"temperature: expected a float or a tensor of the shape of targets "
                f"{tuple(targets.shape)}, got {tuple(temperature.shape)}; use expand_as(targets)"
            )
        check_floating("temperature", temperature)
        if temperature.requires_grad:
            raise ValueError(
                "temperature: expected a tensor without gradient, got one that requires it; "
                "there is no derivative for it, so pass temperature.detach()"
            )
        check_device("temperature", temperature, "targets", targets)
        return temperature
    return checked_divisor(
        "temperature",
        temperature,
        "a float or a tensor",
        if_no_number="pass the temperature of the sampler",
        if_out_of_range="for greedy sampling score the tokens with 1.0",
    )


def checked_ignore_index(ignore_index: int) -> int:
    """The number."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, numbers.Integral):
        raise TypeError(
            f"ignore_index: expected an int, got {type(ignore_index).__name__}; "
            "-100 is the usual one"
        )
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(
            f"ignore_index: expected an int of 64 bits, got {ignore_index}; -100 is the usual one"
        )
    return int(ignore_index)


def check_round_logits(round_logits: str | None) -> None:
    if round_logits is not None and round_logits not in list(ROUNDED_LOGITS):
        raise ValueError(
            f'round_logits: expected "bf16", "fp16" or None, got {round_logits!r}; pass the dtype '
            "that the sampling engine keeps its logits in"
        )


def check_kept_ids(kept_ids: Tensor | None, targets: Tensor) -> None:
    """(..., K) beside the targets (...)."""
    if kept_ids is None:
        return
    check_tensor("kept_ids", kept_ids)
    if kept_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"kept_ids: expected int32 or int64 token ids, got {kept_ids.dtype}; pass ids, padded "
            "with -1, not a mask"
        )
    if kept_ids.dim() != targets.dim() + 1 or kept_ids.shape[:-1] != targets.shape:
        raise ValueError(
            f"kept_ids: expected shape (..., K) with (...) = {tuple(targets.shape)} as targets, "
            f"got {tuple(kept_ids.shape)}; pass one row of ids a token, padded with -1"
        )
    if kept_ids.shape[-1] == 0:
        raise ValueError(
            f"kept_ids: expected at least one id a row, got shape {tuple(kept_ids.shape)}; pass "
            "None where everything is kept"
        )
    check_device("kept_ids", kept_ids, "targets", targets)


def check_weight_grad(weight_grad: Tensor | None, weight: Tensor) -> None:
    """The buffer that the weight's gradient is added to."""
    if weight_grad is None:
        return
    check_tensor("weight_grad", weight_grad)
    if weight_grad.shape != weight.shape:
        raise ValueError(
            f"weight_grad: expected the shape of weight {tuple(weight.shape)}, got "
            f"{tuple(weight_grad.shape)}; pass weight.main_grad or torch.zeros(weight.shape)"
        )
    expected = results_dtype(weight)
    if weight_grad.dtype != expected:
        raise TypeError(
            f"weight_grad: expected {expected}, got {weight_grad.dtype}; sums over micro-batches "
            "are kept in it"
        )
    if weight_grad.requires_grad:
        raise ValueError(
            "weight_grad: expected a tensor without gradient, got one that requires it; pass a "
            "buffer that is not a parameter"
        )
    if not weight_grad.is_contiguous():
        raise ValueError(
            f"weight_grad: expected a contiguous tensor, got strides {weight_grad.stride()}; "
            "allocate it with torch.zeros(weight.shape)"
        )
    check_device("weight_grad", weight_grad, "weight", weight)


def checked_keep_logits_bytes(keep_logits_bytes: int | str) -> int:
    """The number; AUTO of "auto"."""
    if isinstance(keep_logits_bytes, str) and keep_logits_bytes == "auto":
        return AUTO
    expected, next_step = 'expected an int >= 0 or "auto"', "0 keeps none"
    if isinstance(keep_logits_bytes, bool) or not isinstance(keep_logits_bytes, numbers.Integral):
        raise TypeError(f"keep_logits_bytes: {expected}, got {keep_logits_bytes!r}; {next_step}")
    if not 0 <= keep_logits_bytes < 2**63:
        raise ValueError(f"keep_logits_bytes: {expected}, got {keep_logits_bytes}; {next_step}")
    return int(keep_logits_bytes)


def checked_compact(compact: bool) -> bool:
    if not isinstance(compact, bool):
        raise TypeError(
            f"compact: expected True or False, got {compact!r}; False keeps every row, so that a "
            "GPU is not waited for"
        )
    return compact


def check_constant(name: str, value: Tensor, targets: Tensor) -> None:
    """A floating (...) tensor beside the targets that no gradient flows into."""
    check_tensor(name, value)
    if value.shape != targets.shape:
        raise ValueError(
            f"{name}: expected the shape of targets {tuple(targets.shape)}, "
            f"got {tuple(value.shape)}; pass one number a token"
        )
    check_floating(name, value)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a constant, got a tensor that requires a gradient; "
            f"pass {name}.detach(), or use linear_logprobs for a loss that is differentiable in it"
        )
    check_device(name, value, "targets", targets)


def check_floating(name: str, value: Tensor) -> None:
    if not value.dtype.is_floating_point:
        raise TypeError(
            f"{name}: expected a floating-point tensor, got {value.dtype}; cast with .float()"
        )


# --- Values: looked at inside the ops, on the CPU only; elsewhere a look would stall the device ---


def check_target_values(targets: Tensor, v: int, ignore_index: int) -> None:
    if targets.device.type != "cpu":
        return
    outside = ((targets < 0) | (targets >= v)) & (targets != ignore_index)
    if outside.any():
        position = int(outside.reshape(-1).nonzero()[0])
        index = "" if ignore_index == ROWS_STAY else f" = {ignore_index}"
        raise ValueError(
            f"targets: expected token ids in [0, {v}) or ignore_index{index}, got "
            f"{int(targets.reshape(-1)[position])} at position {position}; set tokens that do not "
            "count to ignore_index"
        )


def check_token_temperature_values(
    token_temperature: Tensor | None, targets: Tensor, ignore_index: int
) -> None:
    if token_temperature is None or token_temperature.device.type != "cpu":
        return
    usable = (token_temperature >= SMALLEST) & (token_temperature <= LARGEST)
    outside = ~usable & (targets != ignore_index)
    if outside.any():
        position = int(outside.reshape(-1).nonzero()[0])
        first = float(token_temperature.reshape(-1)[position])
        wanted = f"numbers from {SMALLEST} to {LARGEST}, which fp32 can divide by"
        if not 0.0 < first < math.inf:
            wanted = "finite numbers > 0"
        raise ValueError(
            f"temperature: expected {wanted}, got {first} at position {position}; "
            "for greedy sampling score the tokens with 1.0"
        )
