"""The ops of the namespace `agro`: their schemas, shapes, gradients, and who serves which device.

Torch's dispatcher picks the implementation by the device of the tensors: Triton on CUDA and ROCm,
the native kernels of `csrc` on the CPU, and the blocked torch path of `_torch` everywhere else, for
float64, and where Triton or the native part is missing.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from agro_kernels._cpu import linear_logprobs as cpu_linear_logprobs
from agro_kernels._torch import agro_loss as torch_agro_loss
from agro_kernels._torch import kept_ids as torch_kept_ids
from agro_kernels._torch import linear_logprobs as torch_linear_logprobs
from agro_kernels._torch import selective_logprobs as torch_selective_logprobs

library = torch.library.Library("agro", "DEF")

# --- Who serves which device ----------------------------------------------------------------------


@functools.cache
def triton_import_error() -> ImportError | None:
    """None if Triton can be imported, else why not. Asked at the first CUDA call, not on import."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        warnings.warn(
            f"agro_kernels: triton cannot be imported ({error}), so the blocked torch path serves "
            "CUDA tensors: right, in bounded memory, but several times slower; pip install triton",
            stacklevel=2,
        )
        return error
    return None


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernels choose their own precision: autocast would round the fp32 tiles inside them."""

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        device_type = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device_type=device_type, enabled=False):
            return kernel(*args, **kwargs)

    return call


def _triton_if_possible(
    name: str, module: str, fallback: ModuleType, *, float64: bool = False
) -> Callable[..., Any]:
    """The function `name` of agro_kernels._triton.<module>, imported when it is first called.

    float64: whether these kernels take float64 tensors; otherwise `fallback` serves them.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        in_float64 = any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args)
        if (in_float64 and not float64) or triton_import_error() is not None:
            return getattr(fallback, name)(*args, **kwargs)
        kernels = importlib.import_module(f"agro_kernels._triton.{module}")
        return getattr(kernels, name)(*args, **kwargs)

    return call


def _results_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


# --- linear_logprobs ------------------------------------------------------------------------------

library.define(
    "linear_logprobs_fwd(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "float temperature, Tensor? token_temperature, float softcap, int ignore_index, "
    "ScalarType? round_logits, Tensor? kept, bool with_entropy) "
    "-> (Tensor logprobs, Tensor lse, Tensor entropy)"
)
_BACKWARD_ARGUMENTS = (
    "Tensor? dlogprobs, Tensor? dlse, Tensor? dentropy, Tensor hidden, Tensor weight, "
    "Tensor targets, Tensor? bias, float temperature, Tensor? token_temperature, float softcap, "
    "int ignore_index, ScalarType? round_logits, Tensor? kept, Tensor lse, Tensor entropy, "
    "bool[] output_mask"
)
library.define(
    f"linear_logprobs_bwd({_BACKWARD_ARGUMENTS}) -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
# Apart from the op above, so that compiled graphs without weight_grad hold no op that mutates.
library.define(
    f"linear_logprobs_bwd_accumulate({_BACKWARD_ARGUMENTS}, Tensor(a!) weight_grad) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
for _name, _function in (
    ("linear_logprobs_fwd", "linear_logprobs_fwd"),
    ("linear_logprobs_bwd", "linear_logprobs_bwd"),
    ("linear_logprobs_bwd_accumulate", "linear_logprobs_bwd"),
):
    _everywhere = getattr(torch_linear_logprobs, _function)
    _cpu = getattr(cpu_linear_logprobs, _function)
    _cuda = _triton_if_possible(_function, "linear_logprobs", torch_linear_logprobs)
    library.impl(_name, _without_autocast(_everywhere), "CompositeExplicitAutograd")
    library.impl(_name, _without_autocast(_cpu), "CPU")
    library.impl(_name, _without_autocast(_cuda), "CUDA")


def _linear_logprobs_fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    ignore_index: int,
    round_logits: torch.dtype | None,
    kept: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = hidden.shape[0], _results_dtype(hidden)
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n if with_entropy else 0, dtype=dtype),
    )


torch.library.register_fake("agro::linear_logprobs_fwd", _linear_logprobs_fwd_fake, lib=library)


def _linear_logprobs_bwd_fake(
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    ignore_index: int,
    round_logits: torch.dtype | None,
    kept: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hidden, weight, output_mask)


torch.library.register_fake("agro::linear_logprobs_bwd", _linear_logprobs_bwd_fake, lib=library)


def _linear_logprobs_bwd_accumulate_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments_of_bwd, _ = arguments
    dhidden, dweight, dbias = _linear_logprobs_bwd_fake(*arguments_of_bwd)
    return dhidden, dweight.new_empty(0), dbias


torch.library.register_fake(
    "agro::linear_logprobs_bwd_accumulate", _linear_logprobs_bwd_accumulate_fake, lib=library
)


