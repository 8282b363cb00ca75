"""The benchmarks' shared rooms, and bench_cpu from end to end on a tiny shape."""

import csv
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.head import correctness, gpu_rows, tables, turns
from benchmarks.head import cpu as bench_cpu
from benchmarks.head.cpu_rows import Case, Row
from benchmarks.head.floor import GemmFloor
from benchmarks.head.providers.base import FORM_GEMMS, FORMS, Results, Step, make_inputs
from benchmarks.head.providers.ours import Ours
from benchmarks.head.providers.plain_torch import PlainTorch
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.head.turns import Job, Measured, in_turn
from benchmarks.measure import plots, timing
from benchmarks.measure.rows import column_names, texts
from benchmarks.measure.shapes import (
    ACCURACY_SHAPE,
    CPU_SHAPES,
    HEADS,
    SMOKE_SHAPE,
    SMOKE_SOFTCAP_SHAPE,
    Head,
    Shape,
)

BENCHMARKS = Path(bench_cpu.__file__).parents[1]


def smoke_job(provider: str, form: str = "forward") -> Job:
    return Job(provider, SMOKE_SHAPE, torch.float32, form, False, "highest", 1, smoke=True)


# --- Shapes, inputs, timing -----------------------------------------------------------------------


def test_gemm_flop_is_two_n_d_v() -> None:
    assert Shape("hand", 3, Head("hand", 5, 7)).gemm_flop() == 210
    assert CPU_SHAPES["A"].gemm_flop() == 2 * 2048 * 576 * 49152
    assert all(name == head.name for name, head in HEADS.items())


def test_inputs_have_certain_tokens_and_the_asked_spread() -> None:
    inputs = make_inputs(ACCURACY_SHAPE, torch.float32, logit_std=5.0)
    logprobs_all = (inputs.hidden @ inputs.weight.T).log_softmax(-1)
    certain = logprobs_all.gather(1, inputs.targets[:, None]).exp().squeeze(1) > 0.5
    assert certain[::2].float().mean() > 0.5 and not certain[1::2].any()
    assert 4.5 < (inputs.hidden[1::2] @ inputs.weight.T).std() < 5.5
    again = make_inputs(ACCURACY_SHAPE, torch.float32, logit_std=5.0)
    assert torch.equal(inputs.weight, again.weight) and torch.equal(inputs.hidden, again.hidden)


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
    assert facts["torch"] == torch.__version__ and facts["cpu"] and facts["commit"]
    assert facts["ours_instruction_set"]


# --- Providers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_floor_runs_exactly_the_products_of_the_form(form: str) -> None:
    floor = GemmFloor(form, make_inputs(SMOKE_SHAPE, torch.float32), blocks=(100, 200))
    floor.tune(lambda call: timing.time_call(call))
    with FlopCounterMode(display=False) as counter:
        floor()
    assert counter.get_total_flops() == len(FORM_GEMMS[form]) * SMOKE_SHAPE.gemm_flop()


# Importing torch's compiler, which torch.compile does even where it then compiles nothing.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("shape", [SMOKE_SHAPE, SMOKE_SOFTCAP_SHAPE], ids=lambda s: s.name)
@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_compute_the_same_function(name: str, shape: Shape) -> None:
    reason = PROVIDERS[name].missing()
    if reason is not None:
        pytest.skip(reason)
    provider = PROVIDERS[name]()
    if provider.needs_compiler or "cpu" not in provider.devices:
        pytest.skip("runs compiled or on a GPU only")
    tested = 0
    with torch.compiler.set_stance("force_eager"):
        for form in FORMS:
            for with_entropy in (False, True)[: 1 if form == "known_coefficients" else 2]:
                inputs = make_inputs(shape, torch.float32)
                if provider.reason_against(form, with_entropy, inputs) is None:
                    step = Step(provider, form, inputs, with_entropy=with_entropy)
                    found = correctness.errors(step)
                    assert correctness.beyond_limits(found, torch.float32) is None, form
                    assert correctness.objection(step, torch.float32) is None, form
                    assert (found.dhidden_error is None) == (form == "forward")
                    asked = form in ("forward_backward", "known_coefficients")
                    assert (found.dweight_error is not None) == asked
                    assert (found.entropy_error is not None) == with_entropy
                    tested += 1
    assert tested == 0 if shape.head.softcap and not provider.has_softcap else tested >= 4


