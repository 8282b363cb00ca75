"""A run's log of rollouts: written, and read as it was."""

from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

from agro_train.data import kept_ids
from agro_train.data.rollout_log import read_rollouts, rollout_to_json, write_rollouts
from agro_train.data.rows import read_jsonl
from tests.train.models import ragged_rollouts, rollout


def test_log_says_what_was_kept_where_something_was_left_out(tmp_path: Path) -> None:
    plain, other = ragged_rollouts()[:2]
    other = replace(other, kept_ids=kept_ids.encode([[i] for i in other.completion_ids]))
    assert "kept_ids" not in rollout_to_json(plain)
    write_rollouts(tmp_path / "r.jsonl", [plain, other])
    assert read_rollouts(tmp_path / "r.jsonl") == [plain, other]


def test_run_reads_its_own_log_as_it_was(tmp_path: Path) -> None:
    rollouts = [
        replace(r, step=3, temperature=0.7, rewards={"f": r.reward}, columns={"answer": "1"})
        for r in ragged_rollouts()
    ]
    rollouts[0] = replace(rollouts[0], reward=None, failure="error", source="replayed")
    path = tmp_path / "r.jsonl"
    path.write_text("".join(rollout_to_json(r) + "\n" for r in rollouts))
    assert read_rollouts(path) == rollouts


def test_log_takes_columns_json_has_no_word_for_and_broken_text(tmp_path: Path) -> None:
    columns = {"day": date(2024, 1, 2), "price": Decimal("1.5"), "raw": b"x", "text": "\ud83d"}
    write_rollouts(tmp_path / "log.jsonl", [replace(rollout("g", [1], [2]), columns=columns)])
    (row,) = read_jsonl(tmp_path / "log.jsonl")
    assert row["columns"] == {"day": "2024-01-02", "price": "1.5", "raw": "b'x'", "text": "\ud83d"}
    assert len(list(tmp_path.iterdir())) == 1
