"""Two comparisons on a real model: SmolLM2-135M-Instruct on arithmetic.

From its own samples, the algorithms of Figures 2 and 3. From the record alone, which `agro rollout
smollm2-arithmetic` makes before training, the losses of Figure 5: held-out accuracy before and
after.

Half as long as `agro train smollm2-arithmetic` for a CPU's sake: 12 updates of 64 completions. Its
learning rate is the configuration's for every algorithm and three seeds are few, so this says
whether what the tiny model shows is plainly different here, and no more.
"""

from collections.abc import Sequence
from pathlib import Path

from agro_train.experiments import compare, fig2, tabular
from agro_train.experiments.compare import ALGORITHMS, Curves, Named
from agro_train.experiments.language import RECORDED, point
from agro_train.experiments.sweep import Sweep
from agro_train.experiments.tabular import Claim

BASE = "smollm2-arithmetic"
OWN, RECORD = "own samples", "the record alone"
NAMES = {
    OWN: ("pg_k2", "agro", "on_policy"),
    RECORD: ("pg_k2", "pg_no_baseline", "agro", "agro_tapered"),
}
BASELINE = "pg_k2"
SEEDS = range(3)
LENGTH: dict[str, object] = {"steps": 12, "eval_every": 6}
QUICK: dict[str, object] = {
    "steps": 1,
    "prompts_per_step": 2,
    "num_generations": 2,
    "eval_generations": 1,
}

# Without the prompts below and above one half: hardly any of the 20 starts above.
MEASURES = {k: v for k, v in compare.MEASURES.items() if k not in ("eval_below", "eval_above")}


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """Writes smollm2_differences.csv, smollm2.png and smollm2_record.png."""
    sweep = Sweep(output_dir, quick)
    settings = {data: points(data, names, quick) for data, names in NAMES.items()}
    curves = sweep.curves(compare.every_point(settings))
    by_data = {(data,): named for data, named in settings.items()}
    differences = compare.statements(curves, by_data, ("data",), BASELINE, MEASURES)
    tabular.write_csv(output_dir / "smollm2_differences.csv", differences)
    for data, named in settings.items():
        for lines in tables(curves, data, named):
            print(*lines, "", sep="\n")
    panels = fig2.PANELS["fig2"] | {"eval_reward": "held-out, sampled"}
    fig2.draw(curves, settings[OWN], panels).savefig(output_dir / "smollm2.png", dpi=110)
    panels = {"eval_accuracy": "held-out, greedy", **panels}
    del panels["reward"]  # it is the record's
    fig2.draw(curves, settings[RECORD], panels).savefig(output_dir / "smollm2_record.png", dpi=110)
    return compare.fair_each(curves, settings)


def points(data: str, names: Sequence[str], quick: bool) -> Named:
    source = {"recorded": RECORDED} if data == RECORD else {}
    return {
        name: [
            point(
                seed, {**ALGORITHMS[name].settings, **source, **(QUICK if quick else LENGTH)}, BASE
            )
            for seed in SEEDS[: 2 if quick else None]
        ]
        for name in names
    }


def tables(curves: Curves, data: str, named: Named) -> list[list[str]]:
    """Markdown: where the algorithms end, and their differences."""
    levels = compare.level_rows(curves, named, MEASURES, data)
    start = compare.start_row(curves, named, MEASURES, data)
    differences = compare.difference_rows(curves, named, BASELINE, MEASURES, data)
    return [compare.markdown([*levels, start]), compare.markdown(differences)]