def test_step_refuses_what_has_no_meaning() -> None:
    inputs = make_inputs(SMOKE_SHAPE, torch.float32)
    with pytest.raises(ValueError, match="form: expected one of"):
        Step(PlainTorch(), "backward", inputs, with_entropy=False)
    with pytest.raises(ValueError, match="no entropy"):
        Step(PlainTorch(), "known_coefficients", inputs, with_entropy=True)


# --- Correctness ----------------------------------------------------------------------------------


def spoil_logprobs(results: Results) -> None:
    assert results.logprobs is not None
    results.logprobs += 0.1


def spoil_entropy(results: Results) -> None:
    assert results.entropy is not None
    results.entropy += 0.1


def spoil_dhidden(results: Results) -> None:
    assert results.dhidden is not None
    results.dhidden[-1] += 0.1 * results.dhidden.norm()


def spoil_dweight(results: Results) -> None:
    assert results.dweight is not None
    results.dweight *= 0.9


@pytest.mark.parametrize("spoil", [spoil_logprobs, spoil_entropy, spoil_dhidden, spoil_dweight])
@pytest.mark.parametrize("shape", [SMOKE_SHAPE, SMOKE_SOFTCAP_SHAPE], ids=lambda s: s.name)
def test_a_wrong_result_is_objected_to(spoil: Callable[[Results], None], shape: Shape) -> None:
    step = Step(Ours(), "forward_backward", make_inputs(shape, torch.float32), with_entropy=True)
    step()
    assert correctness.objection(step, torch.float32) is None
    spoil(step.results())  # views of what the step holds
    assert (correctness.objection(step, torch.float32) or "").startswith("wrong:")


def test_nan_is_beyond_the_limits() -> None:
    found = correctness.Errors(logprob_error=float("nan"))
    assert correctness.beyond_limits(found, torch.bfloat16) is not None


# --- Processes in turn ----------------------------------------------------------------------------


def test_processes_take_turns_and_say_why_they_cannot() -> None:
    said: list[str] = []
    jobs = [smoke_job("torch", "forward_backward"), smoke_job("nonsense"), smoke_job("floor")]
    plain, nonsense, floor = in_turn(jobs, 3, say=said.append)
    assert (plain.status, len(plain.times_s), floor.status, len(floor.times_s)) == ("ok", 3) * 2
    assert nonsense.status == "failed: KeyError: 'nonsense'" and nonsense.times_s == []
    assert "KeyError" in said[0] and len(said) == 1
    n, d, v = SMOKE_SHAPE.tokens, SMOKE_SHAPE.head.hidden_size, SMOKE_SHAPE.head.vocabulary
    assert plain.result_bytes == 4 * (n + n * d + v * d)
    cannot = in_turn([dataclasses.replace(smoke_job("torch_lce"), with_entropy=True)], 1)[0]
    assert cannot.status == "cannot: gives no entropy"


def test_a_slow_provider_is_timed_once() -> None:
    slow = in_turn([smoke_job("torch")], 3, max_call_s=0.0)[0]
    assert slow.status.startswith("slow: timed once") and len(slow.times_s) == 1


