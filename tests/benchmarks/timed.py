"""Rows of processes that never ran."""

import dataclasses
from typing import Any

from benchmarks.head import cpu
from benchmarks.head.cpu_plan import job_of
from benchmarks.head.cpu_rows import Case, Row, row_of
from benchmarks.head.job import Measured
from benchmarks.measure.shapes import Shape


def timed_row(shape: Shape, provider: str, seconds: float, **changes: Any) -> Row:
    """The row of a provider called once, alone: bf16, forward, unless changed."""
    job = job_of(cpu.parse([]), Case(shape, "bf16", "forward", False), provider)
    return dataclasses.replace(row_of(Measured(job, times_s=[seconds])), **changes)
