"""The comparison of Figures 2 and 3 once on a real model: SmolLM2-135M-Instruct on arithmetic.

`agro train smollm2-arithmetic`, half as long for a CPU's sake: 12 updates of 64 completions. Its
learning rate is the configuration's for every algorithm and three seeds are few, so this says
whether what the tiny model shows is plainly different here, and no more.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from agro_train.experiments import compare, fig2, tabular
from agro_train.experiments.compare import ALGORITHMS, Curves, Named
from agro_train.experiments.language import point
from agro_train.experiments.sweep import Sweep
from agro_train.experiments.tabular import Claim
from agro_train.watch import style

BASE = "smollm2-arithmetic"
NAMES = ("pg_k2", "agro", "on_policy")
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
    """Writes smollm2_differences.csv and smollm2.png."""
    panels = fig2.PANELS["fig2"] | {"eval_reward": "held-out, sampled"}
    return run_named(output_dir, quick, "smollm2", points(NAMES, quick), panels)


def run_named(
    output_dir: Path, quick: bool, figure: str, named: Named, panels: Mapping[str, str]
) -> list[Claim]:
    """Writes FIGURE_differences.csv and FIGURE.png of runs with this model, and prints where they
    end."""
    every = [one for each in named.values() for one in each]
    curves = Sweep(output_dir, quick).curves(every)
    tabular.write_csv(
        output_dir / f"{figure}_differences.csv",
        compare.statement_rows(curves, named, BASELINE, MEASURES),
    )
    for lines in tables(curves, named):
        print(*lines, "", sep="\n")
    style.save(fig2.draw(curves, named, panels), output_dir / f"{figure}.png")
    return compare.fair(curves, every)


def tables(curves: Curves, named: Named) -> list[list[str]]:
    """Markdown: where the algorithms end, and their differences."""
    levels = compare.level_rows(curves, named, MEASURES)
    return [
        compare.markdown([*levels, compare.start_row(curves, named, MEASURES)]),
        compare.markdown(compare.difference_rows(curves, named, BASELINE, MEASURES)),
    ]


def points(
    names: Sequence[str], quick: bool, settings: Mapping[str, object] | None = None
) -> Named:
    """Each algorithm's runs, with these settings beside its own."""
    length = QUICK if quick else LENGTH
    return {
        name: [
            point(seed, {**ALGORITHMS[name].settings, **(settings or {}), **length}, BASE)
            for seed in SEEDS[: 2 if quick else None]
        ]
        for name in names
    }
