"""agro rollout, score and eval: what they write is right, and what training takes."""

import json
import re
import shutil
from datetime import date
from pathlib import Path
from statistics import fmean

import pytest
from pyarrow import Table, parquet

from agro_train.cli import main
from agro_train.commands import score
from agro_train.commands.score import _chunks
from agro_train.config import TrainConfig
from agro_train.data.rows import read_jsonl
from agro_train.evaluate import Evaluation, estimates, summarise
from agro_train.rewards.functions import load_rewards
from agro_train.rewards.number import number_reward
from agro_train.types import Rollout
from tests.conftest import SetSizes
from tests.train.sentences import refusal

pytestmark = pytest.mark.usefixtures("no_curves")

SMALL = """
    warm_start_steps=0 reward=tests.train.reward_functions:first_even prompts_per_step=4
    num_generations=3 eval_every=0 eval_prompts=6 eval_generations=4
""".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", f"output_dir={folder}", *SMALL, "steps=2", "save_every=1"]) == 0
    return folder


@pytest.fixture(scope="module")
def recorded(run: Path) -> Path:
    """Completions of six prompts by the run's newest checkpoint."""
    path = run.parent / "recorded.jsonl"
    arguments = ["rollout", f"model={run}", *SMALL, f"--output={path}", "--prompts=6"]
    assert main(arguments) == 0
    return path


def test_rollout_records_what_training_takes(run: Path, recorded: Path, tmp_path: Path) -> None:
    rows = read_jsonl(recorded)
    assert len(rows) == 18 and len({row["group"] for row in rows}) == 6
    assert {row["step"] for row in rows} == {2}
    assert all(row["reward"] in (0.0, 1.0) for row in rows)
    settings = [*SMALL, f"recorded=[{recorded}]", "steps=1", f"output_dir={tmp_path / 'run'}"]
    assert main(["train", *settings]) == 0
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["groups"] == 4 and row["sample/recorded"] == 1.0


def test_rollout_overwrites_nothing(
    run: Path, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(["rollout", f"model={run}", *SMALL, f"--output={recorded}"], capsys)
    assert "output: expected a new name" in message
    assert "--prompts: expected at least 1" in refusal(["rollout", "--prompts=0"], capsys)


def test_score_keeps_every_other_column(recorded: Path, tmp_path: Path) -> None:
    before = [{**row, "note": i} for i, row in enumerate(read_jsonl(recorded))]
    parquet.write_table(Table.from_pylist(before), tmp_path / "r.parquet")
    reward = "reward=[tests.train.reward_functions:even_share,number]"
    arguments = ["score", str(tmp_path / "r.parquet"), reward, "reward_weights=[2,1]"]
    assert main(arguments) == 0
    after = read_jsonl(tmp_path / "r.scored.jsonl")
    for old, new in zip(before, after, strict=True):
        even = fmean(i % 2 == 0 for i in old["completion_ids"])
        columns = old["columns"]
        (right,) = number_reward([old["completion"]], [columns["answer"]], [columns["solution"]])
        assert new["rewards"] == {"even_share": even, "number": right}
        assert new["reward"] == 2 * even + right
        for name in old.keys() - {"reward", "rewards"}:
            assert new[name] == old[name], name


def test_score_takes_gold_answers_from_columns_of_their_own(tmp_path: Path) -> None:
    rows = [{"prompt": "1+2=", "completion": text, "answer": "3"} for text in ("3", "1+2=4")]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", str(path), "reward=number", f"--output={tmp_path / 'o.jsonl'}"]) == 0
    assert [row["reward"] for row in read_jsonl(tmp_path / "o.jsonl")] == [1.0, 0.0]


def test_score_takes_messages_and_verls_gold_answers(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": "1+2="}],
            "completion": [{"role": "assistant", "content": text}],
            "reward_model": {"ground_truth": 3},
            "finish_reason": "length",
        }
        for text in ("3", "1+2=4")
    ]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    output = tmp_path / "o.jsonl"
    assert main(["score", str(tmp_path / "r.json"), "reward=number", f"--output={output}"]) == 0
    assert [row["reward"] for row in read_jsonl(output)] == [1.0, 0.0]
    assert [row["completion"] for row in read_jsonl(output)] == [row["completion"] for row in rows]


def test_score_takes_what_json_has_no_word_for_and_replaces_failures(tmp_path: Path) -> None:
    row = {"completion": "3", "answer": "3", "failure": "error", "day": date(2024, 1, 2)}
    parquet.write_table(Table.from_pylist([row]), tmp_path / "r.parquet")
    output = tmp_path / "new" / "o.jsonl"
    path = str(tmp_path / "r.parquet")
    assert main(["score", path, "reward=number", f"--output={output}"]) == 0
    (found,) = read_jsonl(output)
    assert found["failure"] is None and found["day"] == "2024-01-02" and found["reward"] == 1.0


