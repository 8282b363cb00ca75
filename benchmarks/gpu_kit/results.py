"""What came out, in one folder: gpu_kit.json with all of it, gpu_kit.csv with a row for each part.

Both are written anew after each part, and whole whatever happens.
"""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from agro_train import durable
from benchmarks.gpu_kit.parts import Job, Part
from benchmarks.gpu_kit.supervise import Outcome
from benchmarks.measure.rows import column_names, texts

PHASES = ("generate", "score", "update")
DRY = "dry: tiny shapes on a CPU, to see that the kit runs; no number of it says anything of a GPU"
MEASURED = "measured on the card that is named here"


@dataclass
class Row:
    """One part. Seconds, rates and tokens are medians over its timed steps; GB are 1e9 bytes.

    `*_tflops` are what no trainer can avoid (benchmarks.gpu_kit.shapes.Work) over the phase's
    seconds, 1e12 a second; `*_mfu` is that over the datasheet's dense bfloat16 products. A phase's
    peak is the most memory of tensors; `planned_*` is what `agro plan` predicts of it.
    """

    part: str
    about: str
    status: str  # ok, failed, timeout, skipped
    detail: str
    seconds: float | None = None  # of the whole part, its start included
    trainer: str = ""
    shape: str = ""
    settings: str = ""
    weights: float | None = None
    trained: float | None = None
    prompts: float | None = None
    generations: float | None = None
    prompt_length: float | None = None
    completion_length: float | None = None
    steps: int = 0  # timed ones
    warm_up_s: float | None = None  # the first step, which is not among them
    step_s: float | None = None
    fastest_step_s: float | None = None
    slowest_step_s: float | None = None
    generate_s: float | None = None
    score_s: float | None = None
    update_s: float | None = None
    other_s: float | None = None  # rewards, packing; among TRL's score
    completion_tokens: float | None = None  # of a step
    tokens_per_s: float | None = None  # of completions, over the whole step
    generated_tokens_per_s: float | None = None  # over its generation alone
    generate_tflops: float | None = None
    score_tflops: float | None = None
    update_tflops: float | None = None
    step_tflops: float | None = None
    generate_mfu: float | None = None
    score_mfu: float | None = None
    update_mfu: float | None = None
    step_mfu: float | None = None
    peak_gb: float | None = None
    generate_peak_gb: float | None = None
    score_peak_gb: float | None = None
    update_peak_gb: float | None = None
    planned_generate_gb: float | None = None
    planned_score_gb: float | None = None
    planned_update_gb: float | None = None
    sm_clock: str = ""  # right after the last step
    passed: int = 0  # tests
    failed: int = 0
    skipped: int = 0


def row_of(part: Part, outcome: Outcome, peak_flops: float | None) -> Row:
    """The row of a part that has run.

    Args:
        peak_flops: of the card's bfloat16 products; None: not known.
    """
    row = Row(part.name, part.about, outcome.status, outcome.detail, outcome.seconds)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for report in outcome.reports:
        by_kind.setdefault(report["kind"], []).append(report)
    if (job := part.arguments.get("job")) is not None:
        _fill_job(row, job, by_kind)
        _fill_steps(row, by_kind.get("step", []))
        _fill_rates(row, by_kind, peak_flops)
    if tests := Counter(test["outcome"] for test in by_kind.get("test", [])):
        row.passed, row.failed, row.skipped = (tests[n] for n in ("passed", "failed", "skipped"))
    if metrics := by_kind.get("metrics", []):
        _fill_metrics(row, metrics)
    return row


def skipped(part: Part, why: str) -> Row:
    return Row(part.name, part.about, "skipped", why)


def _fill_job(row: Row, job: Job, by_kind: Mapping[str, list[dict[str, Any]]]) -> None:
    row.trainer = job.trainer
    row.prompts, row.generations = float(job.prompts), float(job.generations)
    row.prompt_length, row.completion_length = (
        float(job.prompt_length),
        float(job.completion_length),
    )
    for model in by_kind.get("model", []):
        row.shape, row.settings = model["shape"], model["settings"]
        row.weights, row.trained = float(model["weights"]), float(model["trained"])
        for phase, size in model["planned_gb"].items():
            setattr(row, f"planned_{phase}_gb", size)
    for step in by_kind.get("warm_up", []):
        row.warm_up_s = step["step_s"]
    for clocks in by_kind.get("clocks", []):
        row.sm_clock = clocks.get("sm_clock", "")


