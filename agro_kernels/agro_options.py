"""Checks of the public arguments of the AGRO ops, by the rules of `checks.py`."""

import math

import torch
from torch import Tensor

from agro_kernels.head import check_device, check_tensor


def check_sequences(rewards: Tensor, groups: Tensor, **per_sequence: Tensor) -> None:
    """Raise unless all are (B,) on one device, groups of integers and the others of floats."""
    check_tensor("rewards", rewards)
    if rewards.ndim != 1:
        raise ValueError(
            f"rewards: expected shape (B,), got {tuple(rewards.shape)}; flatten (prompts, "
            "completions) and name the prompt of each row in groups"
        )
    for name, tensor in {"rewards": rewards, "groups": groups, **per_sequence}.items():
        _check_shape(name, tensor, "(B,)", tuple(rewards.shape), rewards)
        if name != "groups" and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a float dtype, got {tensor.dtype}; call .float()")
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
        if name != "targets" and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a float dtype, got {tensor.dtype}; call .float()")


def _check_positive(name: str, value: float, why: str) -> None:
    if not (value > 0 and value < math.inf):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}; {why}")


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


def check_options(
    rewards: Tensor,
    beta: float,
    *,
    lr_weight: float = 0.0,
    on_policy: Tensor | None = None,
    lr_baseline: float | str = "auto",
    importance_weights: Tensor | None = None,
    num_groups: int | Tensor | None = None,
    scale: float = 1.0,
    sampling_logprobs: Tensor | None = None,
    taper: float | Tensor = 0.0,
) -> None:
    """Raise unless the options of `agro_coefficients` make sense together with rewards (B,)."""
    _check_positive("beta", beta, "without regularisation the loss has no optimum in the policy")
    _check_positive("scale", scale, "a loss is minimised, whatever its size")
    if not (lr_weight >= 0 and lr_weight < math.inf):
        raise ValueError(
            f"lr_weight: expected a finite number >= 0, got {lr_weight}; 0 leaves the term out"
        )
    if lr_baseline != "auto" and (isinstance(lr_baseline, str) or not 0 <= lr_baseline <= 1):
        raise ValueError(
            f'lr_baseline: expected "auto" or a number in [0, 1], got {lr_baseline!r}; use "auto"'
        )
    if on_policy is not None:
        _check_shape("on_policy", on_policy, "(B,)", tuple(rewards.shape), rewards)
        if on_policy.dtype != torch.bool:
            raise TypeError(f"on_policy: expected bool, got {on_policy.dtype}; call .bool()")
    if importance_weights is not None:
        _check_shape(
            "importance_weights", importance_weights, "(B,)", tuple(rewards.shape), rewards
        )
        if not importance_weights.is_floating_point():
            raise TypeError(
                f"importance_weights: expected a float dtype, got {importance_weights.dtype}; "
                "call .float()"
            )
        if lr_weight > 0:
            raise ValueError(
                f"importance_weights: expected None with lr_weight > 0, got both (lr_weight = "
                f"{lr_weight}); reweighted samples are off-policy, set lr_weight to 0"
            )
    for name, per_row in {"sampling_logprobs": sampling_logprobs, "taper": taper}.items():
        if isinstance(per_row, Tensor):
            _check_shape(name, per_row, "(B,)", tuple(rewards.shape), rewards)
            if not per_row.is_floating_point():
                raise TypeError(
                    f"{name}: expected a float dtype, got {per_row.dtype}; call .float()"
                )
    if sampling_logprobs is not None:
        check_tensor("sampling_logprobs", sampling_logprobs)
    if not isinstance(taper, Tensor) and not taper >= 0:
        raise ValueError(
            f"taper: expected a number >= 0, got {taper}; 0 tapers nothing, 1 by the ratio itself"
        )
    if isinstance(num_groups, Tensor) and num_groups.ndim != 0:
        raise ValueError(
            f"num_groups: expected an int or a 0-d tensor, got shape {tuple(num_groups.shape)}; "
            "sum it"
        )
