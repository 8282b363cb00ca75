"""Files, folders and hub datasets: read whatever form they have, or refused at once, by name."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict

from agro_train.cli import main
from agro_train.config import TrainConfig, load
from agro_train.data.prompts import load_rows
from agro_train.data.rows import numbered_rows, read_jsonl
from agro_train.data.sources import check_sources, read_sources
from agro_train.questions import check_files
from agro_train.refusal import Refusal

ROWS = [{"question": "1+2=", "answer": "3"}, {"question": "2+2=", "answer": "4"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "question,answer\n1+2=,3\n2+2=,4\n"


def read(source: object) -> list[dict[str, Any]]:
    return [row for _, rows in read_sources(str(source), "train") for row in rows]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", LINES),
        ("d.ndjson", LINES),
        ("d.json", LINES),
        ("d.json", json.dumps(ROWS)),
        ("d.json", "\n " + json.dumps(ROWS, indent=2)),
        ("d.csv", CSV),
        ("D.CSV", "\ufeff" + CSV.replace("\n", "\r\n")),
        ("d.tsv", CSV.replace(",", "\t")),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_of_file_gives_the_same_rows(
    name: str, content: str, packed: bool, tmp_path: Path
) -> None:
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    assert read(path) == ROWS
    assert [row["prompt"] for row in load_rows(str(path), "train")] == ["1+2=", "2+2="]


def test_cells_of_csv_are_text_as_it_stands_and_empty_ones_null(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('prompt,answer,note\n"a, ""b""\nc",007,\nd,"1,000",NA\ne,,1e5\n')
    assert read(path) == [
        {"prompt": 'a, "b"\nc', "answer": "007", "note": None},
        {"prompt": "d", "answer": "1,000", "note": "NA"},
        {"prompt": "e", "answer": None, "note": "1e5"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"prompt": "1"}\n{"prompt": "\xff"}\n', "a JSON object in .*d.jsonl, line 2"),
        ("d.jsonl", b'[{"prompt": "1"}]', "a JSON object in .*d.jsonl, line 1"),
        ("d.json", b'[{"prompt": "1"}, 2]', "a JSON object in .*d.json, row 2, got '2'"),
        ("d.json", b'[{"prompt": "1"},', "a JSON list in .*d.json: "),
        ("d.csv", b"a,b\n1,2\n1,2,3\n", "2 cells in .*d.csv, row 2 .line 3., got another number"),
        ("d.csv", b"a,b\n1\n", "2 cells in .*d.csv, row 1"),
        ("d.csv", b"a,b\n\xff,2\n", "CSV in UTF-8 in .*d.csv, line 2"),
        ("d.csv", b'a,b\n"x"y,2\n', "CSV in UTF-8 in .*d.csv, line 2"),
        ("d.jsonl.gz", b"no gzip", "a gzip file, got .*d.jsonl.gz"),
        (
            "d.jsonl.gz",
            gzip.compress(LINES.encode(), mtime=0)[:30],
            "a gzip file, got .*d.jsonl.gz",
        ),
        ("d.parquet", b"PAR1 and no more", "a parquet file, got .*d.parquet"),
        ("d.xlsx", b"", "a file of .jsonl, .ndjson, .json, .csv, .tsv, .parquet .or .gz., got"),
    ],
)
def test_broken_file_is_refused_with_its_place(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match=f"^data: expected {message}"):
        read(tmp_path / name)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="nowhere.jsonl"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(
        Refusal, match="^recorded: expected a file of rows, got .*; there is no such"
    ):
        numbered_rows(tmp_path / "nowhere.csv", "recorded")


def test_folder_of_save_to_disk_is_read_with_its_splits(tmp_path: Path) -> None:
    one, other = Dataset.from_list(ROWS[:1]), Dataset.from_list(ROWS[1:])
    one.save_to_disk(tmp_path / "one")
    DatasetDict(train=one, test=other).save_to_disk(tmp_path / "both")
    DatasetDict(dev=other).save_to_disk(tmp_path / "dev")
    assert read(tmp_path / "one") == read(tmp_path / "both") == ROWS[:1]
    assert load_rows(str(tmp_path / "both"), "eval")[0]["prompt"] == "2+2="
    assert read(f"{tmp_path / 'both'}@test") == read(f"{tmp_path / 'dev'}@dev") == ROWS[1:]
    with pytest.raises(Refusal, match="a split train in .*dev', got dev; name one: .*dev@SPLIT"):
        read(tmp_path / "dev")
    with pytest.raises(Refusal, match="expected no split, as there is one dataset .*, got 'x'"):
        read(f"{tmp_path / 'one'}@x")


def test_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="expected a folder of save_to_disk or of data files, got"):
        read(tmp_path)


def test_several_files_are_one_dataset(tmp_path: Path) -> None:
    first, second = tmp_path / "a.csv", tmp_path / "b.jsonl"
    first.write_text("question,answer\n1+2=,3\n")
    second.write_text(json.dumps({"prompt": "2+2=", "answer": 4}) + "\n")
    for source in (f"{first},{second}", f"{first}, {second}"):
        rows = load_rows(source, "train")
        assert [(row["prompt"], row["answer"]) for row in rows] == [("1+2=", "3"), ("2+2=", 4)]
    (tmp_path / "c.csv").write_text("question,answer\n3+2=,5\n")
    assert [row["answer"] for row in read(tmp_path / "*.csv")] == ["3", "5"]
    with pytest.raises(Refusal, match="data: expected files, got .*x.json', which matches none"):
        read(tmp_path / "*x.json")
    comma = tmp_path / "with, comma.csv"
    comma.write_text(CSV)
    assert read(comma) == ROWS


@pytest.mark.parametrize("setting", ["data=[a.csv,b.jsonl]", "data=a.csv,b.jsonl"])
def test_several_files_may_stand_as_a_list(setting: str) -> None:
    assert load(None, [setting]).data == "a.csv,b.jsonl"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "d.csv"}, "data: expected a file or folder, got 'd.csv'; there is none of that"),
        ({"data": "tran.jsonl"}, "data: .* got 'tran.jsonl'; .*; nearest: train.jsonl"),
        ({"data": "./rows"}, "data: expected a file or folder, got './rows'; there is none"),
        ({"data": "a/b/c"}, "data: expected a file or folder, got 'a/b/c'"),
        ({"data": "train.jsonl,d.parquet"}, "data: expected a file or folder, got 'd.parquet'"),
        ({"data": "my data"}, "data: expected a task .*, got 'my data'; the full name of a hub"),
        ({"data": ","}, "data: expected a task .* got ','"),
        ({"data": "train.jsonl@test"}, "data: expected no split behind a file, got"),
        ({"eval_data": "e.csv"}, "eval_data: expected a file or folder, got 'e.csv'"),
        (
            {"recorded": ["r.jsonl"]},
            "recorded: expected a file of rows, got 'r.jsonl'; there is no",
        ),
        (
            {"chat_template": "t.jinja"},
            "chat_template: expected a file, got 't.jinja'; there is no",
        ),
    ],
)
def test_missing_file_or_folder_is_named_before_anything_is_loaded(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", None)  # no hub is asked
    (tmp_path / "train.jsonl").write_text(LINES)
    with pytest.raises(Refusal, match=f"^{message}"):
        check_files(TrainConfig(**settings), recorded=True)


def test_train_rollout_and_eval_name_a_missing_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the tokenizer: the model is not looked for."""
    monkeypatch.chdir(tmp_path)
    for command in (["train", "model=no/such"], ["rollout", "model=no/such"], ["eval", "no/such"]):
        assert main([*command, "data=d.csv"]) == 2
        assert "agro: data: expected a file or folder, got 'd.csv'" in capsys.readouterr().err


