"""The record of a run: what starting, resuming and failing leave of it."""

import json
from pathlib import Path

import pytest

from agro_train.refusal import Refusal
from agro_train.run_folder import RunFolder
from tests.train.files import largest_file, names


def test_folder_with_a_config_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(ValueError, match="output_dir: expected a folder without a run"):
        RunFolder(tmp_path).check_unused()


def test_rewind_leaves_scored_logs_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create("")
    for name in ("step-000001", "step-000002", "step-000002.scored"):
        (tmp_path / "rollouts" / f"{name}.jsonl").write_text("")
    folder.rewind(1, "")
    left = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert left == ["step-000001.jsonl", "step-000002.scored.jsonl"]


def test_full_disk_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create("a: 1\n")
    folder.log(1, {"reward": 0.5})
    before = folder.metrics.read_bytes()
    with largest_file(len(before) + 10):
        with pytest.raises(OSError, match="File too large"):
            folder.log(2, {"reward": 0.25})  # some of its bytes do go in
        with pytest.raises(OSError, match="File too large"):
            folder.rewind(1, "b: 1\n" * 100)
    assert folder.metrics.read_bytes() == before
    assert folder.config.read_text() == "a: 1\n"
    assert names(tmp_path) == {"config.yaml", "metrics.jsonl", "rollouts", "samples"}
    folder.log(2, {"reward": 0.25})
    assert [json.loads(row)["step"] for row in folder.metrics.read_text().splitlines()] == [1, 2]


def test_start_without_a_checkpoint_keeps_the_record_aside(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for attempt in (1, 2, 3):
        folder.create(f"a: {attempt}\n")
        assert not names(tmp_path / "rollouts") and not names(tmp_path / "samples")
        assert not folder.metrics.exists() and not folder.page.exists()
        if attempt < 3:
            folder.log(attempt, {"reward": 0.5})
            folder.page.write_text("old")
            for name in ("rollouts/step-000001.jsonl", "rollouts/.partial-step-000002.jsonl"):
                (tmp_path / name).write_text(f"{attempt}")
            (tmp_path / "samples" / "step-000000.jsonl").write_text(f"{attempt}")
    folder.create("a: 4\n")  # nothing was recorded: there is nothing to keep
    assert names(tmp_path) == {
        *("config.yaml", "rollouts", "samples", "unfinished-1", "unfinished-2")
    }
    for attempt in (1, 2):
        aside = tmp_path / f"unfinished-{attempt}"
        assert names(aside) == {"metrics.jsonl", "rollouts", "samples"}
        assert names(aside / "rollouts") == {"step-000001.jsonl"}
        assert (aside / "rollouts" / "step-000001.jsonl").read_text() == f"{attempt}"
        assert (aside / "samples" / "step-000000.jsonl").read_text() == f"{attempt}"
        assert json.loads((aside / "metrics.jsonl").read_text())["step"] == attempt
    assert folder.config.read_text() == "a: 4\n"


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"reward": 1}', b'{"step": "2"}', b"\xff\xfe", b"\0\0", b"null"]
)
def test_damaged_row_is_refused_by_its_line_and_nothing_is_changed(
    line: bytes, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.create("a: 1\n")
    folder.metrics.write_bytes(b'{"step": 1}\n\n' + line + b'\n{"step": 3}\n')
    before = folder.metrics.read_bytes()
    for what in (lambda: folder.evaluated(1), lambda: folder.rewind(1, "b: 2\n")):
        with pytest.raises(Refusal) as error:
            what()
        assert str(error.value) == (
            f"metrics.jsonl: expected a row of JSON with its step in {folder.metrics}, line 3, got "
            f"{line!r}; delete that line, or put a copy of the file back"
        )
    assert folder.metrics.read_bytes() == before and folder.config.read_text() == "a: 1\n"


def test_rewind_makes_what_was_deleted_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create("")
    folder.log(1, {"reward": 0.5})
    for name in ("rollouts", "samples"):
        (tmp_path / name).rmdir()
    folder.rewind(1, "")
    assert names(tmp_path) == {"config.yaml", "metrics.jsonl", "rollouts", "samples"}
