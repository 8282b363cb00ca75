"""The GPU benchmark runs, on a CPU, and refuses what it should refuse."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.head import gpu, gpu_measure, tune
from benchmarks.head.gpu_measure import Entrant, calls_for, measure
from benchmarks.head.gpu_rows import PHASES, Row, algorithmic_gemms
from benchmarks.head.providers.base import FORMS, Inputs, Provider
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure.rows import read_csv
from benchmarks.measure.shapes import SMOKE_SHAPE, SMOKE_SOFTCAP_SHAPE, Shape


class Wrong(Provider):
    """Half of every log-probability, as a factor forgotten somewhere would give."""

    name = "wrong"
    what = "a mistake"

    def logprobs(self, inputs: Inputs) -> Tensor:
        return 0.5 * PROVIDERS["torch"]().logprobs(inputs)


class TooLarge(Provider):
    name = "too_large"
    what = "more memory than there is"

    def logprobs(self, inputs: Inputs) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 62.62 GiB.")


class Broken(Provider):
    name = "broken"
    what = "an error of its own"

    def logprobs(self, inputs: Inputs) -> Tensor:
        raise RuntimeError("Triton Error [CUDA]: misaligned address\nmore lines")


class Absent(Provider):
    name = "absent"
    what = "not here"
    packages = ("no-such-package-as-this",)

    def logprobs(self, inputs: Inputs) -> Tensor:
        raise AssertionError("called although it is not installed")


class Uncapped(Provider):
    name = "uncapped"
    what = "logits as they are"
    has_softcap = False

    def logprobs(self, inputs: Inputs) -> Tensor:
        raise AssertionError("called although there is a softcap")


@pytest.fixture
def odd_providers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for provider in (Wrong, TooLarge, Broken, Absent, Uncapped):
        monkeypatch.setitem(PROVIDERS, provider.name, provider)
    yield
    gpu_measure.errors_on.cache_clear()


def measured(shape: Shape, form: str, providers: list[str]) -> list[Row]:
    return measure(
        shape,
        form,
        providers,
        dtype=torch.bfloat16,
        with_entropy=False,
        repetitions=3,
        seconds=10.0,
        device="cpu",
        small=SMOKE_SHAPE,
    )


@pytest.mark.parametrize("shape", [SMOKE_SHAPE, SMOKE_SOFTCAP_SHAPE], ids=lambda shape: shape.name)
@pytest.mark.parametrize("form", FORMS)
def test_ours_and_plain_torch_are_measured(form: str, shape: Shape) -> None:
    rows = measured(shape, form, ["ours", "torch"])
    assert [(r.provider, r.phase) for r in rows] == [
        ("floor", "whole"),
        *((name, phase) for name in ("ours", "torch") for phase in PHASES[form]),
    ]
    for row in rows:
        assert row.status == "ok"
        assert row.n == 3
        assert row.median_ms is not None
        assert row.p20_ms is not None
        assert row.p80_ms is not None
        assert 0.0 < row.p20_ms <= row.median_ms <= row.p80_ms
        flop = row.algorithmic_gemms * shape.gemm_flop()
        assert row.tflops == pytest.approx(1e-9 * flop / row.median_ms)
        if row.provider == "ours" and form == "forward":
            assert row.logprob_error is not None
            assert row.logprob_error < 1e-4
        elif row.provider == "ours":
            assert row.dhidden_error is not None
            assert row.dhidden_error < 1e-2


def test_smoke_run_writes_rows_and_plots(tmp_path: Path) -> None:
    arguments = ["--smoke", "--provider", "ours", "torch", "--form", "forward_backward"]
    assert gpu.main([*arguments, "--results", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "bench_linear_logprobs_smoke.csv")
    heads, tokens = ("smoke", "smoke-softcap"), ("37", "64")
    found = {(r["head"], r["tokens"], r["phase"]) for r in rows if r["provider"] == "ours"}
    assert found == {
        (h, n, phase) for h in heads for n in tokens for phase in ("whole", "backward")
    }
    assert {(row["status"], row["dtype"], row["torch"]) for row in rows} == {
        ("ok", "bf16", torch.__version__)
    }
    assert all(row["commit"] for row in rows)
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {f"bench_linear_logprobs_smoke_{head}_forward_backward.png" for head in heads}


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the smoke runs."""
    monkeypatch.setattr(gpu, "plot", lambda *_: None)


