"""Figure 5's question on a real model: SmolLM2-135M-Instruct on arithmetic from a record alone.

What `agro rollout smollm2-arithmetic` writes before training is all that is learned from; held-out
prompts are asked before and after. As long as `smollm2`, and as little tuned.
"""

from pathlib import Path

from agro_train.experiments import fig2, smollm2
from agro_train.experiments.compare import Named
from agro_train.experiments.language import RECORDED
from agro_train.experiments.tabular import Claim

NAMES = ("pg_k2", "pg_no_baseline", "agro", "agro_tapered")


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """Writes offline_differences.csv and offline.png."""
    panels = {"eval_accuracy": "held-out, greedy", **fig2.PANELS["fig2"]}
    del panels["reward"]  # it is the record's
    panels["eval_reward"] = "held-out, sampled"
    return smollm2.run_named(output_dir, quick, "offline", points(quick), panels)


def points(quick: bool) -> Named:
    return smollm2.points(NAMES, quick, {"recorded": RECORDED})
