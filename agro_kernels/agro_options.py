"""The inputs and the options of AGRO's ops, records of them: made once, passed on whole.

The public functions make an `AgroOptions` of their keywords; the ops' schemas and the backends take
it from there. The checks of the public arguments are here too. One sentence each: argument,
expected, got, next step.

Letters: N tokens, B sequences, one row each.
"""

import math
from typing import NamedTuple, Required, TypedDict, Unpack

import torch
from torch import Tensor

from agro_kernels.arguments import as_number, check_device, check_positive, check_tensor
from agro_kernels.head import HeadOptions, as_tensor


class AgroKeywords(TypedDict, total=False):
    """The keywords that every AGRO function takes; `agro_coefficients` says what they mean."""

    beta: Required[float]
    lr_weight: float
    lr_cap: bool
    on_policy: Tensor | None
    lr_baseline: float | str
    importance_weights: Tensor | None
    num_groups: int | Tensor | None
    scale: float
    sampling_logprobs: Tensor | None
    taper: float | Tensor


class LinearAgroKeywords(AgroKeywords, HeadOptions, total=False):
    """The keywords of the functions that compute the log-probabilities, too."""


class AgroOptions(NamedTuple):
    """The same as the ops take them. The fields are in the order of the schemas.

    A tuple, because the dispatcher takes nothing but flat arguments: `op(..., *options)` calls an
    op, and `ops.dispatch.with_record` makes the record again on the other side.
    """

    beta: float
    lr_weight: float
    lr_cap: bool
    on_policy: Tensor | None
    """(B,) bool; None: all rows are."""
    lr_baseline: float | None
    """None: by the number of rows in the group."""
    importance_weights: Tensor | None
    """(B,) any float dtype; None: all are 1."""
    num_groups: Tensor | None
    """0-d float64; None: the number of valid groups."""
    scale: float
    sampling_logprobs: Tensor | None
    """(B,) any float dtype, nats; not finite: unknown. None: all are."""
    taper: float
    """0.0 where row_taper is given."""
    row_taper: Tensor | None
    """(B,) any float dtype: an exponent for each row, used instead of `taper`."""
    numbers: Tensor | None = None
    """(5,) float64 on the CPU: beta, lr_weight, lr_baseline (where there is one), scale and taper,
    used instead of those above. In a compiled graph only, which takes all values so."""

    @staticmethod
    def of(rewards: Tensor, **keywords: Unpack[AgroKeywords]) -> "AgroOptions":
        """The record of a public function's keywords, after their checks against rewards (B,).

        Never waits for the device of rewards.
        """
        beta, scale = keywords["beta"], keywords.get("scale", 1.0)
        lr_weight, lr_baseline = keywords.get("lr_weight", 0.0), keywords.get("lr_baseline", "auto")
        on_policy, taper = keywords.get("on_policy"), keywords.get("taper", 0.0)
        importance_weights = keywords.get("importance_weights")
        sampling_logprobs = keywords.get("sampling_logprobs")
        num_groups = keywords.get("num_groups")
        why = "without regularisation the loss has no optimum in the policy"
        beta = checked_positive("beta", beta, why)
        scale = checked_positive("scale", scale, "a loss is minimised, whatever its size")
        lr_weight = checked_lr_weight(lr_weight)
        baseline = checked_lr_baseline(lr_baseline)
        lr_cap = checked_flag("lr_cap", keywords.get("lr_cap", False))
        if on_policy is not None:
            check_rows("on_policy", on_policy, rewards)
            if on_policy.dtype != torch.bool:
                raise TypeError(f"on_policy: expected bool, got {on_policy.dtype}; call .bool()")
        if importance_weights is not None:
            check_float_rows("importance_weights", importance_weights, rewards)
            if lr_weight > 0:
                raise ValueError(
                    "importance_weights: expected None with lr_weight > 0, got both (lr_weight = "
                    f"{lr_weight}); reweighted samples are off-policy, set lr_weight to 0"
                )
        if sampling_logprobs is not None:
            check_float_rows("sampling_logprobs", sampling_logprobs, rewards)
        exponent = checked_taper(taper, rewards)
        numbers = None
        if torch.compiler.is_compiling():
            values = (beta, lr_weight, 0.0 if baseline is None else baseline, scale, exponent)
            numbers = torch.stack([as_tensor(value) for value in values])
            beta, lr_weight, scale, exponent = 1.0, 0.0, 1.0, 0.0
            baseline = None if baseline is None else 0.0
        return AgroOptions(
            beta=beta,
            lr_weight=lr_weight,
            lr_cap=lr_cap,
            on_policy=on_policy,
            lr_baseline=baseline,
            importance_weights=None if importance_weights is None else importance_weights.detach(),
            num_groups=count_tensor(num_groups, rewards.device),
            scale=scale,
            sampling_logprobs=None if sampling_logprobs is None else sampling_logprobs.detach(),
            taper=exponent,
            row_taper=taper.detach() if isinstance(taper, Tensor) else None,
            numbers=numbers,
        )

    def with_numbers(self) -> "AgroOptions":
        """The same with `numbers` where they belong."""
        if self.numbers is None:
            return self
        beta, lr_weight, lr_baseline, scale, taper = self.numbers.tolist()
        return self._replace(
            beta=beta,
            lr_weight=lr_weight,
            lr_baseline=None if self.lr_baseline is None else lr_baseline,
            scale=scale,
            taper=taper,
            numbers=None,
        )

    @property
    def tapers(self) -> bool:
        """Whether any coefficient may shrink: exponents of 0 shrink none."""
        return self.sampling_logprobs is not None and (self.row_taper is not None or self.taper > 0)


