"""The dtypes that are measured, by their names on the command line and in the CSV files."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def name_of(dtype: torch.dtype) -> str:
    """Such as "bf16"."""
    return next(name for name, value in DTYPES.items() if value == dtype)
