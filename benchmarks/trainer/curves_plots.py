"""Chart of the training curves of `agro train` and TRL's AGROTrainer."""

from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

from agro_train.watch import style
from benchmarks.measure.plots import colour, distinct
from benchmarks.measure.rows import read_csv

TRAINING = {  # label, colour and stroke of a trainer
    "agro": ("agro train", style.OURS, "-"),
    "trl": ("TRL's AGROTrainer", colour("trl_chunked"), "--"),
    "agro_slower": ("agro train, half the rate", style.GREY, ":"),
}


def plot_training(path: Path) -> Path:
    """Draws reward and KL against steps: means over seeds, bands of two standard errors.

    path: the CSV of curves_trl. Returns the PNG beside it.
    """
    return style.save(_drawn(read_csv(path)), path.with_suffix(".png"))


@style.sheet()
def _drawn(rows: list[dict[str, str]]) -> Figure:
    figure, grid = style.panels(2, row=3.2)
    seeds = len(distinct(rows, "seed"))
    for axes, column, title in zip(
        grid, ("reward", "kl"), ("mean reward", "KL, nats a completion"), strict=True
    ):
        for trainer in distinct(rows, "trainer"):
            label, shade, stroke = TRAINING[trainer]
            by_step: dict[int, list[float]] = {}
            for row in rows:
                if row["trainer"] == trainer:
                    by_step.setdefault(int(row["step"]), []).append(float(row[column]))
            steps = sorted(by_step)
            means = [fmean(by_step[step]) for step in steps]
            errors = [2 * stdev(by_step[step]) / len(by_step[step]) ** 0.5 for step in steps]
            axes.plot(steps, means, color=shade, linestyle=stroke, label=label)
            low = [mean - error for mean, error in zip(means, errors, strict=True)]
            high = [mean + error for mean, error in zip(means, errors, strict=True)]
            axes.fill_between(steps, low, high, color=shade, alpha=style.BAND, linewidth=0)
        axes.set(title=title, xlabel="step")
    style.finish(figure, note=f"mean over {seeds} seeds, band: two standard errors")
    return figure
