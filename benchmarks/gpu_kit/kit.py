"""The parts one after the other, within the budget; results are written after each."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu_kit import packages
from benchmarks.gpu_kit.parts import MACHINE, Part
from benchmarks.gpu_kit.results import DRY, MEASURED, Row, describe, row_of, skipped, write
from benchmarks.gpu_kit.supervise import Outcome, run_part

LEAST_S = 20.0  # a part that would have less is not begun


class Kit:
    """What is known so far.

    Args:
        folder: for the results.
        dry: whether it is a rehearsal on a CPU.
        budget_s: from `began` on, which is of time.monotonic.
    """

    def __init__(self, folder: Path, *, dry: bool, began: float, budget_s: float) -> None:
        self.folder, self.dry = folder, dry
        self.began, self.budget_s = began, budget_s
        self.rows: list[Row] = []
        self.outcomes: dict[str, Outcome] = {}
        self.facts: dict[str, str] = {}
        self.peak_flops: float | None = None
        self.triton_trouble = ""
        self.older = packages.older([*packages.found_here(), *packages.requirements()])
        self.started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    @property
    def left_s(self) -> float:
        return self.began + self.budget_s - time.monotonic()

    def run(self, part: Part) -> None:
        """Runs the part, or skips it and says why. What came out is on the disk afterwards."""
        if part.needs and packages.version(part.needs) is None:
            row = skipped(part, f"the package {part.needs} is not installed")
        elif self.left_s < LEAST_S:
            row = skipped(part, f"the budget of {self.budget_s:.0f} s is spent")
        else:
            print(f"{part.name}: {part.about} ...", flush=True)
            outcome = run_part(
                part.name,
                part.function,
                part.arguments,
                self.folder,
                min(part.limit_s, self.left_s),
                fork=self.dry,
                without_triton=bool(self.triton_trouble),
            )
            self.outcomes[part.name] = outcome
            if part.name == MACHINE:
                self._note(outcome)
            row = row_of(part, outcome, self.peak_flops)
        self.rows.append(row)
        print(describe(row), flush=True)
        write(self.folder, self.rows, self.outcomes, self.facts, self._about())

    def status(self) -> int:
        """1 where a part failed or was ended before its own end."""
        return int(any(row.status not in ("ok", "skipped") for row in self.rows))

    def _note(self, machine: Outcome) -> None:
        for report in machine.reports:
            self.facts, self.peak_flops = report["facts"], report["peak_flops"]
            self.triton_trouble = report["triton_trouble"]
        if self.triton_trouble:
            print(
                f"Triton's kernels do not run here ({self.triton_trouble}): the blocked torch path "
                "is measured in their place",
                flush=True,
            )

    def _about(self) -> dict[str, Any]:
        return {
            "what": DRY if self.dry else MEASURED,
            "dry": self.dry,
            "started": self.started,
            "seconds": time.monotonic() - self.began,
            "budget_s": self.budget_s,
            "peak_flops": self.peak_flops,
            "ops": "the blocked torch path" if self.triton_trouble else "by default",
            "triton_trouble": self.triton_trouble,
            "older_packages": self.older,
        }
