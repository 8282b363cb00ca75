"""The curves: every number of the record is drawn, inside the axes, and named."""

import pytest
from matplotlib.figure import Figure

from agro_train.plots import PANELS, Panel, _draw

ROWS = [
    {"step": 0, "eval_reward": 0.1, "eval_accuracy": 0.2, "eval_length": 3.0},
    {"step": 1, "reward": -0.5, "kl": -0.2, "entropy": 2.0, "completions/mean_length": 4.0},
    {"step": 2, "reward": None, "kl": 0.4, "entropy": 1.0, "completions/mean_length": 5.0},
    {"step": 3, "reward": 0.9, "kl": 0.6, "entropy": 0.5, "completions/mean_length": 4.5},
]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel[0])
def test_panel_draws_and_names_its_curves(panel: Panel) -> None:
    axes = Figure().subplots()
    _draw(axes, panel, ROWS)
    assert axes.get_xlabel() == "step" and axes.get_ylabel() == panel[1]
    drawn = {line.get_label(): list(line.get_xydata().tolist()) for line in axes.lines}
    for column, legend in panel[2]:
        points = [[r["step"], r[column]] for r in ROWS if r.get(column) is not None]
        assert drawn[legend] == points
        low, high = axes.get_ylim()
        assert all(low <= value <= high for _, value in points)
    assert (axes.get_legend() is not None) == (len(panel[2]) > 1)
