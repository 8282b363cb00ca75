"""Processes of the CPU benchmark: they take turns, and say why they cannot."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from benchmarks.head.job import Job, Measured, in_turn, prepare
from benchmarks.measure import timing
from benchmarks.measure.shapes import SMOKE_SHAPE


def smoke_job(provider: str, form: str = "forward") -> Job:
    return Job(provider, SMOKE_SHAPE, torch.float32, form, False, "highest", 1, smoke=True)


def test_processes_take_turns_and_say_why_they_cannot() -> None:
    said: list[str] = []
    jobs = [smoke_job("torch", "forward_backward"), smoke_job("nonsense"), smoke_job("floor")]
    plain, nonsense, floor = in_turn(jobs, 3, say=said.append)
    assert (plain.status, len(plain.times_s), floor.status, len(floor.times_s)) == ("ok", 3) * 2
    assert nonsense.status == "failed: KeyError: 'nonsense'"
    assert nonsense.times_s == []
    assert "KeyError" in said[0]
    assert len(said) == 1
    n, d, v = SMOKE_SHAPE.tokens, SMOKE_SHAPE.head.hidden_size, SMOKE_SHAPE.head.vocabulary
    assert plain.result_bytes == 4 * (n + n * d + v * d)
    cannot = in_turn([dataclasses.replace(smoke_job("torch_lce"), with_entropy=True)], 1)[0]
    assert cannot.status == "cannot: gives no entropy"


def test_a_slow_provider_is_timed_once() -> None:
    slow = in_turn([smoke_job("torch")], 3, max_call_s=0.0)[0]
    assert slow.status.startswith("slow: timed once")
    assert len(slow.times_s) == 1


@pytest.mark.parametrize(
    ("limit_s", "status"),
    [(2.0, "ok"), (0.5, "slow: timed once"), (0.05, "slow: timed once, on fresh pages")],
)
def test_how_slow_decides_how_often(
    limit_s: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_second(step: Callable[[], object], device: str = "cpu") -> float:
        step()
        return 1.0

    monkeypatch.setattr(timing, "time_call", one_second)
    job = dataclasses.replace(smoke_job("torch"), keeps_freed_memory=False)
    measured = Measured(job)
    prepare(measured, limit_s)
    assert measured.status == status
    assert len(measured.times_s) == (status != "ok")
