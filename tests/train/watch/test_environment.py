"""environment.json: every start of a run is in it, whatever was there before."""

from pathlib import Path

import pytest
from accelerate import Accelerator

from agro_train.watch.environment import git_commit, read_starts, record_start


@pytest.mark.parametrize("text", ["", '[{"run_id": "a', "{}", "[1]", "\udcff"])
def test_environment_that_cannot_be_read_is_written_anew(text: str, tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    path.write_text(text, errors="surrogateescape")
    assert read_starts(tmp_path) == []
    run_id = record_start(tmp_path, 3, Accelerator(cpu=True), resumed=True)
    (start,) = read_starts(tmp_path)
    assert start["run_id"] == run_id and start["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


def test_commit_is_of_the_repository_that_tracks_the_file(tmp_path: Path) -> None:
    assert git_commit(tmp_path / "module.py") is None  # tracked by nobody