def test_score_that_is_cut_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> list[Rollout]:
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "score", interrupt)
    (tmp_path / "r.jsonl").write_text('{"completion": "3", "answer": "3"}\n')
    assert main(["score", str(tmp_path / "r.jsonl"), "reward=number"]) == 130
    assert capsys.readouterr().err == "agro: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_eval_of_a_model_takes_no_config_and_no_folder_of_a_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the model is a config.yaml of something else; one held-out prompt is too long."""
    shutil.copytree(run / "base_model", tmp_path / "model")
    (tmp_path / "config.yaml").write_text("seed: 5\nnot: a run's\n")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": text, "answer": "3"} for text in ("1+2=", "2+1=", "1" * 40 + "=")]
    Path("held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["eval_data=held.jsonl", "max_prompt_length=30", "eval_generations=0"]
    assert main(["eval", "model", *settings]) == 0
    shown = capsys.readouterr().out
    assert "held-out prompts left out: 1 as too long, 0 as" in shown
    results = json.loads(Path("evaluations/model/results.json").read_text())
    assert results["prompts"] == 2 and results["left_out"]["too_long"] == 1
    # Nothing was said of a length, so it is TrainConfig's and not the tiny model's 24 tokens.
    samples = read_jsonl(Path("evaluations/model/samples.jsonl"))
    assert max(len(row["completion_ids"]) for row in samples) <= 64
    cut_off = sum(row["finish"] == "length" for row in samples) / 2
    assert results["max_completion_length"] == 64 and results["truncated_rate"] == cut_off
    assert f"  cut off  {cut_off:.3f}  of the completions, at max_completion_length=64\n" in shown


def test_eval_and_rollout_look_first_whether_they_can_write(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("evaluate", "record"):
        late = f"agro_train.commands.{module}.load_sampler"
        monkeypatch.setattr(late, lambda _: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    there = tmp_path / "file" / "new"
    for arguments, key in (
        (["eval", str(run), f"output_dir={there}"], "output_dir"),
        (["rollout", f"--output={there}"], "output"),
    ):
        assert refusal(arguments, capsys) == (
            f"agro: {key}: expected a folder that can be written, got '{tmp_path / 'file'}': "
            "Not a directory; choose another\n"
        )
    assert refusal(["rollout", "recorded=a.jsonl", f"--output={tmp_path / 'b'}"], capsys) == (
        "agro: data: expected prompts to complete, got none; give data=FILE\n"
    )
    assert not (tmp_path / "b").exists()


def test_rollout_without_a_readable_gold_answer_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "1+2=", "answer": "no answer here"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    output = tmp_path / "out.jsonl"
    arguments = [f"model={run / 'base_model'}", *SMALL, f"data={tmp_path / 'p.jsonl'}"]
    message = refusal(["rollout", *arguments, "reward=math", f"--output={output}"], capsys)
    assert "data: expected gold answers that math-verify can parse, got none" in message
    assert not output.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["beta=1"], "arguments: expected reward, reward_weights, "),
        (["reward_weights=1"], "reward: expected reward=FUNCTION, got none"),
        (["reward=number"], "score: expected text in column completion in .*line 1, got None"),
    ],
)
def test_bad_score_is_refused(
    settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "1", "completion_ids": [4]}\n')
    assert re.search(message, refusal(["score", str(path), *settings], capsys))
    assert not (tmp_path / "r.scored.jsonl").exists()


def test_chunks_keep_groups_whole(set_sizes: SetSizes) -> None:
    set_sizes(score, SCORED_AT_ONCE=4)
    rows = [((i, {}), scored(g, "", None)) for i, g in enumerate("aaabbbccddddddde")]
    found = list(_chunks(rows))
    assert [row for chunk in found for row in chunk] == rows
    assert ["".join(row.group for _, row in chunk) for chunk in found] == [
        "aaabbb",
        "ccddddddd",
        "e",
    ]


def test_eval_of_a_run_writes_estimates_and_samples(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run)]) == 0
    printed = capsys.readouterr().out
    folder = run / "evaluations" / "checkpoint-2"
    results = json.loads((folder / "results.json").read_text())
    assert results["step"] == 2 and results["prompts"] == 6 and results["generations"] == 4
    for name in ("greedy", "pass@1", "pass@2", "pass@4", "maj@2", "maj@4"):
        estimate = results[name]
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1, name
        assert f"{name}  {estimate['value']:.3f}" in printed
    samples = read_jsonl(folder / "samples.jsonl")
    assert len(samples) == 6 + 24
    sampled = [row["reward"] for row in samples if row["temperature"]]
    assert 0 < fmean(sampled) < 1
    assert results["pass@1"]["value"] == pytest.approx(fmean(sampled))
    assert "output_dir: expected a new name" in refusal(["eval", str(run)], capsys)
    assert results["left_out"] == {"too_long": 0, "unreadable_gold": 0}
    assert results["error_rate"] == 0.0 and "left out" not in printed
    # The same numbers again, for a checkpoint by its own name.
    again = tmp_path / "again"
    assert main(["eval", str(run / "checkpoint-2"), f"output_dir={again}"]) == 0
    assert json.loads((again / "results.json").read_text()) == results
    assert main(["eval", str(run / "checkpoint-1"), "eval_generations=0"]) == 0
    early = json.loads((run / "evaluations" / "checkpoint-1" / "results.json").read_text())
    assert early["step"] == 1 and "greedy" in early and "pass@1" not in early


def scored(group: str, completion: str, value: float | None) -> Rollout:
    rewards = {"number": value, "other": 5.0}
    return Rollout(group, "", (1,), completion, (2,), "stop", value, rewards=rewards)


def test_estimates_of_two_prompts() -> None:
    sampled = [scored("a", text, float(text == "3")) for text in ("3", "3", "4", "no")]
    sampled += [scored("b", text, float(text == "7")) for text in ("8", "8", "7", "9")]
    result = Evaluation([scored("a", "3", 1.0), scored("b", "8", None)], sampled)
    config = TrainConfig(reward=["number"], eval_generations=4)
    found = estimates(result, load_rewards(config), config)
    assert found["greedy"].value == 0.5
    assert found["pass@1"].value == (0.5 + 0.25) / 2
    assert found["pass@2"].value == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2)
    assert found["pass@4"].value == 1.0 and found["maj@4"].value == 0.5
    assert (found["greedy"].low, found["greedy"].high) == (0.0, 1.0)
    summary = summarise(result)
    assert summary["eval_pass@1"] == found["pass@1"].value and summary["eval_pass@4"] == 1.0
