"""What every benchmark measures with: shapes, times, memory, the facts of the machine."""

import torch

from benchmarks.measure import timing
from benchmarks.measure.shapes import CPU_SHAPES, HEADS, Head, Shape


def test_gemm_flop_is_two_n_d_v() -> None:
    assert Shape("hand", 3, Head("hand", 5, 7)).gemm_flop() == 210
    assert CPU_SHAPES["A"].gemm_flop() == 2 * 2048 * 576 * 49152
    assert all(name == head.name for name, head in HEADS.items())


def test_summary_of_times() -> None:
    found = timing.summary([6.0, 1.0, 3.0, 2.0, 5.0, 4.0])
    assert found == timing.Timing(n=6, median_s=3.5, min_s=1.0, p20_s=2.0, p80_s=5.0)
    assert timing.summary([2.0]) == timing.Timing(1, 2.0, 2.0, 2.0, 2.0)


def test_peak_bytes_sees_what_a_call_frees_again() -> None:
    size = 64 * 2**20

    def call() -> None:
        torch.ones(size, dtype=torch.uint8)

    call()
    slack = 2 * 2**20  # the kernel counts in batches
    assert size - slack <= timing.peak_bytes(call) < size + 8 * 2**20
    assert timing.peak_bytes(lambda: None) < 8 * 2**20


def test_machine_facts_name_the_machine() -> None:
    facts = timing.machine_facts()
    assert facts["torch"] == torch.__version__
    assert facts["cpu"]
    assert facts["commit"]
    assert facts["ours_instruction_set"]
