"""The roofline model: its arithmetic by hand, its memory against torch's allocator."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agro_kernels._triton import linear_logprobs
from agro_kernels.head import Head as OpHead
from agro_train.plan.machine import Datasheet
from benchmarks.head.providers.base import FORM_GEMMS, FORMS, Step, make_inputs
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure.shapes import GPU_HEADS, HEADS, Head, Shape
from benchmarks.predict import cost_model
from benchmarks.predict.cost_model import (
    DEVICES,
    IMPLEMENTATIONS,
    Device,
    Kernel,
    extra_bytes,
    kernels,
    predict,
)

# 100 FLOP/s, 10 bytes/s, 2 units x 3 exponentials x 0.5 Hz = 3 exponentials/s.
TOY = Device("toy", "other", Datasheet(1e6, 100.0, 10.0, 0.0), 2, 3, 0.5, "made up")
LLAMA = Shape("llama", 8192, HEADS["llama3-8b"])


def named(implementation: str, form: str, shape: Shape) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in kernels(implementation, form, shape, "sm90")}


@pytest.mark.parametrize(
    ("flop", "moved", "exps", "seconds", "bound"),
    [
        (400.0, 10.0, 3.0, 4.0, "matrix"),
        (400.0, 50.0, 3.0, 5.0, "memory"),
        (400.0, 50.0, 18.0, 6.0, "exp"),
    ],
)
def test_kernel_takes_its_slowest_resource(
    flop: float, moved: float, exps: float, seconds: float, bound: str
) -> None:
    kernel = Kernel("k", 1, flop, moved, exps)
    assert kernel.seconds(TOY) == pytest.approx(seconds)
    assert kernel.bound(TOY) == bound


def test_efficiency_slows_the_matrix_products_alone() -> None:
    kernel = Kernel("k", 1, flop=400.0, bytes=50.0)
    assert kernel.limits(TOY, 0.5) == pytest.approx({"matrix": 8.0, "memory": 5.0, "exp": 0.0})


def test_products_of_llama_by_hand() -> None:
    # 2 * 8192 * 4096 * 128256 = 8.607e12, the 8.61 TFLOP of one product.
    one = 2 * 8192 * 4096 * 128256
    assert one == 8607114461184
    row = predict(DEVICES[1], "forward_backward", "fused", LLAMA)
    assert row.device == "H100 SXM"
    assert row.tflop == pytest.approx(4 * one / 1e12)
    # Bound by the products all the way: 34.43 TFLOP at 989.4 TFLOP/s, and a merge of microseconds.
    assert row.bound == "matrix"
    assert row.predicted_ms == pytest.approx(34.80, abs=0.01)
    assert row.fraction_of_peak == pytest.approx(1.0, abs=1e-3)
    assert row.predicted_ms_no_overlap > row.predicted_ms


@pytest.mark.parametrize("form", FORMS)
def test_fused_products_are_those_of_the_benchmark(form: str) -> None:
    steps = kernels("fused", form, LLAMA, "sm90")
    assert sum(step.gemms for step in steps) == len(FORM_GEMMS[form])
    assert sum(step.flop for step in steps) == len(FORM_GEMMS[form]) * LLAMA.gemm_flop()
    # Plain torch keeps what ours computes again.
    kept = sum(step.gemms for step in kernels("materialised", form, LLAMA, "sm90"))
    assert kept == len(set(FORM_GEMMS[form]))


def test_bytes_and_exponentials_by_hand() -> None:
    shape = Shape("tiny", 10, Head("tiny", 8, 100))
    logits, hidden, weight = 1000, 80, 800
    forward = named("materialised", "forward", shape)
    assert forward["logits"].bytes == 2 * (hidden + weight + logits)
    assert forward["float"].bytes == (2 + 4) * logits
    assert forward["log_softmax"].bytes == 4 * (3 + 1) * logits
    assert forward["log_softmax"].exps == logits
    fused = named("fused", "forward_backward", shape)  # one chunk
    assert fused["dlogits"].bytes == 2 * (hidden + weight + logits)
    assert fused["dlogits"].exps == fused["logprobs"].exps == logits
    assert fused["dhidden"].bytes == 2 * (logits + weight) + 4 * 2 * hidden + (4 + 2) * hidden
    assert fused["dweight"].bytes == 2 * (logits + hidden + weight)
    capped = Shape("tiny", 10, Head("tiny", 8, 100, softcap=30.0))
    assert named("fused", "forward", capped)["logprobs"].exps == 3 * logits


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_more_tokens_take_longer(implementation: str, form: str) -> None:
    for name in GPU_HEADS:
        for device in DEVICES:
            times = [
                predict(device, form, implementation, Shape(name, n, HEADS[name])).predicted_ms
                for n in (1024, 4096, 16384, 32768, 65536, 131072)
            ]
            assert times == sorted(times)
            assert times[0] < times[-1] / 60


def allocated_peak(step: Callable[[], None]) -> int:
    """Bytes that torch's CPU allocator holds at most during a step, by the profiler's events."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("form", ["forward", "forward_backward"])
