"""A GPU's clock and power while something runs, read beside it."""

import statistics
import subprocess
import threading
import time
from types import TracebackType

import torch

QUERY = "clocks.sm,power.draw"  # MHz, watts
EVERY_MS = 20


class Clocks:
    """Samples inside a `with` block, by nvidia-smi in a process of its own.

    Where there is none (a CPU, ROCm) there are no samples.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._samples: list[tuple[float, float, float]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Clocks":
        if torch.device(self.device).type != "cuda":
            return self
        index = str(torch.cuda.current_device())
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
        command += [f"--id={index}", f"--loop-ms={EVERY_MS}"]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            return self
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.add(line)

    def add(self, line: str) -> None:
        """A line such as "1635, 698.31"; one that has no numbers ("[N/A]") is no sample."""
        try:
            clock, power = (float(part) for part in line.split(","))
        except ValueError:
            return
        self._samples.append((time.perf_counter(), clock, power))

    def between(self, spans: list[tuple[float, float]]) -> tuple[float | None, float | None]:
        """The median (MHz, watts) over spans of time.perf_counter; None without a sample."""
        inside = [sample for sample in self._samples if any(a <= sample[0] <= b for a, b in spans)]
        if not inside:
            return None, None
        return statistics.median(s[1] for s in inside), statistics.median(s[2] for s in inside)
