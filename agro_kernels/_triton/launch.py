"""Shared by the launches of the head kernels: which row of configs.py, and what follows from it."""

import torch
from torch import Tensor

from agro_kernels import configs


def select_config(kernel: str, hidden: Tensor) -> configs.TileConfig:
    return configs.select(kernel, architecture(hidden.device), hidden.element_size())


def architecture(device: torch.device) -> str:
    """The device's name in the tables of configs.py; CPU tensors are for Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def gemm_constants(config: configs.TileConfig, hidden: Tensor, weight: Tensor) -> dict[str, object]:
    """The keyword arguments that the two GEMM kernels' launches share."""
    return dict(
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_D=config.block_d,
        GROUP_N=config.group_n,
        EVEN_V=weight.shape[0] % config.block_v == 0,
        EVEN_D=weight.shape[1] % config.block_d == 0,
        # Triton's default would round fp32 operands to tf32; bf16 and fp16 ones are not affected.
        INPUT_PRECISION="ieee",
        INTERPRETED=hidden.device.type == "cpu",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
