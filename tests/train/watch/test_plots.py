"""The curves: every number of the record is drawn, inside the axes, and named; runs of one
configuration are one band.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.watch.panels import PANELS, Panel, points
from agro_train.watch.plots import COMPARED, _draw_comparison, _drawn, compare, over_seeds

ROWS = [
    {"step": 0, "eval_reward": 0.1, "eval_accuracy": 0.2, "eval_length": 3.0},
    {"step": 1, "reward": -0.5, "kl": -0.2, "entropy": 2.0, "completions/mean_length": 4.0},
    {"step": 2, "reward": None, "kl": 0.4, "entropy": 1.0, "completions/mean_length": 5.0},
    {"step": 3, "reward": 0.9, "kl": 0.6, "entropy": 0.5, "completions/mean_length": 4.5},
]


def save_run(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(TrainConfig(output_dir=str(folder), **settings).to_yaml())
    return folder


def rewards(*values: float) -> list[dict[str, Any]]:
    return [{"step": step, "reward": value} for step, value in enumerate(values, start=1)]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_panel_draws_and_names_its_curves(panel: Panel) -> None:
    (axes,) = _drawn([panel], ROWS).axes
    assert axes.get_xlabel() == "step" and axes.get_title(loc="left") == panel.label
    drawn = {line.get_label(): list(line.get_xydata().tolist()) for line in axes.lines}
    for column, legend in panel.curves:
        expected = [[r["step"], r[column]] for r in ROWS if r.get(column) is not None]
        assert drawn[legend] == expected
        low, high = axes.get_ylim()
        assert all(low <= value <= high for _, value in expected)
    named = [text.get_text().replace("\n", " ") for text in axes.texts]
    assert named == ([legend for _, legend in panel.curves] if len(panel.curves) > 1 else [])


def test_what_two_panels_show_has_one_colour() -> None:
    reward, *_, length = _drawn(PANELS, ROWS).axes
    colours = {line.get_label(): line.get_color() for line in reward.lines}
    assert len(set(colours.values())) == 3
    assert {line.get_label(): line.get_color() for line in length.lines}.items() <= colours.items()


def test_runs_that_differ_in_seed_and_names_are_one_curve(tmp_path: Path) -> None:
    """Labelled by the settings in which the curves differ, and by nothing else."""
    runs = [
        save_run(tmp_path / "a", rewards(0.1), beta=0.01, seed=0),
        save_run(tmp_path / "b", rewards(0.2), beta=0.1, lr_weight=1.0, seed=0),
        save_run(tmp_path / "c", rewards(0.3), beta=0.01, seed=1, save_every=5, project="other"),
    ]
    curves = compare(runs)
    assert [c.label for c in curves] == [
        "beta=0.01, lr_weight=0 (2 runs)",
        "beta=0.1, lr_weight=1",
    ]
    assert [[rows[0]["reward"] for rows in c.runs] for c in curves] == [[0.1, 0.3], [0.2]]


def test_folders_name_curves_that_no_setting_tells_apart(tmp_path: Path) -> None:
    many = {"beta": 0.1, "steps": 7, "temperature": 0.9, "weight_decay": 0.1}
    runs = [
        save_run(tmp_path / "plain", rewards(0.1)),
        save_run(tmp_path / "changed", rewards(0.1), **many),
        save_run(tmp_path / "other" / "bare", rewards(0.1)),
        save_run(tmp_path / "bare", rewards(0.1)),
    ]
    for run in runs[2:]:
        (run / "config.yaml").unlink()
    assert [c.label for c in compare(runs)] == [
        "plain",
        "changed",
        str(tmp_path / "other" / "bare"),
        str(tmp_path / "bare"),
    ]


def test_settings_of_another_version_are_compared_by_meaning(tmp_path: Path) -> None:
    """A setting that a config.yaml does not know yet has its default; one reward is a list of one;
    one that is known no longer still tells runs apart.
    """
    new = save_run(tmp_path / "new", rewards(0.1))
    old = save_run(tmp_path / "old", rewards(0.2))
    (old / "config.yaml").write_text("reward: number\nbeta: 0.01\nseed: 3\n")
    assert [c.label for c in compare([new, old])] == ["new (2 runs)"]
    (old / "config.yaml").write_text("beta: 0.01\nclip: 0.2\n")
    assert [c.label for c in compare([new, old])] == ["clip=None", "clip=0.2"]


def test_band_covers_its_runs_as_far_as_all_of_them_go(tmp_path: Path) -> None:
    runs = [
        save_run(tmp_path / "a", rewards(0.1, 0.5, 0.9), seed=0),
        save_run(tmp_path / "b", rewards(0.3, 0.1), seed=1),
        save_run(tmp_path / "c", [{"step": 1, "kl": 1.0}], seed=2),  # has no reward at all
    ]
    (curve,) = compare(runs)
    expected = [(1, 0.2, 0.1, 0.3), (2, 0.3, 0.1, 0.5)]
    assert over_seeds(curve.runs, "reward") == [pytest.approx(point) for point in expected]
    axes = Figure().subplots()
    _draw_comparison(axes, COMPARED[0], [curve])
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [pytest.approx(point[:2]) for point in expected]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band.round(9).tolist()} == {
        (step, value) for step, _, low, high in expected for value in (low, high)
    }
    low, high = axes.get_ylim()
    assert low <= 0.1 and high >= 0.5


def test_old_names_of_columns_are_drawn() -> None:
    rows = [{"step": 1, "length": 7.0}, {"step": 2, "completions/mean_length": 8.0}]
    assert points(rows, "completions/mean_length") == [(1, 7.0), (2, 8.0)]


def test_command_compares_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        save_run(tmp_path / f"{beta}-{seed}", rewards(0.1, beta), beta=beta, seed=seed)
        for beta in (0.1, 0.2)
        for seed in (0, 1)
    ]
    monkeypatch.chdir(tmp_path)
    assert main(["plot", *map(str, runs)]) == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "overview.png",  # of what the runs have numbers for
        "reward.png",
    ]
    assert main(["plot", str(runs[0]), "--output", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert not (runs[0] / "plots").exists()


def test_command_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run", rewards(0.1))
    for command in (["plot", str(run), str(tmp_path)], ["report", str(tmp_path)]):
        assert main(command) == 2
        message = capsys.readouterr().err
        assert f"expected the folder of a run, got '{tmp_path}'" in message
    assert not (run / "plots").exists()