@pytest.mark.parametrize(
    "limit_s, status",
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
    turns._prepare(measured, job, limit_s)
    assert measured.status == status and len(measured.times_s) == (status != "ok")


# --- bench_cpu ------------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict[str, str]]:
    return plots.read_csv(folder / "bench_cpu.csv")


def test_bench_cpu_smoke(tmp_path: Path) -> None:
    # As a command: its processes import its main module, and pytest takes long to import.
    command = [sys.executable, "-m", "benchmarks.head.cpu", "--smoke", "--threads", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=BENCHMARKS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows, printed = rows_of(tmp_path), done.stdout
    cases = {(row["dtype"], row["form"], row["entropy"]) for row in rows}
    assert cases == {("fp32", form, "no") for form in FORMS} | {("bf16", "forward_backward", "yes")}
    for dtype, form, entropy in cases:
        case = [
            row
            for row in rows
            if (row["dtype"], row["form"], row["entropy"]) == (dtype, form, entropy)
        ]
        # Every peer has a row in every case, if only to say why it has no time.
        assert {row["provider"] for row in case} == {"ours", "floor", *bench_cpu.PEERS}
        ours = next(row for row in case if row["provider"] == "ours")
        assert ours["status"] == "ok" and ours["n"] == "2" and "floor" in ours["in_turn_with"]
        floor = next(row for row in case if row["provider"] == "floor" and row["in_turn_with"])
        assert float(ours["relative"]) == pytest.approx(
            float(ours["median_s"]) / float(floor["median_s"]), rel=1e-3
        )
        assert float(ours["peak_mb"]) >= 0 and ours["instruction_set"] and ours["commit"]
        assert (ours["dhidden_error"] != "") and (
            (ours["entropy_error"] != "") == (entropy == "yes")
        )
        for row in case:
            assert (row["median_s"] != "") == (row["status"] == "ok"), row
    for name in bench_cpu.PEERS:
        reason = PROVIDERS[name].missing()
        assert reason is None or f"{name}: {reason}" in printed
        assert reason is None or {r["status"] for r in rows if r["provider"] == name} == {reason}
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    assert plots == [
        "bench_cpu_memory_bf16_entropy.png",
        "bench_cpu_memory_fp32.png",
        "bench_cpu_time_bf16_entropy.png",
        "bench_cpu_time_fp32.png",
    ]


def test_bench_cpu_lists_what_the_budget_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    options = ["--smoke", "--out", str(tmp_path), "--budget-minutes", "0", "--providers", "torch"]
    assert bench_cpu.main(options) == 0
    rows = rows_of(tmp_path)
    assert {row["provider"] for row in rows} == {"ours", "floor", "torch"}
    assert {row["status"] for row in rows} == {"not run: time budget"}


def test_bench_cpu_refuses_few_repetitions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_cpu.parse(["--repetitions", "6"])
    assert "at least 7" in capsys.readouterr().err


def row_of(bench: bench_cpu.Bench, shape: Shape, name: str, seconds: float) -> Row:
    case = Case(shape, "bf16", "forward", False)
    job = bench.jobs(case, name, ["highest"])[0]
    measured = Measured(job, times_s=[seconds])
    return bench.row(case, measured, [])


def test_finalists_are_the_fastest_on_the_first_shape(tmp_path: Path) -> None:
    bench = bench_cpu.Bench(bench_cpu.parse(["--finalists", "1"]), tmp_path / "rows.csv")
    times = {"torch": 3.0, "torch_compile": 1.0, "checkpointed_loop": 5.0, "torch_lce": 9.0}
    bench.rows = [row_of(bench, CPU_SHAPES["A"], *time) for time in times.items()]
    on_b = Case(CPU_SHAPES["B"], "bf16", "forward", False)
    # The fastest, and the fastest of those that do not store the logits.
    assert bench.finalists(on_b) == [
        ("torch_compile", "highest"),
        ("checkpointed_loop", "highest"),
    ]
    # The fastest on the first shape is expected to be it here too, and goes into its turns.
    expected = bench.expected_best(on_b, bench.peer_jobs(on_b))
    assert expected is not None
    assert expected.label() == "torch_compile"
    on_a = dataclasses.replace(on_b, shape=CPU_SHAPES["A"])
    assert bench.finalists(on_a) is None
    assert bench.expected_best(on_a, bench.peer_jobs(on_a)) is None
    assert bench.finalists(dataclasses.replace(on_b, dtype="fp32")) is None
    # Two rows of a peer, alone and in turns, are one finalist.
    bench.rows.append(row_of(bench, CPU_SHAPES["A"], "torch_compile", 1.1))
    bench.options.finalists = 2
    names = [name for name, _ in bench.finalists(on_b) or []]
    assert names == ["torch_compile", "torch", "checkpointed_loop"]
    # By default everybody runs, and the fastest on the first shape still goes into its turns.
    bench.options.finalists = None
    assert bench.finalists(on_b) is None
    expected = bench.expected_best(on_b, bench.peer_jobs(on_b))
    assert expected is not None and expected.label() == "torch_compile"


def test_precisions_that_are_asked_for(tmp_path: Path) -> None:
    peers = ["--providers", "torch", "checkpointed_loop"]
    on_b = Case(CPU_SHAPES["B"], "fp32", "forward", False)

    def labels(*options: str) -> list[str]:
        bench = bench_cpu.Bench(bench_cpu.parse([*peers, *options]), tmp_path / "rows.csv")
        jobs = bench.peer_jobs(on_b)
        bf16 = bench.peer_jobs(dataclasses.replace(on_b, dtype="bf16"))
        assert [job.precision for job in bf16] == ["highest"] * 2  # they multiply in bf16
        floor = [bench.floor_job(on_b)] if len(bench.options.precisions) == 1 else []
        return [job.label() for job in [*jobs, *floor]]

    both = ["torch", "torch@medium", "checkpointed_loop", "checkpointed_loop@medium"]
    assert labels() == both
    only = ["torch@medium", "checkpointed_loop@medium", "floor@medium"]
    assert labels("--precisions", "medium") == only
    assert labels("--precisions", "medium", "--smoke") == only


@pytest.mark.parametrize("loop_s", [2.0, 0.5])
def test_a_peer_faster_than_the_expected_one_takes_turns_as_well(
    loop_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_cpu.Bench(bench_cpu.parse(["--finalists", "1"]), tmp_path / "rows.csv")
    times = {"torch_compile": 1.0, "checkpointed_loop": loop_s, "floor": 0.9, "ours": 0.8}
    bench.rows = [row_of(bench, CPU_SHAPES["A"], "torch_compile", 1.0)]
    bench.rows += [row_of(bench, CPU_SHAPES["A"], "checkpointed_loop", 3.0)]
    groups = []

    def measure(case: Case, jobs: list[Job]) -> list[Row]:
        groups.append([job.label() for job in jobs])
        return [row_of(bench, case.shape, job.provider, times[job.provider]) for job in jobs]

    monkeypatch.setattr(bench, "measure", measure)
    bench.run(Case(CPU_SHAPES["B"], "bf16", "forward", False))
    turns = [["checkpointed_loop"], ["ours", "torch_compile", "floor"]]
    if loop_s < 1.0:
        turns.append(["ours", "checkpointed_loop", "floor"])
    assert groups == turns


def test_known_coefficients_are_compared_with_the_peers_forward_and_backward(
    tmp_path: Path,
) -> None:
    bench = bench_cpu.Bench(bench_cpu.parse([]), tmp_path / "rows.csv")
    row = dataclasses.replace(row_of(bench, CPU_SHAPES["A"], "torch", 2.0), form="forward_backward")
    bench.rows = [row]
    case = Case(CPU_SHAPES["A"], "bf16", "known_coefficients", False)
    assert bench.best_peer(case, []) is row
    job = bench.jobs(case, "torch", ["highest"])[0]
    assert "see forward_backward" in (bench.reason_against(case, job) or "")
    bench.rows = []  # nothing stands for it: it runs
    assert bench.reason_against(case, job) is None


def test_table_compares_within_the_same_turns(tmp_path: Path) -> None:
    bench = bench_cpu.Bench(bench_cpu.parse([]), tmp_path / "rows.csv")

    def turn(name: str, seconds: float, others: str) -> Row:
        row = row_of(bench, CPU_SHAPES["B"], name, seconds)
        return dataclasses.replace(row, in_turn_with=others, peak_mb=12.0, n=7)

    bench.rows = [
        turn("checkpointed_loop", 0.75, ""),
        turn("ours", 2.0, "torch_compile floor"),
        turn("torch_compile", 1.0, "ours floor"),
        turn("floor", 4.0, "ours torch_compile"),
        turn("ours", 0.6, "checkpointed_loop floor"),
        turn("checkpointed_loop", 0.9, "ours floor"),
        turn("floor", 0.5, "ours checkpointed_loop"),
    ]
    bench.relate(Case(CPU_SHAPES["B"], "bf16", "forward", False))
    *_, line = tables.table(bench.rows, "no")
    # The fastest is the loop, which takes turns with the second process of ours.
    assert line.split("|")[1:-1] == [
        " forward, bf16, B ", " 0.6 s ", " 1.20 ", " 12 MB ",
        " `checkpointed_loop` ", " 1.50 ", " 12 MB ", " `checkpointed_loop` ", " 1.50 ", " 12 MB ",
    ]  # fmt: skip
    assert tables.table(bench.rows, "yes")[2:] == []


def test_table_of_known_coefficients_takes_the_peers_own_turns(tmp_path: Path) -> None:
    bench = bench_cpu.Bench(bench_cpu.parse([]), tmp_path / "rows.csv")

    def timed(name: str, form: str, seconds: float, others: str) -> Row:
        row = row_of(bench, CPU_SHAPES["A"], name, seconds)
        changes = {"form": form, "in_turn_with": others, "relative": 1.0}
        return dataclasses.replace(row, peak_mb=3.0, n=7 if others else 1, **changes)

    bench.rows = [
        timed("torch_compile", "forward_backward", 1.0, "ours floor"),
        timed("torch", "forward_backward", 2.0, ""),
        timed("ours", "known_coefficients", 0.5, "torch_compile floor"),
        timed("torch_compile", "known_coefficients", 1.1, "ours floor"),
        timed("checkpointed_loop", "forward_backward", 4.0, ""),
    ]
    *_, line = tables.table(bench.rows, "no")
    assert line.split("|")[5:7] == [" `torch_compile` ", " 2.20 "]
    # Alone, and called once.
    assert line.split("|")[8:10] == [" `checkpointed_loop` ", " ~8.00* "]
    headings, _, line = tables.peers_table(bench.rows, "no")
    assert headings == "| case | ours | `torch` | `torch_compile` | `checkpointed_loop` |"
    assert line == "| known coefficients, bf16, A | 0.5 s | ~4.00* | 2.20 | ~8.00* |"
    # A slower peer that took turns with ours is over ours of those turns.
    bench.rows += [
        timed("ours", "known_coefficients", 0.4, "torch floor"),
        timed("torch", "known_coefficients", 1.2, "ours floor"),
    ]
    bench.rows.remove(next(row for row in bench.rows if row.provider == "torch"))
    *_, line = tables.peers_table(bench.rows, "no")
    assert line == "| known coefficients, bf16, A | 0.5 s | 3.00 | 2.20 | ~8.00* |"


def test_table_of_one_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = bench_cpu.Bench(bench_cpu.parse([]), tmp_path / "rows.csv")
    ours, torch_row, medium = (
        dataclasses.replace(row_of(bench, CPU_SHAPES["A"], name, seconds), dtype="fp32")
        for name, seconds in (("ours", 1.0), ("torch", 3.0), ("torch", 2.0))
    )
    bench.rows = [ours, torch_row, dataclasses.replace(medium, precision="medium")]
    bench.write()
    for precision, ratio in (("highest", "~3.00"), ("medium", "~2.00")):
        arguments = ["--csv", str(bench.path), "--peers", "--precision", precision]
        assert tables.main(arguments) == 0
        assert ratio in capsys.readouterr().out.splitlines()[-1]


def test_table_of_a_gpu_has_a_column_for_each_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(provider: str, tokens: int, ms: float | None, mb: float | None) -> gpu_rows.Row:
        return gpu_rows.Row(
            "llama3-8b", "forward", tokens, "whole", provider, False, "bf16", 4096, 128256,
            "ok" if ms else "out of memory", median_ms=ms, extra_mb=mb,
        )  # fmt: skip

    path = tmp_path / "rows.csv"
    rows = [
        timed("floor", 4096, 2.0, None), timed("ours", 4096, 2.5, 1.0),
        timed("torch", 4096, 5.0, 4200.0), timed("cce", 4096, 3.0, 0.0),
        timed("floor", 8192, 4.0, None), timed("ours", 8192, 5.0, 2.0),
        timed("torch", 8192, None, None),
        timed("ours", 99, 1.0, 1.0),  # no floor: half a case
    ]  # fmt: skip
    lines = [texts(row) for row in rows]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([column_names(gpu_rows.Row), *lines])
    assert tables.main(["--gpu", "--csv", str(path)]) == 0
    headings, _, *table = capsys.readouterr().out.splitlines()
    assert headings.endswith("| `torch` | `cce` |")
    assert table == [
        "| forward, llama3-8b, 4,096 tokens | 2.5 ms | 1.25 | 1 MB | 2.00, 4,200 MB | 1.20, 0 MB |",
        "| forward, llama3-8b, 8,192 tokens | 5 ms | 1.25 | 2 MB |  |  |",
    ]
    with pytest.raises(SystemExit):
        tables.main(["--gpu", "--peers"])


def test_append_keeps_the_rows_of_other_cases(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    first = bench_cpu.Bench(bench_cpu.parse([]), path)
    first.facts |= {"cpu": "another"}
    first.rows = [row_of(first, CPU_SHAPES[name], "torch", 2.0) for name in "AB"]
    first.write()
    options = ["--append", "--shapes", "B", "--dtypes", "bf16", "--forms", "forward"]
    second = bench_cpu.Bench(bench_cpu.parse(options), path)
    second.keep_other_cases()
    # That of B is to be measured again.
    assert [row.case() for row in second.rows] == [first.rows[0].case()]
    second.rows.append(row_of(second, CPU_SHAPES["B"], "torch", 3.0))
    second.write()
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]
    found = [(row["shape"], row["cpu"] == "another", row["n"]) for row in plots.read_csv(path)]
    assert found == [("A", True, "1"), ("B", False, "1")]


def test_readme_names_every_file() -> None:
    readme = (BENCHMARKS / "README.md").read_text()
    for path in BENCHMARKS.glob("[a-z]*.py"):
        assert path.name in readme, path
