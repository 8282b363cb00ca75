"""One process of the CPU benchmark: a provider warmed up, checked, and timed call by call.

`in_turn` starts a process for each job and lets them take turns. Everything between the two section
comments runs in such a process.
"""

import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.head import correctness
from benchmarks.head.floor import GemmFloor
from benchmarks.head.providers.base import Inputs, Step, make_inputs
from benchmarks.head.providers.ours import earlier_lse
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure import timing
from benchmarks.measure.rows import error_text
from benchmarks.measure.shapes import ACCURACY_SHAPE, SMOKE_SHAPE, Shape
from benchmarks.measure.turns import Turn, rounds, tail

FLOOR, FLOOR_KEPT = GemmFloor.name, GemmFloor.kept_name
FLOORS = (FLOOR, FLOOR_KEPT)
# A call that takes this many times the limit is not repeated on memory that the process keeps:
# fresh pages are taken to be the smaller part of its time.
VERY_SLOW = 10.0


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    provider: str  # a key of PROVIDERS, or one of FLOORS
    shape: Shape
    dtype: torch.dtype
    form: str
    with_entropy: bool
    precision: str  # torch.set_float32_matmul_precision
    threads: int
    smoke: bool = False  # the errors are measured on a tiny shape, too
    keeps_freed_memory: bool = True  # see timing.keep_freed_memory

    def label(self) -> str:
        """Such as "torch@medium"."""
        return label_of(self.provider, self.precision)


def label_of(provider: str, precision: str) -> str:
    """Such as "torch@medium"; torch's default precision, "highest", is not named."""
    return provider if precision == "highest" else f"{provider}@{precision}"


@dataclass
class Measured:
    """What a process found out. status is "ok", or why there is no time."""

    job: Job
    status: str = "ok"
    setting: str = ""
    first_call_s: float | None = None
    times_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None  # beyond the inputs, the results and what was there before
    result_bytes: int | None = None  # logprobs, entropy, dhidden, dweight
    kept_bytes: int | None = None  # still held when the results are gone: caches, compiled code
    instruction_set: str = ""


def in_turn(
    jobs: Sequence[Job],
    repetitions: int,
    *,
    max_call_s: float = float("inf"),
    say: Callable[[str], None] = print,
) -> list[Measured]:
    """Measures every job, `repetitions` calls each, one call of each after the other.

    Args:
        jobs: one process each, alive together: their memory adds up.
        max_call_s: a provider whose call takes longer is timed once, and its status says so.
        say: where the output of a process that failed goes.
    """
    with tempfile.TemporaryDirectory() as folder:
        turns, found = [], []
        for index, job in enumerate(jobs):
            turn = Turn(Path(folder) / f"{index}.log", _measure, job, max_call_s)
            answer = turn.receive()  # one warms up at a time
            measured = answer if isinstance(answer, Measured) else Measured(job, status=answer)
            turns.append(turn)
            found.append(measured)
        for index, answer in rounds(turns, repetitions, lambda i: found[i].status == "ok"):
            measured = found[index]
            if isinstance(answer, float):
                measured.times_s.append(answer)
            else:
                measured.status = answer if isinstance(answer, str) else answer.status
        for turn, measured in zip(turns, found, strict=True):
            turn.close()
            if measured.status.startswith(("failed", "died")):
                say(f"--- output of {measured.job.label()}:\n{tail(turn.log)}")
    return found


def find_errors(job: Job, *, say: Callable[[str], None] = print) -> correctness.Errors | str:
    """The errors of a provider on the accuracy shape; a sentence if there are none."""
    with tempfile.TemporaryDirectory() as folder:
        turn = Turn(Path(folder) / "log", _find_errors, job)
        answer: correctness.Errors | str = turn.receive()
        turn.close()
        if isinstance(answer, str):
            say(f"--- output of {job.label()}:\n{tail(turn.log)}")
    return answer


# --- In the process -------------------------------------------------------------------------------


def _measure(connection: Connection, job: Job, max_call_s: float) -> None:
    """Sends a Measured when warm, then the seconds of one call for every "call" received."""
    torch.set_num_threads(job.threads)
    torch.set_float32_matmul_precision(job.precision)
    measured = Measured(job)
    try:
        call = prepare(measured, max_call_s)
        connection.send(measured)
        while measured.status == "ok" and call is not None and connection.recv() == "call":
            connection.send(call())
    except EOFError:  # the benchmark itself has ended
        pass
    except MemoryError:
        measured.status = "out of memory"
        connection.send(measured)
    except Exception as error:
        traceback.print_exc()  # into the log of the process
        measured.status = f"failed: {error_text(error)}"
        connection.send(measured)


