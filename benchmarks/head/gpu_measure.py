"""The GPU benchmark's measuring: the providers on the inputs of one shape and form, in turn."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from benchmarks.head.correctness import Errors, beyond_limits, errors, objection
from benchmarks.head.floor import GemmFloor
from benchmarks.head.gpu_rows import PHASES, Row, algorithmic_gemms
from benchmarks.head.providers.base import Inputs, Provider, Step, make_inputs
from benchmarks.head.providers.ours import earlier_lse
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure import timing
from benchmarks.measure.dtypes import name_of
from benchmarks.measure.rows import error_text
from benchmarks.measure.shapes import ACCURACY_SHAPE, Shape

FLOOR_TILE_BYTES = 2 * 2**30  # of the logits that the floor's products read or write
CALLS_A_TURN = 5
FEWEST_CALLS = 3  # of a provider that is too slow for --repetitions


@dataclass
class Entrant:
    """A provider, or the floor, on the inputs of one shape, form and dtype."""

    name: str
    status: str = "ok"
    whole: Callable[[], None] | None = None
    step: Step | None = None  # None for the floor
    errors: Errors = field(default_factory=Errors)
    extra_bytes: int | None = None
    setting: str = ""
    call_s: float = 0.0  # a warm call, from which follows how many there is time for
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def release(self) -> None:
        if self.step is not None:
            self.step.release()


def enter(
    name: str, form: str, with_entropy: bool, inputs: Inputs, device: str, small: Shape
) -> Entrant:
    """Makes a provider ready: errors, warm-up, choice of its setting, check, peak memory.

    Whatever a provider raises is its status: one that fails must not end the run of the others.
    """
    entrant = Entrant(name)
    absent = PROVIDERS[name].missing()
    if absent is not None:
        entrant.status = absent
        return entrant
    try:
        _make_ready(entrant, form, with_entropy, inputs, device, small)
    except torch.OutOfMemoryError:
        entrant.status = "out of memory"
    except Exception as error:
        entrant.status = f"failed: {error_text(error)}"
    finally:
        entrant.release()
        empty_cache(device)
    return entrant


def _make_ready(
    entrant: Entrant, form: str, with_entropy: bool, inputs: Inputs, device: str, small: Shape
) -> None:
    """Fills in everything but the times, or the status if there cannot be any."""
    provider = PROVIDERS[entrant.name]()
    against = provider.reason_against(form, with_entropy, inputs)
    if against is not None:
        entrant.status = f"cannot: {against}"
        return
    dtype = inputs.hidden.dtype
    entrant.errors = errors_on(
        small, entrant.name, form, with_entropy, inputs.softcap, dtype, device
    )
    step = entrant.step = Step(provider, form, inputs, with_entropy=with_entropy)
    entrant.whole = step
    step()
    _choose_setting(provider, step, device)
    entrant.setting = "" if provider.setting is None else str(provider.setting)
    wrong = beyond_limits(entrant.errors, dtype) or objection(step, dtype)
    if wrong is not None:
        entrant.status = wrong
        return
    results = step.results().bytes()
    step.release()
    empty_cache(device)
    entrant.extra_bytes = timing.peak_bytes(step, device) - results
    step.release()
    entrant.call_s = timing.time_call(step, device)


def _choose_setting(provider: Provider, step: Step, device: str) -> None:
    """Keeps the fastest of the provider's settings, if it has any, and runs the step with it."""
    settings = provider.settings(step.inputs)
    if not settings:
        return
    seconds = []
    for provider.setting in settings:
        step()
        step.release()
        seconds.append(timing.time_call(step, device))
    provider.setting = settings[seconds.index(min(seconds))]
    step()


@functools.cache
def errors_on(
    small: Shape,
    name: str,
    form: str,
    with_entropy: bool,
    softcap: float | None,
    dtype: torch.dtype,
    device: str,
) -> Errors:
    """The errors of a provider on the small shape, the same for every timed shape."""
    inputs = make_inputs(small, dtype, device)
    inputs.softcap = softcap
    if form == "known_coefficients":
        inputs.lse = earlier_lse(inputs)
    return errors(Step(PROVIDERS[name](), form, inputs, with_entropy=with_entropy))


def enter_floor(form: str, inputs: Inputs, device: str) -> Entrant:
    entrant = Entrant(GemmFloor.name)
    n, v = inputs.hidden.shape[0], inputs.weight.shape[0]
    most = FLOOR_TILE_BYTES // (n * inputs.hidden.element_size())
    blocks = [block for block in (4096, 16384, v) if block <= max(most, 4096)]
    try:
        floor = GemmFloor(form, inputs, blocks)
        entrant.setting = floor.tune(lambda call: timing.time_call(call, device))
        entrant.whole = floor
        entrant.call_s = timing.time_call(floor, device)
    except torch.OutOfMemoryError:
        entrant.status = "out of memory"
    return entrant