class AgroTokens(NamedTuple):
    """What the loss is of, the tokens of all sequences end to end. In the order of the schema."""

    logprobs: Tensor
    """(N,) any float dtype."""
    ref_logprobs: Tensor
    """(N,)"""
    rewards: Tensor
    """(B,) any float dtype."""
    groups: Tensor
    """(B,) integers."""
    cu_seqlens: Tensor
    """(B + 1,) int32 or int64: sequence b is tokens cu_seqlens[b]:cu_seqlens[b + 1]."""


class AgroRows(NamedTuple):
    """What the coefficients are made of, one row a sequence."""

    rewards: Tensor
    """(B,) any float dtype."""
    groups: Tensor
    """(B,) integers."""
    log_ratios: Tensor
    """(B,) float64: log(pi / pi_ref)."""
    sampler_log_ratios: Tensor | None
    """(B,) float64: log(pi / mu). None: of no row is it known."""

    @staticmethod
    def of_sums(
        rewards: Tensor,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        groups: Tensor,
        sampling_logprobs: Tensor | None,
    ) -> "AgroRows":
        """Of sums over each sequence's tokens, (B,) of any float dtype."""
        logprobs = logprobs.double()
        sampled = None if sampling_logprobs is None else logprobs - sampling_logprobs.double()
        return AgroRows(rewards, groups, logprobs - ref_logprobs.double(), sampled)


AGRO_SCHEMA = (
    "float beta, float lr_weight, bool lr_cap, Tensor? on_policy, float? lr_baseline, "
    "Tensor? importance_weights, Tensor? num_groups, float scale, Tensor? sampling_logprobs, "
    "float taper, Tensor? row_taper, Tensor? numbers=None"
)


def count_tensor(count: int | Tensor | None, device: torch.device) -> Tensor | None:
    """A 0-d float64 tensor on `device`; a fill or a copy, never a wait for that device."""
    if count is None:
        return None
    if isinstance(count, Tensor):
        if count.ndim != 0:
            raise ValueError(
                f"num_groups: expected an int or a 0-d tensor, got shape {tuple(count.shape)}; "
                "sum it"
            )
        on_host = count.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and not math.isfinite(count):
            raise ValueError(
                f"num_groups: expected a finite number, got {float(count)}; pass the global count"
            )
        return count.detach().to(device, torch.float64, non_blocking=device.type != "cpu")
    number = as_number(count)
    if number is None:
        raise TypeError(
            f"num_groups: expected an int, a 0-d tensor or None, got {type(count).__name__}; pass "
            "the global count"
        )
    if not -math.inf < number < math.inf:
        raise ValueError(
            f"num_groups: expected a finite number, got {number}; pass the global count"
        )
    return torch.full((), number, dtype=torch.float64, device=device)


# --- Tensors --------------------------------------------------------------------------------------


