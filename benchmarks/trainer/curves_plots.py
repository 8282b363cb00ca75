"""Chart of the training curves of `agro train` and TRL's AGROTrainer."""

from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

from benchmarks.measure.plots import COLOURS, distinct, without_box
from benchmarks.measure.rows import read_csv

TRAINING = {  # label and colour of a trainer
    "agro": ("agro train", COLOURS["ours"]),
    "trl": ("TRL's AGROTrainer", COLOURS["torch_compile"]),
    "agro_slower": ("agro train, half the learning rate", COLOURS["torch"]),
}


def plot_training(path: Path) -> Path:
    """Draws reward and KL against steps: means over seeds, bands of two standard errors.

    path: the CSV of curves_trl. Returns the PNG beside it.
    """
    rows = read_csv(path)
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2),
        ("reward", "kl"),
        ("mean reward", "KL, nats a completion"),
        strict=True,
    ):
        for trainer in distinct(rows, "trainer"):
            label, shade = TRAINING[trainer]
            by_step: dict[int, list[float]] = {}
            for row in rows:
                if row["trainer"] == trainer:
                    by_step.setdefault(int(row["step"]), []).append(float(row[column]))
            steps = sorted(by_step)
            means = [fmean(by_step[step]) for step in steps]
            errors = [2 * stdev(by_step[step]) / len(by_step[step]) ** 0.5 for step in steps]
            axes.plot(steps, means, color=shade, label=f"{label}, {len(by_step[1])} seeds")
            low = [mean - error for mean, error in zip(means, errors, strict=True)]
            high = [mean + error for mean, error in zip(means, errors, strict=True)]
            axes.fill_between(steps, low, high, color=shade, alpha=0.2, linewidth=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        without_box(axes)
    figure.axes[0].legend(frameon=False, fontsize=8)
    written = path.with_suffix(".png")
    figure.savefig(written, dpi=110)
    return written