def empty_cache(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def calls_for(entrant: Entrant, repetitions: int, seconds: float) -> int:
    """As many calls as asked for, or as fit into `seconds`, but not fewer than FEWEST_CALLS."""
    fitting = int(seconds / max(entrant.call_s, 1e-9))
    return min(repetitions, max(fitting, FEWEST_CALLS))


def time_in_turn(
    entrants: list[Entrant], form: str, repetitions: int, seconds: float, device: str
) -> None:
    """Fills `seconds` of every entrant whose status is ok, a few calls of each after the other's.

    A turn begins with a call that is not timed: the allocator may have to give back what it keeps
    from the last provider, which stops the GPU.
    """
    for start in range(0, repetitions, CALLS_A_TURN):
        ready = [
            entrant
            for entrant in entrants
            if entrant.status == "ok" and start < calls_for(entrant, repetitions, seconds)
        ]
        first = start // CALLS_A_TURN % max(len(ready), 1)
        for entrant in ready[first:] + ready[:first]:
            last = min(start + CALLS_A_TURN, calls_for(entrant, repetitions, seconds))
            try:
                time_phase(entrant, "whole", device)
                for phase in PHASES[form]:
                    if phase == "backward" and entrant.step is None:
                        continue
                    times = entrant.seconds.setdefault(phase, [])
                    times += [time_phase(entrant, phase, device) for _ in range(start, last)]
            except torch.OutOfMemoryError:  # beside the others' inputs and settings
                entrant.status = "out of memory"
            finally:
                entrant.release()


def time_phase(entrant: Entrant, phase: str, device: str) -> float:
    """Seconds of one call, without what comes before and after it."""
    entrant.release()
    if phase == "backward" and entrant.step is not None:
        entrant.step.forward()
        return timing.time_call(entrant.step.backward, device)
    assert entrant.whole is not None, f"{entrant.name} was not made ready"
    return timing.time_call(entrant.whole, device)


def rows_of(
    entrant: Entrant, form: str, with_entropy: bool, shape: Shape, dtype: torch.dtype
) -> list[Row]:
    """A row for each phase; where there is no time, one that says why."""
    rows = []
    known = PROVIDERS.get(entrant.name)
    for phase in PHASES[form] if entrant.status == "ok" else PHASES[form][:1]:
        seconds = entrant.seconds.get(phase)
        if entrant.status == "ok" and not seconds:
            continue  # the floor has no backward pass
        took = timing.summary(seconds) if seconds and entrant.status == "ok" else None
        gemms = algorithmic_gemms(form, phase)
        rows.append(
            Row(
                head=shape.head.name,
                form=form,
                tokens=shape.tokens,
                phase=phase,
                provider=entrant.name,
                with_entropy=with_entropy,
                dtype=name_of(dtype),
                hidden_size=shape.head.hidden_size,
                vocabulary=shape.head.vocabulary,
                status=entrant.status,
                n=0 if took is None else took.n,
                median_ms=None if took is None else 1e3 * took.median_s,
                p20_ms=None if took is None else 1e3 * took.p20_s,
                p80_ms=None if took is None else 1e3 * took.p80_s,
                tflops=None if took is None else gemms * shape.gemm_flop() / took.median_s / 1e12,
                algorithmic_gemms=gemms,
                extra_mb=None if entrant.extra_bytes is None else entrant.extra_bytes / 1e6,
                **asdict(entrant.errors),
                setting=entrant.setting,
                versions="" if known is None or known.missing() else known.versions(),
            )
        )
    return rows


def measure(
    shape: Shape,
    form: str,
    providers: list[str],
    *,
    dtype: torch.dtype,
    with_entropy: bool,
    repetitions: int,
    seconds: float,
    device: str,
    small: Shape = ACCURACY_SHAPE,
) -> list[Row]:
    """The rows of one shape and form.

    Args:
        providers: keys of PROVIDERS; the floor is always added.
        repetitions, seconds: calls of each provider, fewer if they take longer than that.
        small: the shape on which errors are measured, with the timed head's softcap.
    """
    empty_cache(device)
    try:
        inputs = make_inputs(shape, dtype, device)
        if form == "known_coefficients":
            inputs.lse = earlier_lse(inputs)
    except torch.OutOfMemoryError:
        entrants = [Entrant(name, "out of memory: the inputs alone") for name in providers]
    else:
        entrants = [enter_floor(form, inputs, device)]
        entrants += [enter(name, form, with_entropy, inputs, device, small) for name in providers]
        time_in_turn(entrants, form, repetitions, seconds, device)
    return [row for e in entrants for row in rows_of(e, form, with_entropy, shape, dtype)]
