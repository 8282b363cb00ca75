"""How much of a step's time sampling ahead hides, with an engine of simulated latency.

    python -m benchmarks.trainer.ahead [--update-s 0.2] [--steps 40] [--out FILE]

Question: a step takes generation plus update in lock step, and could take the longer of the two.
How near does the schedule of `max_staleness` come, for k = 0, 1, 2 and 4, where generation takes
0.5, 1, 2 and 5 times as long as the update, always the same or varying by half?

Method. The real `agro_train.fresh`, threads and all. Engine and update do nothing but sleep:
generation latencies are drawn once (uniform within half of their mean) and are the same for every
k. The first k + 2 steps are not counted. What is simulated here has no weights to copy and nothing
to compute, so it is the schedule's own overhead and waiting, and no more.

One row of the CSV is one latency and one k:

    step_s      mean over the counted steps
    ideal_s     the larger of mean generation and update: no schedule is faster
    ratio       step_s / ideal_s
    lock_step   generation plus update / ideal_s: where k = 0 should be
    wait_s      of a step, the trainer waited for groups
    idle_s      of a step, the engine had nothing to do
"""

import csv
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from agro_train.config import TrainConfig
from agro_train.data.mix import plan
from agro_train.engines.engine import Snapshot
from agro_train.fresh import Ahead, FreshGroups, InStep, Questioner
from agro_train.ranks import Ranks
from agro_train.types import Prompt, Rollout
from benchmarks.measure.arguments import parser_of
from benchmarks.measure.rows import RESULTS

STALENESS = (0, 1, 2, 4)
LATENCIES = (0.5, 1.0, 2.0, 5.0)  # of generation, in updates
VARYING = (0.0, 0.5)  # share by which a latency may be off its mean
PROMPT = Prompt("1", "1", (1,), {"answer": "1"})


class Sleeping:
    """An engine, in step or ahead, that takes its time and samples nothing worth reading."""

    def __init__(self, latencies: Sequence[float]) -> None:
        self.left = list(latencies)

    def complete(self, prompts: Sequence[Prompt], **_: Any) -> list[Rollout]:
        time.sleep(self.left.pop(0))
        row = Rollout("1", "1", (1,), "1", (1,), finish="stop", reward=None)
        return [row] * len(prompts)

    def snapshot(self, step: int, prompt: Prompt) -> Snapshot:
        del prompt
        return Snapshot(step)

    def load(self, snapshot: Snapshot) -> None:
        del snapshot

    def sample(
        self, prompts: Sequence[Prompt], **options: Any
    ) -> Iterator[tuple[int, list[Rollout]]]:
        yield from enumerate([row] for row in self.complete(prompts, **options))

    def close(self) -> None:
        """It holds nothing."""


def measure(k: int, latencies: Sequence[float], update_s: float) -> dict[str, float]:
    steps = len(latencies)
    config = TrainConfig(steps=steps, prompts_per_step=1, num_generations=1, max_staleness=k)
    ask = Questioner(config, [PROMPT], plan(config), Ranks(), (), {})
    engine = Sleeping(latencies)
    groups: FreshGroups = Ahead(ask, engine, 0) if k else InStep(ask, engine)
    counted = k + 2
    rows, began = [], 0.0
    for step in range(steps):
        if step == counted:
            began = time.perf_counter()
        groups.take(step)
        rows.append(groups.metrics())
        time.sleep(update_s)
    took = (time.perf_counter() - began) / (steps - counted)
    groups.close()
    means = {
        name: fmean(row.get(f"async/{column}", 0.0) for row in rows[counted:])
        for name, column in (("wait_s", "wait_s"), ("idle_s", "engine_idle_s"))
    }
    ideal = max(fmean(latencies[counted:]), update_s)
    lock_step = (fmean(latencies[counted:]) + update_s) / ideal
    return {
        "step_s": took,
        "ideal_s": ideal,
        "ratio": took / ideal,
        "lock_step": lock_step,
        **means,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--update-s", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_ahead.csv")
    options = parser.parse_args(arguments)
    rows = []
    for latency in LATENCIES:
        for varying in VARYING:
            draw = random.Random(0)
            drawn = [
                options.update_s * latency * draw.uniform(1 - varying, 1 + varying)
                for _ in range(options.steps)
            ]
            for k in STALENESS:
                found = measure(k, drawn, options.update_s)
                about = {"generation_per_update": latency, "varies_by": varying, "k": k}
                rows.append(about | {name: f"{value:.4f}" for name, value in found.items()})
                print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