def _empty_gradients(
    hidden: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, unwritten; those not asked for have shape (0,)."""
    return (
        hidden.new_empty(hidden.shape if output_mask[0] else (0,)),
        weight.new_empty(weight.shape if output_mask[1] else (0,)),
        weight.new_empty(weight.shape[:1] if output_mask[2] else (0,)),
    )


def _linear_logprobs_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, entropy = output
    save_head(ctx, inputs, lse, entropy)


def _target_logprobs_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    lse = inputs[-1]
    save_head(ctx, inputs, lse, lse.new_empty(0))


def save_head(ctx: Any, inputs: Sequence[Any], lse: Tensor, entropy: Tensor) -> None:
    """Keeps what `backward_arguments` gives back. The last of an op's inputs is not needed."""
    hidden, weight, targets, bias, temperature, token_temperature, softcap, *others = inputs
    ignore_index, round_logits, kept, _ = others
    ctx.save_for_backward(hidden, weight, targets, bias, token_temperature, kept, lse, entropy)
    ctx.options = temperature, softcap, ignore_index, round_logits
    ctx.set_materialize_grads(False)


@once_differentiable
def _logprobs_backward(
    ctx: Any,
    dlogprobs: Tensor | None,
    dlse: Tensor | None = None,
    dentropy: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of both ops: a given lse is what the inputs make it, not a constant."""
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    dhidden, dweight, dbias = torch.ops.agro.linear_logprobs_bwd(
        *backward_arguments(ctx, dlogprobs, dlse, dentropy), [need_hidden, need_weight, need_bias]
    )
    return (
        dhidden if need_hidden else None,
        dweight if need_weight else None,
        None,
        dbias if need_bias else None,
        *[None] * 7,
    )


def backward_arguments(
    ctx: Any, dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None
) -> tuple[Any, ...]:
    """What the ops of the gradients take, up to output_mask, after `save_head`."""
    hidden, weight, targets, bias, token_temperature, kept, lse, entropy = ctx.saved_tensors
    temperature, softcap, ignore_index, round_logits = ctx.options
    if entropy.shape != lse.shape:
        dentropy = None  # the forward pass made no entropy: what came is the gradient of nothing
    return (
        dlogprobs,
        dlse,
        dentropy,
        hidden,
        weight,
        targets,
        bias,
        temperature,
        token_temperature,
        softcap,
        ignore_index,
        round_logits,
        kept,
        lse,
        entropy,
    )


torch.library.register_autograd(
    "agro::linear_logprobs_fwd",
    _logprobs_backward,
    setup_context=_linear_logprobs_save,
    lib=library,
)

# --- Around them: the ids a sampler kept, log-probs from an lse that is known ---------------------

library.define("pack_kept_ids(Tensor kept_ids, SymInt vocabulary) -> Tensor kept")
library.impl("pack_kept_ids", torch_kept_ids.pack_kept_ids, "CompositeExplicitAutograd")
library.define(
    "target_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "float temperature, Tensor? token_temperature, float softcap, int ignore_index, "
    "ScalarType? round_logits, Tensor? kept, Tensor lse) -> Tensor logprobs"
)
library.impl(
    "target_logprobs",
    _without_autocast(torch_linear_logprobs.target_logprobs),
    "CompositeExplicitAutograd",
)


def _pack_kept_ids_fake(kept_ids: Tensor, vocabulary: int) -> Tensor:
    return kept_ids.new_empty((kept_ids.shape[0], -(-vocabulary // 32)), dtype=torch.int32)


torch.library.register_fake("agro::pack_kept_ids", _pack_kept_ids_fake, lib=library)


def _target_logprobs_fake(hidden: Tensor, *others: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=_results_dtype(hidden))


torch.library.register_fake("agro::target_logprobs", _target_logprobs_fake, lib=library)
torch.library.register_autograd(
    "agro::target_logprobs",
    _logprobs_backward,
    setup_context=_target_logprobs_save,
    lib=library,
)

# --- selective_logprobs ---------------------------------------------------------------------------

library.define(
    "selective_logprobs_fwd(Tensor logits, Tensor targets, float temperature, "
    "Tensor? token_temperature, int ignore_index) -> (Tensor logprobs, Tensor lse)"
)
library.define(
    "selective_logprobs_bwd(Tensor dlogprobs, Tensor logits, Tensor targets, float temperature, "
    "Tensor? token_temperature, int ignore_index, Tensor lse) -> Tensor dlogits"
)
for _name in ("selective_logprobs_fwd", "selective_logprobs_bwd"):
    _everywhere = getattr(torch_selective_logprobs, _name)
    _cuda = _triton_if_possible(_name, "selective_logprobs", torch_selective_logprobs)
    library.impl(_name, _without_autocast(_everywhere), "CompositeExplicitAutograd")
    library.impl(_name, _without_autocast(_cuda), "CUDA")


def _selective_logprobs_fwd_fake(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    dtype = _results_dtype(logits)
    return (
        logits.new_empty(targets.shape, dtype=dtype),
        logits.new_empty(targets.shape, dtype=dtype),
    )


torch.library.register_fake(
    "agro::selective_logprobs_fwd", _selective_logprobs_fwd_fake, lib=library
)


def _selective_logprobs_bwd_fake(
    dlogprobs: Tensor,
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    ignore_index: int,
    lse: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape)


torch.library.register_fake(
    "agro::selective_logprobs_bwd", _selective_logprobs_bwd_fake, lib=library
)


def _selective_logprobs_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, temperature, token_temperature, ignore_index = inputs
    lse = output[1]
    ctx.save_for_backward(logits, targets, token_temperature, lse)
    ctx.options = temperature, ignore_index
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


@once_differentiable
def _selective_logprobs_backward(
    ctx: Any, dlogprobs: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dlogprobs is None:
        return (None,) * 5
    logits, targets, token_temperature, lse = ctx.saved_tensors
    temperature, ignore_index = ctx.options
    dlogits = torch.ops.agro.selective_logprobs_bwd(
        dlogprobs, logits, targets, temperature, token_temperature, ignore_index, lse
    )
    return dlogits, None, None, None, None


torch.library.register_autograd(
    "agro::selective_logprobs_fwd",
    _selective_logprobs_backward,
    setup_context=_selective_logprobs_save,
    lib=library,
)

# --- AGRO -----------------------------------------------------------------------------------------

_AGRO_OPTIONS = (
    "float beta, float lr_weight, bool lr_cap, Tensor? on_policy, float? lr_baseline, "
    "Tensor? importance_weights, Tensor? num_groups, float scale"
)
library.define(
    "agro_coefficients(Tensor rewards, Tensor logprobs, Tensor ref_logprobs, Tensor groups, "
    f"{_AGRO_OPTIONS}) -> (Tensor coefficients, Tensor moments, Tensor counts)"
)
library.define(
    "agro_loss_fwd(Tensor logprobs, Tensor ref_logprobs, Tensor rewards, Tensor groups, "
    f"Tensor cu_seqlens, {_AGRO_OPTIONS}) -> (Tensor loss, Tensor coefficients)"
)
library.define(
    "agro_loss_bwd(Tensor dloss, Tensor coefficients, Tensor cu_seqlens, SymInt num_tokens, "
    "ScalarType dtype) -> Tensor dlogprobs"
)
for _name in ("agro_coefficients", "agro_loss_fwd", "agro_loss_bwd"):
    _everywhere = getattr(torch_agro_loss, _name)
    _cuda = _triton_if_possible(_name, "agro_loss", torch_agro_loss, float64=True)
    library.impl(_name, _everywhere, "CompositeExplicitAutograd")
    library.impl(_name, _cuda, "CUDA")


def _agro_coefficients_fake(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, groups: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    all_double = rewards.dtype == logprobs.dtype == ref_logprobs.dtype == torch.float64
    return (
        rewards.new_empty(rewards.shape, dtype=torch.float64 if all_double else torch.float32),
        rewards.new_empty(5, dtype=torch.float64),
        rewards.new_empty(3, dtype=torch.int64),
    )


torch.library.register_fake("agro::agro_coefficients", _agro_coefficients_fake, lib=library)


def _agro_loss_fwd_fake(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    groups: Tensor,
    cu_seqlens: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    return (
        logprobs.new_empty((), dtype=_results_dtype(logprobs)),
        rewards.new_empty(rewards.shape, dtype=torch.float64),
    )


torch.library.register_fake("agro::agro_loss_fwd", _agro_loss_fwd_fake, lib=library)


def _agro_loss_bwd_fake(
    dloss: Tensor, coefficients: Tensor, cu_seqlens: Tensor, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    return coefficients.new_empty(num_tokens, dtype=dtype)


torch.library.register_fake("agro::agro_loss_bwd", _agro_loss_bwd_fake, lib=library)


def _agro_loss_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprobs, cu_seqlens, coefficients = inputs[0], inputs[4], output[1]
    ctx.save_for_backward(coefficients, cu_seqlens)
    ctx.shape_and_dtype = logprobs.shape[0], logprobs.dtype
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(coefficients)
    ctx.set_materialize_grads(False)


@once_differentiable
def _agro_loss_backward(
    ctx: Any, dloss: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * int(ctx.num_inputs)
    coefficients, cu_seqlens = ctx.saved_tensors
    num_tokens, dtype = ctx.shape_and_dtype
    dlogprobs: Tensor = torch.ops.agro.agro_loss_bwd(
        dloss, coefficients, cu_seqlens, num_tokens, dtype
    )
    return dlogprobs, *[None] * (ctx.num_inputs - 1)


torch.library.register_autograd(
    "agro::agro_loss_fwd", _agro_loss_backward, setup_context=_agro_loss_save, lib=library
)