@pytest.mark.usefixtures("no_plots")
def test_appended_rows_stand_beside_those_of_other_cases(tmp_path: Path) -> None:
    arguments = ["--smoke", "--provider", "ours", "--form", "forward", "--results", str(tmp_path)]
    assert gpu.main([*arguments, "--tokens", "37", "64"]) == 0
    path = tmp_path / "bench_linear_logprobs_smoke.csv"
    before = read_csv(path)
    assert gpu.main([*arguments, "--tokens", "64", "--append"]) == 0
    after = read_csv(path)
    kept = [row for row in before if row["tokens"] == "37"]
    assert kept
    assert after[: len(kept)] == kept
    assert sorted(row["tokens"] for row in after) == sorted(row["tokens"] for row in before)
    assert after != before


@pytest.mark.usefixtures("no_plots")
def test_smoke_run_with_entropy(tmp_path: Path) -> None:
    arguments = ["--smoke", "--with-entropy", "--provider", "ours", "--tokens", "37", "--dtype"]
    arguments += ["fp32", "--form", "forward_backward", "known_coefficients"]
    assert gpu.main([*arguments, "--results", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "bench_linear_logprobs_smoke_fp32_entropy.csv")
    assert {row["form"] for row in rows} == {"forward_backward"}  # the known sum has no entropy
    assert all(float(r["entropy_error"]) < 1e-4 for r in rows if r["provider"] == "ours")


@pytest.mark.usefixtures("odd_providers")
def test_who_cannot_be_timed_has_a_row_that_says_why() -> None:
    providers = ["ours", "wrong", "too_large", "broken", "absent", "uncapped"]
    rows = measured(SMOKE_SOFTCAP_SHAPE, "forward", providers)
    statuses = {row.provider: row.status for row in rows}
    assert statuses["floor"] == statuses["ours"] == "ok"
    assert statuses["wrong"].startswith("wrong: logprob_error")
    assert statuses["too_large"] == "out of memory"
    assert statuses["broken"] == "failed: RuntimeError: Triton Error [CUDA]: misaligned address"
    assert statuses["uncapped"] == "cannot: takes no softcap"
    assert statuses["absent"] == "not installed: no-such-package-as-this"
    for row in rows:
        assert (row.median_ms is None) == (row.status != "ok") == (row.n == 0)


@pytest.mark.usefixtures("odd_providers", "no_plots")
def test_ours_being_wrong_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PROVIDERS, "ours", Wrong)
    arguments = ["--smoke", "--provider", "ours", "--form", "forward", "--tokens", "37"]
    assert gpu.main([*arguments, "--results", str(tmp_path)]) == 1
    assert "ours, smoke, N=37, forward: wrong: logprob_error" in capsys.readouterr().err


def test_slow_providers_are_called_less_often_but_not_silently() -> None:
    assert calls_for(Entrant("fast", call_s=0.01), repetitions=20, seconds=10.0) == 20
    assert calls_for(Entrant("slow", call_s=1.0), repetitions=20, seconds=10.0) == 10
    assert calls_for(Entrant("slower", call_s=60.0), repetitions=20, seconds=10.0) == 3


GEMMS = {
    "forward": {"whole": 1},
    "forward_backward": {"whole": 3, "backward": 2},
    "frozen_weight": {"whole": 2, "backward": 1},
    "known_coefficients": {"whole": 3},
}


@pytest.mark.parametrize("form", GEMMS)
def test_no_product_is_counted_twice(form: str) -> None:
    counted = {phase: algorithmic_gemms(form, phase) for phase in GEMMS[form]}
    assert counted == GEMMS[form]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("main", [gpu.main, tune.main])
def test_without_a_gpu_one_sentence_and_status_2(
    main: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(main)
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "no GPU here" in captured.err
    assert "--smoke" in captured.err