class Hub:
    """In the place of the hub's client and `datasets.load_dataset`: keeps what they are asked."""

    def __init__(self, patch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.error, self.asked, self.loaded = error, [], []
        patch.setattr(huggingface_hub, "HfApi", lambda: self)
        patch.setattr(datasets, "load_dataset", self.load_dataset)

    def dataset_info(self, name: str, timeout: float) -> None:
        self.asked.append((name, timeout))
        if self.error is not None:
            raise self.error

    def load_dataset(self, path: str, name: str | None, split: str) -> Dataset:
        offline = datasets.config.HF_HUB_OFFLINE
        self.loaded.append((path, name, split, offline))
        if path == "no/such":
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub")
        return Dataset.from_list(ROWS)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("openai/gsm8k:main@test", ("openai/gsm8k", "main", "test")),
        ("openai/gsm8k:main", ("openai/gsm8k", "main", "train")),
        ("gsm8k@train[:10%]", ("gsm8k", None, "train[:10%]")),
        ("owner/name-1.5_x", ("owner/name-1.5_x", None, "train")),
    ],
)
def test_hub_dataset_is_named_with_configuration_and_split(
    source: str, expected: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    check_sources(source)
    assert not hub.asked  # to check what is here costs no request
    assert read(source) == ROWS
    assert hub.loaded == [(*expected, datasets.config.HF_HUB_OFFLINE)]
    assert load_rows(source, "eval")[0]["prompt"] == "1+2="
    assert hub.loaded[1][2] == (expected[2] if "@" in source else "test")


def test_hub_that_cannot_be_reached_is_asked_once_and_what_is_kept_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = datasets.config.HF_HUB_OFFLINE
    hub = Hub(monkeypatch, OSError("Name or service not known"))
    assert read("openai/gsm8k:main@train") == ROWS
    assert hub.asked == [("openai/gsm8k", 5.0)]
    assert hub.loaded == [("openai/gsm8k", "main", "train", True)]
    with pytest.raises(
        Refusal, match="data: .* a hub dataset, got 'no/such', .* cannot be reached"
    ):
        read("no/such")
    assert datasets.config.HF_HUB_OFFLINE is before


def test_unreachable_hub_dataset_is_refused_in_seconds() -> None:
    """With the libraries as they are: retries alone would take half a minute."""
    began = time.monotonic()
    with pytest.raises(Refusal, match="data: expected .* a hub dataset, got 'no/such-dataset'"):
        load_rows("no/such-dataset", "train")
    assert time.monotonic() - began < 20
