"""The kit for a GPU runs dry on a CPU, keeps its budget, and loses nothing where a part fails."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_kit import __main__ as command
from benchmarks.gpu_kit import packages, shapes
from benchmarks.gpu_kit.kit import Kit
from benchmarks.gpu_kit.parts import LLAMA_LORA, SMOLLM2_FULL, Job, Part, marked_files, table
from benchmarks.gpu_kit.results import Row, describe, row_of
from benchmarks.gpu_kit.supervise import Outcome, run_part
from benchmarks.measure.rows import read_csv

ROOT = Path(__file__).parents[2]
PARTS = "tests.benchmarks.kit_parts"


def test_the_whole_kit_runs_dry(tmp_path: Path) -> None:
    """As it is typed, in its own process: the libraries are then imported once for all parts."""
    again = ("agro_train_preset", "smollm2_135m_lora")  # dry they are what others are
    names = [part.name for part in table(dry=True) if part.name not in again]
    words = ["--dry", "--budget-s", "3000", "--out", str(tmp_path / "kit"), "--parts", *names]
    command_line = [sys.executable, "-m", "benchmarks.gpu_kit", *words]
    done = subprocess.run(command_line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["part"]: row for row in read_csv(tmp_path / "kit" / "gpu_kit.csv")}
    assert list(rows) == names
    without_trl = packages.version("trl") is None
    for name, row in rows.items():
        expected = "skipped" if without_trl and name.startswith("trl") else "ok"
        assert row["status"] == expected, done.stdout
        assert row["transformers"] == packages.version("transformers")
        assert row["cpu"]
        if not row["shape"]:
            continue
        assert row["shape"] == "dry"
        assert int(row["steps"]) == 1
        split = [float(row[f"{phase}_s"]) for phase in ("generate", "score", "update", "other")]
        assert min(split[:3]) > 0
        assert sum(split) == pytest.approx(float(row["step_s"]), rel=1e-3)
        assert float(row["completion_tokens"]) == 2 * 2 * 4
        assert float(row["tokens_per_s"]) > 0
        assert float(row["update_tflops"]) > 0
        assert row["update_mfu"] == ""  # of a CPU there is no datasheet
        assert float(row["planned_update_gb" if row["trainer"] == "agro" else "peak_gb"]) > 0
    assert rows["llama3_8b_lora"]["weights"] > rows["llama3_8b_lora"]["trained"]
    assert int(rows["marked_tests"]["skipped"]) > 0
    assert int(rows["agro_train_tiny"]["steps"]) == 1
    everything = json.loads((tmp_path / "kit" / "gpu_kit.json").read_text())
    assert everything["dry"] is True
    assert everything["what"].startswith("dry")
    assert [part["part"] for part in everything["parts"]] == names
    assert "all right" in everything["parts"][-1]["last_lines"]


# --- One part -------------------------------------------------------------------------------------


def run(name: str, folder: Path, limit_s: float = 120.0, **arguments: Any) -> Outcome:
    return run_part(name, f"{PARTS}:{name}", arguments, folder, limit_s, fork=False)


def test_a_part_reports_and_leaves_no_process_behind(tmp_path: Path) -> None:
    outcome = run("leaves_a_child", tmp_path, answer=42)
    assert (outcome.status, outcome.detail) == ("ok", "")
    (report,) = outcome.reports
    assert report["answer"] == 42
    assert Path(report["folder"]).is_dir()
    status = Path(f"/proc/{report['pid']}/status")
    for _ in range(600):  # a signal reaches a process when it is next scheduled
        # Until the system's first process has waited for it, it is a zombie.
        if not status.exists() or "zombie" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the part's child is still there")


def test_a_part_that_fails_keeps_its_reports_and_last_lines(tmp_path: Path) -> None:
    outcome = run("fails", tmp_path)
    assert (outcome.status, outcome.detail) == ("failed", "RuntimeError: CUDA out of memory")
    assert [report["kind"] for report in outcome.reports] == ["before"]
    assert "a line of its output" in outcome.last_lines
    assert "CUDA out of memory" in (tmp_path / "logs" / "fails.log").read_text()


def test_a_part_is_ended_at_its_limit(tmp_path: Path) -> None:
    outcome = run("hangs", tmp_path, limit_s=0.5)
    assert (outcome.status, outcome.reports) == ("timeout", [])
    assert outcome.seconds < 60


def test_a_part_may_run_without_triton(tmp_path: Path) -> None:
    name = f"{PARTS}:tells_of_triton"
    outcome = run_part("hidden", name, {}, tmp_path, 120.0, fork=False, without_triton=True)
    assert outcome.reports == [{"kind": "triton", "there": False}]


# --- All parts ------------------------------------------------------------------------------------


def part_of(name: str, needs: str = "") -> Part:
    return Part(name, "for a test", f"{PARTS}:{name}", 120.0, needs=needs)


def test_what_the_budget_has_no_room_for_is_skipped_by_name(tmp_path: Path) -> None:
    kit = Kit(tmp_path, dry=False, began=time.monotonic() - 595.0, budget_s=600.0)
    kit.run(part_of("hangs"))
    kit.run(part_of("fails", needs="no-such-package"))
    rows = read_csv(tmp_path / "gpu_kit.csv")
    assert [(row["part"], row["status"], row["detail"]) for row in rows] == [
        ("hangs", "skipped", "the budget of 600 s is spent"),
        ("fails", "skipped", "the package no-such-package is not installed"),
    ]
    assert kit.status() == 0


def test_results_are_there_after_each_part_and_a_failure_is_told(tmp_path: Path) -> None:
    kit = Kit(tmp_path, dry=False, began=time.monotonic(), budget_s=600.0)
    kit.run(part_of("fails"))
    assert kit.status() == 1
    (part,) = json.loads((tmp_path / "gpu_kit.json").read_text())["parts"]
    assert part["status"] == "failed"
    assert part["last_lines"][-1] == "RuntimeError: CUDA out of memory"
    assert part["reports"][0]["kind"] == "before"


def test_parts_have_names_of_their_own_and_functions_that_exist() -> None:
    for dry in (False, True):
        parts = table(dry=dry)
        assert len({part.name for part in parts}) == len(parts)
        assert parts[0].name == "machine"
        assert {part.function.partition(":")[0] for part in parts} == {
            f"benchmarks.gpu_kit.{name}" for name in ("checks", "agro_steps", "trl_steps")
        }
    assert [part.name for part in table(dry=True)] == [part.name for part in table(dry=False)]
    names = [Path(path).name for path in marked_files()]
    assert {"test_cuda.py", "test_triton_linear_logprobs.py"} <= set(names)


# --- Rows and work --------------------------------------------------------------------------------


def outcome_of(reports: list[dict[str, Any]], status: Any = "ok") -> Outcome:
    return Outcome(status, "", 9.0, reports, [])


def test_a_row_has_medians_rates_and_shares_of_the_peak() -> None:
    step = {"kind": "step", "generate_s": 5.0, "score_s": 1.0, "completion_tokens": 1000}
    peaks = {"generate_peak_gb": 20.0, "score_peak_gb": 18.0, "update_peak_gb": 30.0}
    reports = [
        {
            "kind": "model",
            "shape": "llama3-8b",
            "settings": "",
            "weights": 8e9,
            "trained": 4e7,
            "planned_gb": {"generate": 19.0, "score": 18.0, "update": 29.0},
            "work": {"generate": 1e14, "score": 2e14, "update": 3e14},
        },
        {**step, **peaks, "kind": "warm_up", "step_s": 60.0, "update_s": 50.0},
        *({**step, **peaks, "step_s": s, "update_s": s - 7.0} for s in (10.0, 9.0, 20.0)),
    ]
    part = Part("llama", "", "", 60.0, {"job": LLAMA_LORA})
    row = row_of(part, outcome_of(reports, "timeout"), peak_flops=1e15)
    assert (row.status, row.steps, row.warm_up_s) == ("timeout", 3, 60.0)
    assert (row.step_s, row.fastest_step_s, row.slowest_step_s) == (10.0, 9.0, 20.0)
    assert (row.generate_s, row.score_s, row.update_s, row.other_s) == (5.0, 1.0, 3.0, 1.0)
    assert (row.tokens_per_s, row.generated_tokens_per_s) == (100.0, 200.0)
    assert (row.peak_gb, row.update_peak_gb, row.planned_update_gb) == (30.0, 30.0, 29.0)
    assert row.update_tflops == pytest.approx(100.0)
    assert row.update_mfu == pytest.approx(0.1)
    assert row.step_mfu == pytest.approx(0.06)
    assert "MFU 6.0% of the step, 10.0% of the update" in describe(row)
    assert row_of(part, outcome_of(reports), peak_flops=None).update_mfu is None


def test_tests_and_runs_that_were_cut_off_count_as_far_as_they_came() -> None:
    outcomes = ["passed", "passed", "failed", "skipped"]
    reports = [{"kind": "test", "test": f"t{i}", "outcome": o} for i, o in enumerate(outcomes)]
    row = row_of(Part("tests", "", "", 60.0), outcome_of(reports, "timeout"), None)
    assert (row.passed, row.failed, row.skipped) == (2, 1, 1)
    metrics = [
        {"kind": "metrics", "step": 0, "eval_accuracy": 0.125},
        {"kind": "metrics", "step": 1, "time_s": 2.0, "tokens_per_s": 50.0, "memory_gb": 1.5},
        {"kind": "metrics", "step": 1, "eval_accuracy": 0.5},
    ]
    row = row_of(Part("train", "", "", 60.0), outcome_of(metrics), None)
    assert (row.steps, row.step_s, row.tokens_per_s, row.peak_gb) == (1, 2.0, 50.0, 1.5)
    assert row.detail == "accuracy on held-out prompts from 0.125 to 0.500"


@pytest.mark.parametrize(
    ("shape", "millions"),
    [
        ("smollm2-135m", 134.5),
        ("smollm2-1.7b", 1711.3),
        ("llama3-1b", 1235.7),
        ("llama3-3b", 3212.6),
        ("llama3-8b", 8030.0),
    ],
)
def test_shapes_have_as_many_weights_as_their_models(shape: str, millions: float) -> None:
    config = shapes.architecture(shape)
    outside = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    assert (shapes.linear_weights(config) + outside) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_the_random_model_has_its_shape_and_likely_tokens() -> None:
    config = shapes.architecture("dry")
    model = shapes.random_model(config, "float32", "cpu")
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings()
    assert sum(m.weight.numel() for m in linear if m is not head) == shapes.linear_weights(config)
    logits = model(torch.arange(2, 130)[None]).logits.detach()
    assert 0.7 < float(logits.std()) / shapes.LOGIT_STD < 1.4
    tokenizer = shapes.build_tokenizer(config.vocab_size)
    assert tokenizer("w7 w200")["input_ids"] == [7, 200]
    assert tokenizer.decode([7, 200]) == "w7w200"


def test_work_is_what_no_trainer_can_avoid() -> None:
    config = shapes.architecture("dry")  # D 32, V 211, two layers
    job = Job("agro", ("dry",), False, 1, 2, 3, 4, groups_at_once=1, steps=1)
    tokens = 3 + 2 * (4 - 1)  # the prompt once; the last token of a completion is not read
    products = 2 * shapes.linear_weights(config) * tokens + 2 * 32 * 211 * 2 * 4
    attention = 4 * 2 * 32 * (9 / 2 + 2 * (3 * 4 + 16 / 2))
    found = shapes.work(config, job)
    assert found.generate == products + attention
    assert found.score == 2 * found.generate  # by policy and reference
    assert found.update == 3 * found.generate
    adapter = shapes.work(config, Job("trl", ("dry",), True, 1, 2, 3, 4, 1, 1))
    assert adapter.score == found.generate
    assert adapter.update == 2 * products + 3 * attention


def test_a_card_has_the_peak_of_its_datasheet() -> None:
    assert shapes.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert shapes.peak_flops("NVIDIA H200") == 989.4e12
    assert shapes.peak_flops("NVIDIA A100-PCIE-40GB") == 312e12
    assert shapes.peak_flops("AMD Instinct MI300X") == 1307.4e12
    assert shapes.peak_flops("NVIDIA H100 PCIe") is None  # less than the H100 of the table
    assert shapes.peak_flops("NVIDIA GeForce RTX 4090") is None


def test_micro_batches_are_whole_groups() -> None:
    assert SMOLLM2_FULL.token_budget == 4 * (128 + 8 * 127)
    for job in (SMOLLM2_FULL, LLAMA_LORA, SMOLLM2_FULL.dry()):
        assert job.prompts % job.groups_at_once == 0


# --- What cannot work -----------------------------------------------------------------------------


def refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], environment: dict[str, str]
) -> str:
    assert command.main(arguments) == 2
    assert dict(os.environ) == environment
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_work_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ)
    wheels = ["--wheels", str(tmp_path / "none")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU: expected one" in refused(wheels, capsys, before)
    words = ["--dry", *wheels]
    assert "got nosuch" in refused([*words, "--parts", "nosuch"], capsys, before)
    (tmp_path / "file").write_text("")
    out = ["--out", str(tmp_path / "file" / "kit")]
    assert "that can be written, got" in refused([*words, *out], capsys, before)
    (tmp_path / "kit" / "logs").mkdir(parents=True)
    out = ["--out", str(tmp_path / "kit")]
    assert "new or empty folder" in refused([*words, *out], capsys, before)
    installed = packages.version
    monkeypatch.setattr(packages, "version", lambda n: None if n == "rich" else installed(n))
    assert "packages: expected rich for" in refused(words, capsys, before)
    assert not (tmp_path / "none").exists()


def test_packages_are_those_of_pyproject() -> None:
    wanted = packages.requirements()
    assert any(line.startswith("transformers>=") for line in wanted)
    assert any(line.startswith("pytest>=") for line in wanted)
    assert packages.absent(wanted) == []
    assert packages.older(wanted) == []
    assert packages.absent(["no-such-package-as-this>=1"]) == ["no-such-package-as-this"]
    has = packages.version("rich")
    assert packages.older(["rich>=999.1"]) == [f"rich {has}, wanted >=999.1"]
    assert not [line for line in wanted if line.startswith(packages.FOUND)]


def test_carried_wheels_are_installed_where_packages_lack_and_never_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rich-15.0.0-py3-none-any.whl").touch()
    installed = packages.version
    monkeypatch.setattr(packages, "version", lambda n: None if n == "rich" else installed(n))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    called: list[tuple[str, ...]] = []
    chosen = [{"metadata": {"name": "rich", "version": "15.0.0"}}]

    def pip(*arguments: str) -> str:
        called.append(arguments)
        return json.dumps({"install": chosen})

    monkeypatch.setattr(packages, "_pip", pip)
    packages.add(tmp_path)
    asked, installs = called
    assert "--no-index" in asked and "--dry-run" in asked
    assert not [word for word in asked if word.startswith(("torch", "triton", "trl"))]
    assert installs[-1] == "rich==15.0.0"
    own = installs[installs.index("--target") + 1]
    assert "--no-deps" in installs
    assert sys.path[0] == own
    assert os.environ["PYTHONPATH"] == f"{own}:before"
    chosen.append({"metadata": {"name": "torch", "version": "2.9.0"}})
    with pytest.raises(packages.Refusal, match=r"pip would bring torch 2\.9\.0"):
        packages.add(tmp_path)


def test_columns_of_the_csv_are_those_of_a_row(tmp_path: Path) -> None:
    kit = Kit(tmp_path, dry=True, began=time.monotonic() - 1e6, budget_s=1.0)
    kit.facts = {"gpu": "none"}
    kit.run(part_of("hangs"))
    with (tmp_path / "gpu_kit.csv").open() as file:
        header = next(csv.reader(file))
    assert header == [*Row.__annotations__, "gpu"]