def prepare(measured: Measured, max_call_s: float) -> Callable[[], float] | None:
    """Warms up, checks, tunes and measures the memory; returns the call to be timed.

    Returns None, or a call that is not to be made, where the status is no longer "ok".
    """
    job = measured.job
    inputs = make_inputs(job.shape, job.dtype)
    if job.provider in FLOORS:
        return _prepare_floor(measured, inputs, max_call_s)
    if job.form == "known_coefficients":
        inputs.lse = earlier_lse(inputs)
    before = timing.resident_bytes()
    provider = PROVIDERS[job.provider]()
    reason = provider.reason_against(job.form, job.with_entropy, inputs)
    if reason is not None:
        measured.status = f"cannot: {reason}"
        return None
    step = Step(provider, job.form, inputs, with_entropy=job.with_entropy)

    def call() -> float:
        step.release()  # else freeing the last results would be part of the time
        return timing.time_call(step)

    settings = provider.settings(inputs)
    if settings:
        seconds = []
        for provider.setting in settings:
            seconds.append(call())
        provider.setting = settings[seconds.index(min(seconds))]
    measured.setting = "" if provider.setting is None else str(provider.setting)
    measured.first_call_s = call()
    judged_as = torch.bfloat16 if job.precision == "medium" else job.dtype
    wrong = correctness.objection(step, judged_as)
    if wrong is not None:
        measured.status = wrong
        return None
    on_fresh_pages_s = _measure_memory(measured, step, before)
    measured.instruction_set = timing.ours_instruction_set()
    if on_fresh_pages_s > VERY_SLOW * max_call_s:
        _stop(measured, on_fresh_pages_s, "timed once, on fresh pages")
        return None
    if job.keeps_freed_memory:
        timing.keep_freed_memory()
        call()  # takes from the system what the timed calls will use
    if on_fresh_pages_s > max_call_s:  # it may be fast enough on memory that is there already
        call_s = call()
        if call_s > max_call_s:
            _stop(measured, call_s, "timed once")
    return call


def _prepare_floor(measured: Measured, inputs: Inputs, max_call_s: float) -> Callable[[], float]:
    floor = GemmFloor(measured.job.form, inputs, kept=measured.job.provider == FLOOR_KEPT)
    measured.setting = floor.tune(timing.time_call)
    measured.first_call_s = timing.time_call(floor)
    if measured.first_call_s > max_call_s:
        _stop(measured, measured.first_call_s, "timed once")
    return lambda: timing.time_call(floor)


def _measure_memory(measured: Measured, step: Step, before: int) -> float:
    """Fills in the bytes. Returns the seconds of the watched call, whose memory is all fresh.

    before: the process's bytes before the provider was made.
    """
    measured.result_bytes = step.results().bytes()
    step.release()
    seconds: list[float] = []
    peak = timing.peak_bytes(lambda: seconds.append(timing.time_call(step)))
    measured.peak_bytes = max(0, peak - measured.result_bytes)
    step.release()
    timing.reset_peak()
    measured.kept_bytes = timing.resident_bytes() - before
    return seconds[0]


def _stop(measured: Measured, call_s: float, how: str) -> None:
    """More calls would take too long: there is one time, and the status says so."""
    measured.status = f"slow: {how}"
    measured.times_s = [call_s]


def _find_errors(connection: Connection, job: Job) -> None:
    """Sends the Errors of a provider on a small shape, or why there are none."""
    torch.set_num_threads(job.threads)
    torch.set_float32_matmul_precision(job.precision)
    inputs = make_inputs(SMOKE_SHAPE if job.smoke else ACCURACY_SHAPE, job.dtype)
    try:
        inputs.lse = earlier_lse(inputs)
        step = Step(PROVIDERS[job.provider](), job.form, inputs, with_entropy=job.with_entropy)
        connection.send(correctness.errors(step))
    except Exception as error:
        traceback.print_exc()
        connection.send(f"failed: {error_text(error)}")
