"""Thousands of steps, unattended: what grows with them?

    python -m benchmarks.trainer.long_run [--steps 3000] [--out FILE] [SETTING ...]

Question: memory, open files, time a step and the run's folder, early in a run and late.

Method. `agro train tiny-arithmetic` with small batches in a process of its own, looked at from
outside (/proc) whenever metrics.jsonl has come to one of the marks. More settings follow the
options. The report is drawn then, too, and timed.

One row of the CSV is one mark:

    step
    resident_mb   of the process, 1e6 bytes
    open_files    its file descriptors
    threads
    step_ms       median of the last 100 steps
    folder_mb     everything in the run's folder
    metrics_kb    of it, metrics.jsonl
    report_s      time to write report.html of the run as it is then; its page has
    report_kb
"""

import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from agro_train.data.rows import read_jsonl
from agro_train.watch.report import write_report
from benchmarks.measure.arguments import parser_of
from benchmarks.measure.rows import RESULTS

MARKS = (100, 200, 500, 1000, 2000, 3000)
SMALL = [
    "tiny-arithmetic",
    "prompts_per_step=4",
    "num_generations=4",
    "eval_every=100",
    "eval_prompts=20",
    "save_every=100",
]


def look(process: int, folder: Path) -> dict[str, float]:
    """The columns that a run in progress has."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines()
    )
    files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {
        "resident_mb": int(status["VmRSS"].split()[0]) * 1024 / 1e6,
        "open_files": len(list(Path(f"/proc/{process}/fd").iterdir())),
        "threads": int(status["Threads"]),
        "folder_mb": sum(files) / 1e6,
        "metrics_kb": (folder / "metrics.jsonl").stat().st_size / 1e3,
    }


def step_ms(rows: Sequence[dict[str, float]], step: int) -> float:
    times = {row["step"]: row["time_s"] for row in rows if "reward" in row}
    return 1e3 * median(times[at] for at in range(max(1, step - 99), step + 1) if at in times)


def last_step(metrics: Path) -> int:
    """Without reading the file whole."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 4000))
        lines = file.read().split(b"\n")[:-1]
    found = [int(line[9:].split(b",")[0]) for line in lines if line.startswith(b'{"step": ')]
    return max(found, default=0)


def measure(folder: Path, steps: int, settings: Sequence[str]) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "agro_train", "train", *SMALL, *settings]
    command += [f"output_dir={folder}", f"steps={steps}"]
    marks = [mark for mark in MARKS if mark < steps] + [steps]
    rows = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        for mark in marks:
            while last_step(folder / "metrics.jsonl") < mark:
                if run.poll() is not None:
                    raise SystemExit(f"the run ended before step {mark}, status {run.returncode}")
                time.sleep(0.05)
            row = {"step": mark, **look(run.pid, folder)}
            row["step_ms"] = step_ms(read_jsonl(folder / "metrics.jsonl"), mark)
            began = time.perf_counter()
            page = write_report(folder, folder.parent / "report.html")
            row["report_s"] = time.perf_counter() - began
            row["report_kb"] = page.stat().st_size / 1e3
            rows.append(row)
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=MARKS[-1])
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_long_run.csv")
    parser.add_argument("settings", nargs="*", metavar="SETTING")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        rows = measure(Path(name) / "run", options.steps, options.settings)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.5g}" for name, value in row.items()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
