"""Shared by the launches of the two GEMM kernels: the row of tiles.py, what follows from it."""

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from agro_kernels import tiles as configs
from agro_kernels.counted_rows import CountedRows, counted_rows
from agro_kernels.head import Head
from agro_kernels.kept_logits import KeptLogits
from agro_kernels.tiles import architecture

ROUNDED = {None: None, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def gather_counted(head: Head, counted: Tensor) -> CountedRows:
    """The rows of the (N,) bool mask `counted`, with a contiguous bias.

    A CUDA graph that is being captured cannot wait for their number: there all rows stay, as they
    do in a head without `compact`.
    """
    wait = head.compact and waiting_is_possible(head.hidden.device)
    return counted_rows(head._replace(bias=contiguous(head.bias)), counted, wait=wait)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def waiting_is_possible(device: torch.device) -> bool:
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def select_config(kernel: str, head: Head) -> configs.TileConfig:
    """The row of tiles.py for a call. Nothing here depends on how many rows there are."""
    hidden = head.hidden
    return configs.select(
        kernel,
        architecture(hidden.device),
        hidden.element_size(),
        hidden.shape[1],
        aligned=takes_aligned_rows(head),
        softcap=head.softcap > 0,
        rounds=head.round_logits is not None,
    )


def programs_at_once(config: configs.TileConfig, hidden: Tensor) -> int | None:
    """Of a GEMM kernel on the GPU of these hidden states; None where that is not known."""
    return configs.programs_at_once(architecture(hidden.device), hidden.element_size(), config)


def takes_aligned_rows(head: Head) -> bool:
    """Whether the operands' rows can begin at multiples of 16 bytes, as tensor descriptors need it.

    Only the weight's alignment decides: gemm_arguments copies misaligned hidden states, so a
    token's result does not depend on where its hidden states lie in memory.
    """
    D, itemsize = head.hidden.shape[1], head.hidden.element_size()
    return D * itemsize % 16 == 0 and has_aligned_rows(head.weight)


def has_aligned_rows(matrix: Tensor) -> bool:
    """Whether the rows of a matrix are dense and begin at multiples of 16 bytes."""
    row_stride, column_stride = matrix.stride()
    return (
        column_stride == 1
        and row_stride >= matrix.shape[1]
        and row_stride * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def head_arguments(hidden: Tensor, head: Head) -> dict[str, object]:
    """What every kernel that makes logits is told of these hidden states and the head."""
    weight = head.weight
    return {
        "V": weight.shape[0],
        "D": weight.shape[1],
        "stride_hidden_n": hidden.stride(0),
        "stride_hidden_d": hidden.stride(1),
        "stride_weight_v": weight.stride(0),
        "stride_weight_d": weight.stride(1),
        "temperature": head.temperature,
        "softcap": head.softcap if head.softcap > 0 else None,
        "ROUND_LOGITS": ROUNDED[head.round_logits],
    }


def gemm_arguments(config: configs.TileConfig, head: Head) -> dict[str, object]:
    """The keyword arguments that the launches of the two GEMM kernels share."""
    hidden, weight = head.hidden, head.weight
    (N, D), V = hidden.shape, weight.shape[0]
    if takes_aligned_rows(head) and not has_aligned_rows(hidden):
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    operands: dict[str, object] = {"hidden": hidden, "weight": weight}
    if config.descriptors:
        operands = {
            "hidden": TensorDescriptor.from_tensor(hidden, [config.block_n, config.block_d]),
            "weight": TensorDescriptor.from_tensor(weight, [config.block_v, config.block_d]),
        }
    return dict(
        **operands,
        bias_ptr=head.bias,
        targets_ptr=head.targets,
        token_temperature_ptr=head.token_temperature,
        kept_ptr=head.kept,
        N=N,
        **head_arguments(hidden, head),
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_D=config.block_d,
        GROUP_N=config.group_n,
        EVEN_V=V % config.block_v == 0,
        EVEN_D=D % config.block_d == 0,
        DESCRIPTORS=config.descriptors,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def kept_arguments(
    kept_logits: KeptLogits | None = None,
    kept_rows: Tensor | None = None,
    rows: slice = slice(None),
) -> dict[str, object]:
    """What both kernels are told of the kept logits of some rows of the N tokens.

    kept_rows (N,): where a token's logits are. None is all of them in order.
    """
    if kept_logits is None:
        nothing = ("kept_logits_ptr", "kept_maxima_ptr", "kept_rows_ptr", "KEPT_TILE")
        numbers = ("stride_kept_logits_n", "stride_kept_maxima_n")
        return dict.fromkeys(nothing) | dict.fromkeys(numbers, 0)
    if kept_rows is None:
        kept_logits = KeptLogits(*(tensor[rows] for tensor in kept_logits))
    else:
        kept_rows = kept_rows[rows]
    return {
        "kept_logits_ptr": kept_logits.logits,
        "kept_maxima_ptr": kept_logits.maxima,
        "kept_rows_ptr": kept_rows,
        "stride_kept_logits_n": kept_logits.logits.stride(0),
        "stride_kept_maxima_n": kept_logits.maxima.stride(0),
        "KEPT_TILE": kept_logits.tile,
    }
