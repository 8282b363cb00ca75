"""The checks of what the head ops are given: argument, expected, got, next step, in one sentence.

Letters: N tokens, D hidden size, V vocabulary.
"""

import math
import numbers

import torch
from torch import Tensor

from agro_kernels.reference import ROUNDED_LOGITS

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# The ignore_index of a head without `compact`: what says so to the backends. Fits int32.
ROWS_STAY = -(2**31)
AUTO = -1  # keep_logits_bytes="auto", as the ops take it
# What a temperature or a softcap may be: logits of any model divided by it stay numbers. Tensors of
# temperatures are read in fp32.
SMALLEST, LARGEST = 1e-30, 1e30


def results_dtype(inputs: Tensor) -> torch.dtype:
    """Of sums and results: fp32, and float64 of float64 inputs."""
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


# --- Type, shape, dtype, device -------------------------------------------------------------------


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


def check_floating(name: str, value: Tensor) -> None:
    if not value.dtype.is_floating_point:
        raise TypeError(
            f"{name}: expected a floating-point tensor, got {value.dtype}; cast with .float()"
        )


def check_shards(shards: object) -> None:
    if not hasattr(shards, "check_shard"):
        raise TypeError(
            f"shards: expected agro_kernels.parallel.VocabularyShards or None, got "
            f"{type(shards).__name__}; make it with VocabularyShards.of(weight, group)"
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
