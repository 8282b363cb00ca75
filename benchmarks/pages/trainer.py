"""Numbers of the trainer, from the CSV files of `benchmarks.trainer`, and of what a model needs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.measure.rows import RESULTS, read_csv
from benchmarks.pages.markers import Numbers, Query, Table
from benchmarks.trainer.curves_trl import Estimate, estimates

ROOT = Path(__file__).parents[2]
Line = Mapping[str, str]


def markdown(headings: Sequence[str], lines: Iterator[Sequence[str]], align: str = "") -> list[str]:
    """A table; align: "r" for a column of numbers, for each, or nothing."""
    rule = [{"r": "---:"}.get(one, "---") for one in align or " " * len(headings)]
    body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return ["| " + " | ".join(headings) + " |", "|" + "|".join(rule) + "|", *body]


def _rows(name: str) -> list[dict[str, str]]:
    return read_csv(RESULTS / f"{name}.csv")


# --- Sampling ahead -------------------------------------------------------------------------------


def ahead(_: Query) -> list[str]:
    """Time a step over the longer of generation and update, by latency and staleness."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in _rows("bench_ahead"):
        key = (f"{float(row['generation_per_update']):g}", f"{float(row['varies_by']):g}")
        found.setdefault(key, {})[row["k"]] = f"{float(row['ratio']):.2f}"
    ks = list(next(iter(found.values())))
    headings = ["generation / update", "varies by", *(f"k = {k}" for k in ks)]
    varies = {"0": "0", "0.5": "half"}
    return markdown(
        headings,
        ([each, varies[by], *(at[k] for k in ks)] for (each, by), at in found.items()),
    )


def ahead_vllm(_: Query) -> list[str]:
    def cells(row: Line) -> list[str]:
        waited = f"{float(row['wait_s']):.1f}"
        return [
            f"k = {row['k']}",
            f"{float(row['step_s']):.1f}",
            waited if row["idle_s"] else f"{waited}, all of generation",
            f"{float(row['idle_s']):.1f}" if row["idle_s"] else "",
            f"{float(row['ratio']):.2f}",
        ]

    over = "over the longer of generation and update at k = 0"
    headings = ["", "s a step", "of them waited", "engine idle", over]
    return markdown(headings, map(cells, _rows("bench_ahead_vllm")))


# --- A step, and a long run -----------------------------------------------------------------------

NAMES = {
    "agro": "`agro train`",
    "trl_grpo": "TRL 1.16 `GRPOTrainer`",
    "trl_rloo": "TRL 1.16 `RLOOTrainer`",
}


def step(_: Query) -> list[str]:
    def cells(row: Line) -> list[str]:
        seconds = (f"{float(row[name]):.1f} s" for name in ("rollout_s", "update_s", "step_s"))
        return [NAMES[row["trainer"]], *seconds, f"{float(row['update_peak_mb']) / 1e3:.2f} GB"]

    held = "memory of the update, beyond what is held before it"
    headings = ["trainer", "generate", "update", "step", held]
    return markdown(headings, map(cells, _rows("bench_train_step")))


def step_held(_: Query) -> list[float]:
    """GB held before the update, the least and the most of a trainer."""
    held = [float(row["resident_mb"]) / 1e3 for row in _rows("bench_train_step")]
    return [min(held), max(held)]


FIRST_UNDISTURBED = 500  # step; what ran beside the steps before made them slow
SHOWN_STEPS = ("100", "500", "1000", "2000", "3000")


def long_run(_: Query) -> list[str]:
    def cells(row: Line) -> list[str]:
        apart = int(row["step"]) < FIRST_UNDISTURBED
        return [
            f"{int(row['step']):,}",
            f"{float(row['resident_mb']):.0f}",
            row["open_files"],
            "" if apart else f"{float(row['step_ms']):.0f}",
            f"{float(row['folder_mb']):.0f}",
            f"{float(row['metrics_kb']) / 1e3:.1f}",
            "" if apart else f"{float(row['report_s']):.1f}",
        ]

    headings = ["step", "memory, MB", "open files", "ms a step", "folder, MB"]
    rows = (row for row in _rows("bench_long_run") if row["step"] in SHOWN_STEPS)
    return markdown([*headings, "`metrics.jsonl`, MB", "report, s"], map(cells, rows))


def folder_growth(_: Query) -> list[float]:
    """MB of the folder in the last thousand steps."""
    before, last = _rows("bench_long_run")[-2:]
    return [float(last["folder_mb"]) - float(before["folder_mb"])]


# --- What is planned, what is loaded --------------------------------------------------------------


def plan(_: Query) -> list[str]:
    """What `agro plan` says of memory, and what was measured."""

    def cells(row: Line) -> list[str]:
        megabytes = (f"{float(row[name]):.0f}" for name in ("planned_mb", "measured_mb"))
        return [row["case"], row["stage"], *megabytes, f"{100 * float(row['apart']):+.1f} %"]

    headings = ["case", "stage", "planned, MB", "measured, MB", "apart"]
    return markdown(headings, map(cells, _rows("bench_plan")), "  rrr")


def plan_apart(query: Query) -> list[float]:
    """By how much, in percent, the plan was below what was measured, at most: of the cases with an
    adapter or the others, and of one stage."""
    (adapter,), (stage,) = query["adapter"], query["stage"]
    return [
        max(
            -100 * float(row["apart"])
            for row in _rows("bench_plan")
            if row["stage"] == stage and ("adapter" in row["case"]) == (adapter == "yes")
        )
    ]


