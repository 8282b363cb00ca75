"""Seconds and peak memory of the phases of a training step."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from agro_train.metrics import peak_memory_gb
from benchmarks.gpu_kit.supervise import Report

PHASES = ("generate", "score", "update")


class Stopwatch:
    """Phases may lie inside each other: seconds of the outer one include the inner one's, its peak
    (1e9 bytes) is of what comes after it."""

    def __init__(self, report: Report, device: str) -> None:
        self.report, self.device = report, torch.device(device)
        self.steps = 0
        self._clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = self._now()
        self._reset_peak()
        yield
        self.seconds[name] += self._now() - began
        self.peaks[name] = max(self.peaks[name], peak_memory_gb(self.device))
        self._reset_peak()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a phase."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **keywords)

        return call

    def tell(self, update_s: float, completion_tokens: int) -> None:
        """Reports the step that the phases since the last one belong to, `step` among them. The
        first one, which compiles kernels, is called warm-up.

        Args:
            update_s: of the phases update, without what else lies inside.
        """
        self.report(
            "warm_up" if self.steps == 0 else "step",
            step_s=self.seconds["step"],
            generate_s=self.seconds["generate"],
            score_s=self.seconds["score"],
            update_s=update_s,
            completion_tokens=completion_tokens,
            **{f"{name}_peak_gb": self.peaks[name] for name in PHASES},
        )
        self.steps += 1
        self._clear()

    def _clear(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, float] = defaultdict(float)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
