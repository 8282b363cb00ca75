"""The benchmark of attention's memory: its micro-batch, its masks, its rows and their table."""

from pathlib import Path
from typing import Any

import pytest

from agro_train.policy.attention import BLOCK, block_mask
from benchmarks.measure.rows import read_csv
from benchmarks.pages import trainer
from benchmarks.trainer import attention_memory


def test_a_micro_batch_has_the_tokens_that_are_asked_for() -> None:
    micro = attention_memory.micro_batch(1024)
    assert len(micro.input_ids) == 1024 and len(micro.rows) == 16 and micro.longest == 64 + 56
    assert len(micro.segments.unique()) == 2 + 16, "two prompts, each packed once"


def test_a_mask_is_counted_with_what_its_function_reads() -> None:
    micro = attention_memory.micro_batch(1024)
    assert attention_memory.mask_bytes(micro.attends()) == 1024**2
    mask = block_mask(micro.segments, micro.parents, micro.position_ids)
    blocks = 1024 // BLOCK
    # Columns and their number, of whole blocks and of parts of them, by rows and by columns; and
    # four numbers of 8 bytes a token.
    assert attention_memory.mask_bytes(mask) == 4 * 4 * (blocks**2 + blocks) + 4 * 8 * 1024


@pytest.mark.parametrize("form", ["forward", "forward_backward"])
def test_a_pass_takes_more_than_its_mask(form: str) -> None:
    found = attention_memory.measure("sdpa", form, 1024)
    assert found["mask_mb"] == 1.048576
    assert found["peak_mb"] > found["mask_mb"]


def made_up(attention: str, form: str, tokens: int) -> dict[str, float]:
    """No measurement: a number that tells the cells apart."""
    place = attention_memory.CASES.index((attention, form))
    return {"mask_mb": place + tokens / 1e5, "peak_mb": tokens / 100 + place}


def test_a_row_a_case_and_a_row_of_the_table_a_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_memory, "in_a_process", made_up)
    monkeypatch.setattr(trainer, "RESULTS", tmp_path)
    out = tmp_path / "bench_attention_memory.csv"
    assert attention_memory.main(["--lengths", "1024", "2048", "--out", str(out)]) == 0
    rows = read_csv(out)
    cases = [(row["attention"], row["form"]) for row in rows]
    assert cases == [case for case in attention_memory.CASES for _ in range(2)]
    assert [row["tokens"] for row in rows] == ["1024", "2048"] * 3
    assert trainer.attention_memory({})[2:] == [
        "| 1,024 | 0.01 | 2.01 | 10 | 12 | 11 |",
        "| 2,048 | 0.02 | 2.02 | 20 | 22 | 21 |",
    ]
    asked = {"attention": ["sdpa"], "form": ["forward"], "column": ["peak_mb"]}
    assert trainer.attention_grows(asked) == [2.0]


def test_lengths_are_of_whole_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attention_memory.main(["--lengths", "1000"])
    expected = "expected multiples of 512, the tokens of a group, got 1000; name 1024"
    assert expected in capsys.readouterr().err


def test_a_case_that_fails_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*case: Any) -> None:
        del case

    monkeypatch.setattr(attention_memory, "in_a_process", fails)
    out = tmp_path / "rows.csv"
    assert attention_memory.main(["--lengths", "512", "--out", str(out)]) == 1
    assert not out.exists() and "sdpa, forward, 512 tokens: failed" in capsys.readouterr().out
