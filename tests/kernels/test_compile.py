"""The Triton kernels compile for GPUs that are not here, into the code they were written for."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agro_kernels import configs

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90", "gfx942")

# Bytes of spilled registers a thread that are known, and why they are accepted.
KNOWN_SPILLS = {
    # Softcap, entropy gradient and lse gradient in one call, which no training recipe has; a
    # smaller tile would cost the common calls more than this costs the rare one.
    ("sm_80", "linear_logprobs_bwd everything bf16"): 32,
    # Two registers of a kernel over B sequences, of no weight beside the head.
    ("sm_80", "group_statistics_kernel"): 8,
    ("sm_90", "group_statistics_kernel"): 8,
}

Report = list[dict[str, str]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The rows of benchmarks.compile_report, from a process in which Triton is not interpreted."""
    path = tmp_path_factory.mktemp("compile") / "report.csv"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", "--csv", str(path), "--target"]
    done = subprocess.run(
        [*command, *TARGETS], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(report: Report, target: str) -> None:
    cases = {row["case"].split()[0] for row in report if row["target"] == target}
    assert {"linear_logprobs_fwd", "linear_logprobs_fwd_merge", "linear_logprobs_bwd"} <= cases
    assert "token_gradients_kernel" in cases


def test_no_register_is_spilled_but_the_known_ones(report: Report) -> None:
    for row in report:
        allowed = KNOWN_SPILLS.get((row["target"], row["case"]), 0)
        assert int(row["spilled_bytes"]) <= allowed, row


def test_shared_memory_fits(report: Report) -> None:
    for row in report:
        limit = configs.SHARED_BYTES[row["target"].replace("_", "")]
        assert int(row["shared_bytes"]) <= limit, row


def test_products_of_16_bit_operands_use_the_matrix_unit(report: Report) -> None:
    rows = [row for row in report if row["case"].endswith("bf16")]
    assert {row["target"] for row in rows} == set(TARGETS)
    for row in rows:
        assert int(row["matrix"]) > 0, row


def test_products_of_fp32_operands_do_not_round_to_tf32(report: Report) -> None:
    rows = [row for row in report if row["case"].endswith("fp32") and row["target"] != "gfx942"]
    assert rows
    for row in rows:
        assert int(row["matrix"]) == 0, row


def test_exponentials_and_copies_are_the_hardware_ones(report: Report) -> None:
    for row in report:
        if row["case"].startswith(("linear_logprobs_fwd ", "linear_logprobs_bwd ")):
            assert int(row["exp2"]) > 0, row
            assert row["target"] == "gfx942" or int(row["async_copies"]) > 0, row
