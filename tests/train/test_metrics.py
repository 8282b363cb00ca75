"""The columns that are measured, not computed."""

from pathlib import Path

import torch

from agro_train.metrics import peak_memory_gb


def test_peak_memory_is_what_the_kernel_says() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    high_water = int(status["VmHWM"].split()[0]) * 1024 / 1e9
    assert 0.99 * high_water <= peak_memory_gb(torch.device("cpu")) <= 1.5 * high_water