def test_materialised_memory_is_what_torch_allocates(form: str, softcap: float | None) -> None:
    shape = Shape("memory", 512, Head("memory", 4, 4096, softcap))
    inputs = make_inputs(shape, torch.bfloat16)
    step = Step(PROVIDERS["torch"](), form, inputs, with_entropy=False)
    predicted = extra_bytes("materialised", form, shape, "sm90")
    assert allocated_peak(step) == pytest.approx(predicted, rel=0.01)


def test_fused_forward_memory_is_what_the_launcher_allocates() -> None:
    """Under Triton's interpreter. (On a CPU the backward's products need copies of their own.)"""
    shape = Shape("memory", 256, Head("memory", 32, 256))
    inputs = make_inputs(shape, torch.bfloat16)
    head = OpHead.of(inputs.hidden, inputs.weight, inputs.targets)

    def step() -> None:
        linear_logprobs.linear_logprobs_fwd(head, with_entropy=False)

    results = 2 * 4 * 256  # logprobs and lse
    predicted = extra_bytes("fused", "forward", shape, "interpreter")
    assert predicted == 4 * (2 * 2 + 1) * 256  # two splits
    assert allocated_peak(step) == pytest.approx(predicted + results, rel=0.1)


def test_fused_memory_of_llama_by_hand() -> None:
    # 528 MiB of logits' gradient are 33792 columns of 8192 tokens; fp32 dhidden.
    chunk, dhidden, lse = 528 * 2**20, 4 * 8192 * 4096, 4 * 8192
    found = {form: extra_bytes("fused", form, LLAMA, "sm90") for form in FORMS}
    assert found["forward_backward"] == found["frozen_weight"] == chunk + dhidden + lse
    assert found["known_coefficients"] == chunk + dhidden
    # Two chunks of tokens, each of 8448 columns: the weight's gradient is summed in fp32.
    many = extra_bytes("fused", "known_coefficients", replace(LLAMA, tokens=65536), "sm90")
    assert many == chunk + 8 * dhidden + 4 * 8448 * 4096


def test_fused_memory_does_not_grow_with_the_logits() -> None:
    logits = {n: 2 * n * LLAMA.head.vocabulary for n in (8192, 131072)}
    for n, bf16_logits in logits.items():
        shape = replace(LLAMA, tokens=n)
        assert extra_bytes("fused", "forward_backward", shape, "sm90") < bf16_logits
        assert extra_bytes("fused", "forward", shape, "sm90") < 0.03e9
        # Materialised: three fp32 (N, V).
        materialised = extra_bytes("materialised", "forward_backward", shape, "sm90")
        assert materialised == 6 * bf16_logits


def test_what_does_not_fit_is_marked() -> None:
    a100 = DEVICES[0]
    assert predict(a100, "forward_backward", "fused", replace(LLAMA, tokens=131072)).fits
    assert not predict(a100, "forward_backward", "materialised", replace(LLAMA, tokens=131072)).fits


def test_command_writes_rows_that_say_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "H100 SXM", "--head", "qwen3-8b", "--tokens", "4096", "16384"]
    cost_model.main([*arguments, "--results", str(tmp_path)])
    assert capsys.readouterr().out.count("prediction") == 2  # the title of each table
    with (tmp_path / "cost_model.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(FORMS) * len(IMPLEMENTATIONS) * 2
    assert {row["kind"] for row in rows} == {cost_model.TITLE}
    assert "prediction" in cost_model.TITLE
    assert (tmp_path / "cost_model_qwen3-8b.png").stat().st_size > 0


def test_command_refuses_an_impossible_efficiency(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cost_model.main(["--efficiency", "1.5", "--results", str(tmp_path)])
    assert "expected a share in (0, 1], got 1.5" in capsys.readouterr().err
