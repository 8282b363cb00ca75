"""The benchmark of saving: its rows, of a small model on one rank."""

import socket
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from agro_train.policy import tiny
from benchmarks.measure.rows import read_csv
from benchmarks.pages import trainer
from benchmarks.trainer import saving


def test_a_row_a_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of its ranks calls it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(saving.torch, "set_num_threads", lambda count: None)
    config = tiny.build_config(64)
    monkeypatch.setattr(saving, "config_of", lambda layers: config)
    folder, out = tmp_path / "run", tmp_path / "rows.csv"
    folder.mkdir()
    words = ["--tokens", "4", "--steps", "2", "--rounds", "1", "--folder", str(folder)]
    assert saving.main([*words, "--out", str(out)]) == 0
    rows = read_csv(out)
    assert [row["way"] for row in rows] == ["beside", "before"]
    weights = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    for row in rows:
        # Weights and two moments, 4 bytes each, and small files.
        assert float(row["checkpoint_mb"]) == pytest.approx(12 * weights / 1e6, rel=0.02)
        assert 0 < float(row["held_s"]) <= float(row["complete_s"])
    assert rows[1]["held_s"] == rows[1]["complete_s"]


def test_the_table_has_the_median_of_the_rounds_and_their_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "RESULTS", tmp_path)
    lines = ["way,step_s,held_s,complete_s,lost_s"]
    lines += [f"{way},2,{held},4,{held + 1}" for way in ("beside", "before") for held in (3, 1, 9)]
    (tmp_path / "bench_saving.csv").write_text("\n".join(lines))
    cells = "2.0 (2.0 to 2.0) | 3.0 (1.0 to 9.0) | 4.0 (4.0 to 4.0) | 4.0 (2.0 to 10.0)"
    assert trainer.saving({})[2:] == [
        f"| beside the next steps | {cells} |",
        f"| before the next step | {cells} |",
    ]
    assert trainer.saving_column({"column": ["held_s"], "way": ["beside"]}) == [3.0]
