"""Parts that ask whether all is right: the machine, the marked tests, `agro train`."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from agro_kernels import linear_logprobs, self_check
from agro_kernels.ops.dispatch import triton_import_error
from agro_train import cli
from agro_train.data.rows import read_jsonl
from benchmarks.gpu_kit.shapes import peak_flops
from benchmarks.gpu_kit.supervise import Report
from benchmarks.measure import timing
from benchmarks.measure.rows import error_text

PACKAGES = ("transformers", "accelerate", "peft", "datasets", "trl", "flash-attn", "vllm")


def machine(report: Report, folder: Path) -> None:
    """Reports facts of the machine, the card's peak, and what keeps Triton from running on it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = timing.machine_facts(device)
    facts |= {name: timing.version_or(name, "none") for name in PACKAGES}
    facts["c_compiler"] = next(filter(shutil.which, ("gcc", "clang")), "none")
    peak, trouble = None, ""
    if device == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        facts |= {"gpu_memory_gb": f"{memory / 1e9:.1f}", "cuda": str(torch.version.cuda)}
        peak, trouble = peak_flops(facts["gpu"]), triton_trouble()
    report("facts", facts=facts, peak_flops=peak, triton_trouble=trouble)


def triton_trouble() -> str:
    """What keeps Triton's kernels from running on this GPU; empty: they run. Triton compiles its
    launcher with the machine's C compiler and Python's headers, which a machine may lack."""
    if (absent := triton_import_error()) is not None:
        return error_text(absent)
    hidden, weight = (torch.randn(n, 64, device="cuda", dtype=torch.bfloat16) for n in (16, 256))
    targets = torch.zeros(16, device="cuda", dtype=torch.int64)
    try:
        linear_logprobs(hidden, weight, targets).sum().item()
    except Exception as error:  # whatever it is, the kit names it and goes on without Triton
        return error_text(error)
    return ""


def self_checked(report: Report, folder: Path) -> None:
    """`python -m agro_kernels`: errors against float64, and a first look at the speed."""
    lines, right = self_check.report()
    print("\n".join(lines))
    report("said", text=lines)
    if not right:
        raise SystemExit("agro_kernels finds its results wrong here")


class Outcomes:
    """Tells of each test as it ends, so that those of a run that was cut off count."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.report("test", test=report.nodeid, outcome=report.outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self.report("test", test=report.nodeid, outcome=report.outcome)


def marked_tests(report: Report, folder: Path, files: Sequence[str]) -> None:
    """`pytest -m gpu` of the files in which a test is marked."""
    # The machine's other plugins are no part of the tests, and some warn, which is an error there.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    words = ["-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider", *files]
    status = pytest.main(words, plugins=[Outcomes(report)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"pytest -m gpu: {status.name if hasattr(status, 'name') else status}")


def agro_train(report: Report, folder: Path, settings: Sequence[str]) -> None:
    """`agro train` with the settings, as its command line runs it. Reports the rows of its metrics
    that a step or an evaluation has written."""
    output = folder / "run"
    status = cli.main(["train", *settings, f"output_dir={output}"])
    if status:
        raise SystemExit(f"agro train ended with status {status}")
    for row in read_jsonl(output / "metrics.jsonl"):
        report("metrics", **row)