def check_sequences(rewards: Tensor, groups: Tensor, **per_sequence: Tensor) -> None:
    """Raise unless all are (B,) on one device, groups of integers and the others of floats."""
    check_tensor("rewards", rewards)
    if rewards.ndim != 1:
        raise ValueError(
            f"rewards: expected shape (B,), got {tuple(rewards.shape)}; flatten (prompts, "
            "completions) and name the prompt of each row in groups"
        )
    for name, tensor in {"rewards": rewards, "groups": groups, **per_sequence}.items():
        if name == "groups":
            check_rows(name, tensor, rewards)
        else:
            check_float_rows(name, tensor, rewards)
    if groups.dtype == torch.bool or groups.is_floating_point() or groups.is_complex():
        raise TypeError(f"groups: expected an integer dtype, got {groups.dtype}; call .long()")


def check_tokens(cu_seqlens: Tensor, rewards: Tensor, **per_token: Tensor) -> None:
    """Raise unless cu_seqlens is (B + 1,) int32 or int64 and all of per_token are (N,)."""
    _check_shape("cu_seqlens", cu_seqlens, "(B + 1,)", (rewards.shape[0] + 1,), rewards)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}; pack_sequences makes it"
        )
    for name, tensor in per_token.items():
        check_tensor(name, tensor)
    first, shape = next((name, tuple(tensor.shape)) for name, tensor in per_token.items())
    for name, tensor in per_token.items():
        if len(shape) != 1:
            raise ValueError(
                f"{name}: expected packed tokens (N,), got shape {shape}; use pack_sequences"
            )
        _check_shape(name, tensor, f"(N,) of {first}", shape, rewards)
        if name != "targets":
            check_float(name, tensor)


def _check_shape(
    name: str, tensor: Tensor, letters: str, expected: tuple[int, ...], rewards: Tensor
) -> None:
    check_tensor(name, tensor)
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name}: expected shape {letters} = {expected}, got {tuple(tensor.shape)}; rewards "
            f"has B = {rewards.shape[0]} rows, one a sequence"
        )
    check_device(name, tensor, "rewards", rewards)


def check_rows(name: str, tensor: Tensor, rewards: Tensor) -> None:
    _check_shape(name, tensor, "(B,)", tuple(rewards.shape), rewards)


def check_float_rows(name: str, tensor: Tensor, rewards: Tensor) -> None:
    check_rows(name, tensor, rewards)
    check_float(name, tensor)


def check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a float dtype, got {tensor.dtype}; call .float()")


# --- Numbers --------------------------------------------------------------------------------------


def _number(name: str, value: object, expected: str, next_step: str) -> float:
    """A number, which a 0-d tensor is, too."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return float(value.detach())
    number = as_number(value)
    if number is None:
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}; {next_step}")
    return number


def checked_positive(name: str, value: float, why: str) -> float:
    number = _number(name, value, "a finite number > 0", why)
    check_positive(name, number, value, "so that fp32 can hold the coefficients", why)
    return number


def checked_lr_weight(lr_weight: float) -> float:
    number = _number("lr_weight", lr_weight, "a finite number >= 0", "0 leaves the term out")
    if not (number >= 0 and number < math.inf):
        raise ValueError(
            f"lr_weight: expected a finite number >= 0, got {lr_weight}; 0 leaves the term out"
        )
    return number


def checked_lr_baseline(lr_baseline: float | str) -> float | None:
    """None is "auto"."""
    if isinstance(lr_baseline, str):
        if lr_baseline == "auto":
            return None
        number = math.nan
    else:
        number = _number("lr_baseline", lr_baseline, '"auto" or a number in [0, 1]', 'use "auto"')
    if not 0 <= number <= 1:
        raise ValueError(
            f'lr_baseline: expected "auto" or a number in [0, 1], got {lr_baseline!r}; use "auto"'
        )
    return number


def checked_flag(name: str, value: bool) -> bool:
    """NumPy's are flags, too; so are 0, 1 and None."""
    if value is None or value is True or value is False:
        return bool(value)
    if isinstance(value, Tensor) or value not in (0, 1):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}; pass True or False")
    return bool(value)


def checked_taper(taper: float | Tensor, rewards: Tensor) -> float:
    """The number; 0.0 where it is one for each row."""
    if isinstance(taper, Tensor):
        check_float_rows("taper", taper, rewards)
        return 0.0
    next_step = "0 tapers nothing, 1 by the ratio itself"
    number = _number("taper", taper, "a number >= 0", next_step)
    if not number >= 0:
        raise ValueError(f"taper: expected a number >= 0, got {taper}; {next_step}")
    return number