def plan_left(_: Query) -> list[float]:
    """MB that full training takes beyond its plan, the least and the most."""
    left = [
        float(row["measured_mb"]) - float(row["planned_mb"])
        for row in _rows("bench_plan")
        if "adapter" not in row["case"]
    ]
    return [min(left), max(left)]


def sharded_start(query: Query) -> list[float]:
    """MB, the most of a rank, of one `way` and one `column`."""
    (way,), (column,) = query["way"], query["column"]
    return [max(float(row[column]) for row in _rows("bench_sharded_start") if row["way"] == way)]


def attention_memory(_: Query) -> list[str]:
    """MB of the masks alone, and of a pass, mask included, by tokens."""
    found: dict[str, dict[tuple[str, str], Line]] = {}
    for row in _rows("bench_attention_memory"):
        found.setdefault(row["tokens"], {})[row["attention"], row["form"]] = row

    def cells(tokens: str) -> list[str]:
        dense, block = (found[tokens][name, "forward"] for name in ("sdpa", "flex_attention"))
        passes = (dense, block, found[tokens]["sdpa", "forward_backward"])
        peaks = (f"{float(row['peak_mb']):.0f}" for row in passes)
        masks = (f"{float(row['mask_mb']):.2f}" for row in (dense, block))
        return [f"{int(tokens):,}", *masks, *peaks]

    headings = ["tokens", "dense mask, MB", "block mask, MB", "forward, `sdpa`, MB"]
    headings += ["forward, `flex_attention`, MB", "forward and backward, `sdpa`, MB"]
    return markdown(headings, map(cells, found), "rrrrrr")


def attention_grows(query: Query) -> list[float]:
    """By how many times the `column` of an `attention` grows from the last length but one to the
    last; `form`, of the pass."""
    rows = [
        row
        for row in _rows("bench_attention_memory")
        if row["attention"] in query["attention"] and row["form"] in query["form"]
    ]
    (name,) = query["column"]
    before, last = (float(row[name]) for row in rows[-2:])
    return [last / before]


SAVED = {"beside": "beside the next steps", "before": "before the next step"}


def saving(_: Query) -> list[str]:
    """Seconds of a checkpoint, the median of the rounds, the least and the most."""

    def cells(way: str) -> list[str]:
        rows = [row for row in _rows("bench_saving") if row["way"] == way]
        columns = ("step_s", "held_s", "complete_s", "lost_s")
        return [SAVED[way], *(_spread([float(row[name]) for row in rows]) for name in columns)]

    headings = ["written", "a step without, s", "held up, s", "complete after, s", "lost, s"]
    return markdown(headings, map(cells, SAVED), " rrrr")


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def saving_column(query: Query) -> list[float]:
    """The median of a `column`, of one `way` or of all checkpoints."""
    (name,) = query["column"]
    ways = query.get("way", list(SAVED))
    return [median(float(row[name]) for row in _rows("bench_saving") if row["way"] in ways)]


# --- Beside TRL -----------------------------------------------------------------------------------

CURVES = {
    "start": "reward, first 3 steps",
    "whole": "reward, all steps",
    "end": "reward, last 10 steps",
    "kl": "KL, last 10 steps, nats a completion",
}


def _curves() -> tuple[dict[str, Estimate], dict[str, Estimate], dict[str, Estimate]]:
    rows = _rows("curves_trl")
    return estimates(rows, "agro"), estimates(rows, "trl"), estimates(rows, "agro_slower")


def curves(_: Query) -> list[str]:
    ours, trl, slower = _curves()
    half = "`agro train`, half the learning rate"
    return markdown(
        ["", "`agro train`", "`AGROTrainer`", "difference", half],
        (
            [title, str(ours[m]), str(trl[m]), str(trl[m].minus(ours[m])), str(slower[m])]
            for m, title in CURVES.items()
        ),
    )


def curves_apart(query: Query) -> list[float]:
    """In standard errors, the most of all measures: TRL's from ours, or ours at half the rate."""
    ours, trl, slower = _curves()
    other = trl if query["of"] == ["trl"] else slower
    apart = (other[measure].minus(ours[measure]) for measure in CURVES)
    return [max(abs(one.mean) / one.error for one in apart)]


# --- Models ---------------------------------------------------------------------------------------


def architectures(query: Query) -> list[float]:
    """How many are served by `patch_model`, of how many; `of=served`: the first alone."""
    page = (ROOT / "docs" / "architectures.md").read_text()
    found = re.search(r"Of the (\d+) causal LMs .* and (\d+) of these are served", page)
    assert found is not None, "docs/architectures.md"
    every, served = map(int, found.groups())
    return [served] if query.get("of") == ["served"] else [served, every]


def column(name: str, wanted: str) -> Numbers:
    """A column's number in the one row that the marker's other words leave."""

    def numbers(query: Query) -> list[float]:
        (row,) = (
            row for row in _rows(name) if all(row[key] in values for key, values in query.items())
        )
        return [float(row[wanted])]

    return numbers


TABLES: dict[str, Table] = {
    "ahead": ahead,
    "ahead.vllm": ahead_vllm,
    "attention_memory": attention_memory,
    "curves": curves,
    "long_run": long_run,
    "plan": plan,
    "saving": saving,
    "step": step,
}

NUMBERS: dict[str, Numbers] = {
    "architectures": architectures,
    "attention_memory.grows": attention_grows,
    "curves.apart": curves_apart,
    "long_run.folder": folder_growth,
    "plan.apart": plan_apart,
    "plan.left": plan_left,
    "saving": saving_column,
    "sharded_start": sharded_start,
    "step.held": step_held,
}