def _fill_steps(row: Row, steps: Sequence[Mapping[str, float]]) -> None:
    row.steps = len(steps)
    if not steps:
        return
    times = [step["step_s"] for step in steps]
    row.step_s, row.fastest_step_s, row.slowest_step_s = median(times), min(times), max(times)
    for phase in PHASES:
        setattr(row, f"{phase}_s", median(step[f"{phase}_s"] for step in steps))
        setattr(row, f"{phase}_peak_gb", max(step[f"{phase}_peak_gb"] for step in steps))
    row.other_s = median(
        step["step_s"] - sum(step[f"{phase}_s"] for phase in PHASES) for step in steps
    )
    row.peak_gb = max(step[f"{phase}_peak_gb"] for step in steps for phase in PHASES)
    row.completion_tokens = median(step["completion_tokens"] for step in steps)


def _fill_rates(
    row: Row, by_kind: Mapping[str, list[dict[str, Any]]], peak_flops: float | None
) -> None:
    if row.step_s is None or row.completion_tokens is None:
        return
    row.tokens_per_s = row.completion_tokens / row.step_s
    if row.generate_s:
        row.generated_tokens_per_s = row.completion_tokens / row.generate_s
    work = by_kind["model"][0]["work"]
    for phase, flop in {**work, "step": sum(work.values())}.items():
        if seconds := getattr(row, f"{phase}_s"):
            setattr(row, f"{phase}_tflops", flop / seconds / 1e12)
            if peak_flops is not None:
                setattr(row, f"{phase}_mfu", flop / seconds / peak_flops)


def _fill_metrics(row: Row, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Of `agro train`: rows of steps have a time, others are of evaluations."""
    row.trainer = "agro"
    steps = [one for one in metrics if "time_s" in one]
    row.steps = len(steps)
    if steps:
        row.step_s = median(one["time_s"] for one in steps)
        row.tokens_per_s = median(one["tokens_per_s"] for one in steps)
        row.peak_gb = max(one["memory_gb"] for one in steps)
    scores = [one["eval_accuracy"] for one in metrics if "eval_accuracy" in one]
    if scores and not row.detail:
        row.detail = f"accuracy on held-out prompts from {scores[0]:.3f} to {scores[-1]:.3f}"


def write(
    folder: Path,
    rows: Sequence[Row],
    outcomes: Mapping[str, Outcome],
    facts: Mapping[str, str],
    about: Mapping[str, Any],
) -> None:
    """Both files.

    Args:
        outcomes: by part, of those that have run.
        facts: of the machine; a column each in every row of the CSV.
        about: of the whole run, for the JSON.
    """
    with durable.writing(folder / "gpu_kit.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*column_names(Row), *facts])
        writer.writerows([*texts(row), *facts.values()] for row in rows)
    parts = []
    for row in rows:
        part = dict(vars(row))
        if (outcome := outcomes.get(row.part)) is not None:
            part |= {"reports": outcome.reports, "last_lines": outcome.last_lines}
        parts.append(part)
    with durable.writing(folder / "gpu_kit.json") as file:
        json.dump({**about, "machine": dict(facts), "parts": parts}, file, indent=1)


def describe(row: Row) -> str:
    """The line that is printed of a part."""
    line = f"{row.part:24s}{row.status:8s}"
    if row.seconds is not None:
        line += f"{row.seconds:6.1f} s"
    if row.generate_s is not None:
        line += (
            f"  {row.shape}: step {row.step_s:.3g} s (generate {row.generate_s:.3g}, score "
            f"{row.score_s:.3g}, update {row.update_s:.3g}), {row.tokens_per_s:.0f} tokens/s, "
            f"{row.peak_gb:.3g} GB"
        )
        if row.update_mfu is not None:
            line += f", MFU {row.step_mfu:.1%} of the step, {row.update_mfu:.1%} of the update"
    if row.passed or row.failed or row.skipped:
        line += f"  {row.passed} passed, {row.failed} failed, {row.skipped} skipped"
    return f"{line}  {row.detail}".rstrip()
