"""Heads as modules, a Linear or peft's around one: the matrices whose product they make.

Nothing here imports peft.

Letters: D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from agro_kernels.arguments import FLOATING

# Rows of 16-bit numbers begin at multiples of 16 bytes, as TMA needs it, if they are of so many.
_ROW_MULTIPLE = 8


class HeadTerms(NamedTuple):
    """What the head ops are given: hidden @ weight.T + bias are the logits of a head's module."""

    hidden: Tensor
    """(..., D) or, with an adapter of rank r on the head, (..., D + r) and zeros up to a multiple
    of 8."""
    weight: Tensor
    """(V, D) or (V, D + r) and zeros."""
    bias: Tensor | None
    """(V,)"""


def is_lora(head: nn.Module) -> bool:
    """Whether a module is peft's LoRA around a Linear."""
    return _is_peft(head, "peft.tuners.lora.layer.Linear")


def is_saved_copy(head: nn.Module) -> bool:
    """Whether a module is peft's choice between a module and its trained copies."""
    return _is_peft(head, "peft.utils.other.ModulesToSaveWrapper")


def _is_peft(module: nn.Module, name: str) -> bool:
    # By name: FSDP2 makes a subclass of it, under the same module and another name.
    return any(qualified(cls) == name for cls in type(module).__mro__)


def qualified(cls: type) -> str:
    """A class's full name: an adapter's Linear is called Linear, too."""
    return f"{cls.__module__}.{cls.__qualname__}"


def head_linears(head: Any) -> Iterator[tuple[nn.Module | None, str, nn.Linear]]:
    """(holder, name there, Linear) of each that serves as the head: one, and its copies.

    Raises ValueError for a head of another kind.
    """
    if is_lora(head):
        found: list[tuple[nn.Module | None, str, Any]] = [(head, "base_layer", head.base_layer)]
        variants = getattr(head, "lora_variant", {})
        if variants:
            raise ValueError(
                f"lm_head: expected plain LoRA, got {type(next(iter(variants.values()))).__name__}"
                "; leave the head out of the adapter's target modules"
            )
    elif is_saved_copy(head):
        copies = head.modules_to_save
        found = [(head, "original_module", head.original_module)]
        found += [(copies, name, copy) for name, copy in copies.items()]
    else:
        found = [(None, "", head)]
    for holder, name, linear in found:
        # By name, for LogprobHead is in modules.py, above, and FSDP2 makes a subclass of either.
        if type(linear) is not nn.Linear and not hasattr(linear, "head_dtype"):
            raise ValueError(
                f"model: expected an lm_head that is a torch.nn.Linear, with or without LoRA, got "
                f"{qualified(type(linear))}; leave the head out of quantisation and of the "
                "adapter's target modules"
            )
        yield holder, name, linear


def head_terms(head: nn.Module, hidden: Tensor) -> HeadTerms:
    """The matrices whose product a head's module makes of hidden (..., D), in its own dtype.

    LoRA on the head is part of the product, (hidden, A hidden) with (W, scaling B): in bf16 the sum
    W + scaling B A would round the adapter away. It costs a copy of the weight a call, and its
    gradient in the backward pass.
    """
    if is_saved_copy(head):
        copies: Any = head
        off = copies.disable_adapters or not copies.active_adapters
        name = "" if off else copies.active_adapters[0]
        trained = name in copies.modules_to_save
        return head_terms(
            copies.modules_to_save[name] if trained else copies.original_module, hidden
        )
    if not is_lora(head):
        return _linear_terms(head, hidden)
    layer: Any = head
    if layer.merged:
        if layer.disable_adapters:
            layer.unmerge()
        return _linear_terms(layer.base_layer, hidden)
    x, weight, bias = _linear_terms(layer.base_layer, hidden)
    columns, rows = [x], [weight]
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b = layer.lora_A[name], layer.lora_B[name]
        low = a(layer.lora_dropout[name](x.to(a.weight.dtype))) * layer.scaling[name]
        if layer.disable_adapters:
            # The same product with zeros: where B is zero, the model without the adapter is, bit
            # for bit, the one with it.
            low = torch.zeros_like(low)
        columns.append(low.to(x.dtype))
        rows.append(b.weight.to(weight.dtype))
        if b.bias is not None and not layer.disable_adapters:
            more = (b.bias * layer.scaling[name]).to(weight.dtype)
            bias = more if bias is None else bias + more
    missing = -sum(part.shape[-1] for part in rows) % _ROW_MULTIPLE
    columns.append(x.new_zeros((*x.shape[:-1], missing)))
    rows.append(weight.new_zeros((len(weight), missing)))
    return HeadTerms(torch.cat(columns, -1), torch.cat(rows, -1), bias)


def head_precision(head: nn.Module, hidden: Tensor) -> AbstractContextManager[object]:
    """Where a head's products are made: without autocast if the head has a dtype of its own."""
    linears = [linear for _, _, linear in head_linears(head)]
    if all(getattr(linear, "head_dtype", None) is None for linear in linears):
        return nullcontext()
    return torch.autocast(hidden.device.type, enabled=False)


def _linear_terms(linear: Any, hidden: Tensor) -> HeadTerms:
    weight, bias = linear.weight, linear.bias
    dtype = getattr(linear, "head_dtype", None)
    if dtype is None:
        return HeadTerms(hidden, weight, bias)
    return HeadTerms(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def checked_head_dtype(head_dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype; None of None."""
    if head_dtype is None:
        return None
    found = getattr(torch, head_dtype, None) if isinstance(head_dtype, str) else head_dtype
    if isinstance(found, torch.dtype) and found in FLOATING:
        return found
    raise ValueError(
        f'head_dtype: expected "float32", another floating dtype or None, got {head_dtype!r}; None '
        "leaves the head in the dtype of its weight"
    )
