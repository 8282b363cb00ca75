"""The Triton kernels compile for GPUs that are not here, into the code they were written for."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agro_kernels import tiles as configs

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

Report = list[dict[str, str]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The rows of predict.compile_report, from processes in which Triton is not interpreted: two at
    a time, with half of the targets each."""
    folder = tmp_path_factory.mktemp("compile")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.predict.compile_report", "--quick"]
    paths = {folder / f"{half[0]}.csv": half for half in (TARGETS[::2], TARGETS[1::2])}
    halves = [
        subprocess.Popen(
            [*command, "--csv", path, "--target", *half],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for path, half in paths.items()
    ]
    for process in halves:
        _, said = process.communicate()
        assert process.returncode == 0, said
    return [row for path in paths for row in csv.DictReader(path.read_text().splitlines())]


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(report: Report, target: str) -> None:
    cases = {row["case"].split()[0] for row in report if row["target"] == target}
    assert {"linear_logprobs_fwd", "linear_logprobs_fwd_merge", "linear_logprobs_bwd"} <= cases


def test_the_other_ops_kernels_compile(report: Report) -> None:
    cases = {row["case"].split()[0] for row in report}
    expected = {"token_gradients_kernel", "selective_logprobs_fwd_kernel"}
    assert {*expected, "write_known_entries_kernel", "target_logprobs_kernel"} <= cases


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", configs.TILES)
def test_every_row_with_16_bit_operands_is_in_the_report(
    report: Report, kernel: str, target: str
) -> None:
    """But for those that stand in where operands are not aligned: the full report has them."""
    rows = [
        row
        for row in configs.TILES[kernel][target.replace("_", "")][2]
        if row.aligned or row.tile.descriptors
    ] or configs.TILES[kernel][target.replace("_", "")][2]
    tiles = {
        f"{row.tile.block_n}x{row.tile.block_v}x{row.tile.block_d} {row.tile.num_warps} "
        f"{row.tile.num_stages}"
        for row in rows
    }
    cases = (row for row in report if row["target"] == target and kernel in row["case"].split())
    assert tiles == {row["tile"] for row in cases if row["case"].endswith("bf16")}


def test_no_register_is_spilled(report: Report) -> None:
    for row in report:
        assert int(row["spilled_bytes"]) == 0, row


def test_no_product_waits_for_the_one_before(report: Report) -> None:
    for row in report:
        assert int(row["serialised"]) == 0, row


def test_kept_logits_are_compiled_where_they_are_kept(report: Report) -> None:
    kept = {row["target"] for row in report if row["case"].startswith("dlogits_of_kept keep")}
    assert kept == {"sm_80", "sm_90", "gfx942"}


def test_shared_memory_fits(report: Report) -> None:
    for row in report:
        limit = configs.SHARED_BYTES[row["target"].replace("_", "")]
        assert int(row["shared_bytes"]) <= limit, row
        assert int(row["programs"]) >= 1, row


def test_small_hidden_sizes_have_two_programs_on_a_hopper(report: Report) -> None:
    rows = [row for row in report if row["target"] == "sm_90" and row["tile"] == "128x128x64 4 3"]
    assert len(rows) == 3  # forward, backward, backward of logprobs alone
    for row in rows:
        assert int(row["programs"]) == 2, row


def test_products_of_16_bit_operands_use_the_matrix_unit(report: Report) -> None:
    rows = head_rows(report, "bf16")
    assert {row["target"] for row in rows} == set(TARGETS)
    for row in rows:
        assert int(row["matrix"]) > 0, row


def test_products_of_fp32_operands_do_not_round_to_tf32(report: Report) -> None:
    rows = [row for row in head_rows(report, "fp32") if not row["target"].startswith("gfx")]
    assert rows
    for row in rows:
        assert int(row["matrix"]) == 0, row


def test_operands_are_fetched_by_tma_where_there_is_one(report: Report) -> None:
    for row in head_rows(report, "bf16"):
        by_tma = row["target"] in ("sm_90", "sm_100")
        assert row["loads"] == ("descriptor" if by_tma else "pointer"), row
        assert (int(row["tma_copies"]) > 0) == by_tma, row
        assert int(row["async_copies"]) == 0 or row["target"] == "sm_80", row
        assert int(row["async_copies"]) > 0 or row["target"] != "sm_80", row


def test_exponentials_are_the_hardware_ones(report: Report) -> None:
    for row in head_rows(report, "bf16") + head_rows(report, "fp32"):
        assert int(row["exp2"]) > 0, row


def head_rows(report: Report, dtype: str) -> Report:
    """The rows of the two GEMM kernels."""
    kernels = ("linear_logprobs_fwd ", "linear_logprobs_bwd ")
    return [
        row for row in report if row["case"].startswith(kernels) and row["case"].endswith(dtype)
    ]
