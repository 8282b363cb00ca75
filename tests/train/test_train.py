"""Whole runs on the tiny model: what they leave behind, offline data, resuming, refusals."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

import agro_train.train
from agro_train import config as configuration
from agro_train.cli import main
from agro_train.data.rows import read_jsonl
from agro_train.watch.display import Display
from agro_train.watch.plots import plot_run
from tests.train.models import rollout
from tests.train.sentences import refusal
from tests.train.test_callbacks import Recording

pytestmark = pytest.mark.usefixtures("no_curves")

QUICK = """
    warm_start_steps=30 reward=tests.train.reward_functions:even_share steps=4 prompts_per_step=4
    num_generations=4 eval_every=2 eval_prompts=8 eval_generations=1 save_every=2 warmup_steps=0
""".split()


def train(folder: Path, *settings: str) -> int:
    return main(["train", f"output_dir={folder}", *QUICK, *settings])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        draw_curves(patch)
        assert train(folder) == 0
    return folder


def draw_curves(patch: pytest.MonkeyPatch) -> None:
    """In the runs whose curves are looked at."""
    patch.setattr(agro_train.train, "plot_run", plot_run)


def from_base(finished: Path) -> list[str]:
    """The finished run's model as it was warm-started, without doing it again, and its settings."""
    return ["tiny-arithmetic", f"model={finished / 'base_model'}", "warm_start_steps=0"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The record without what a clock, or the machine's memory, measured."""
    clocks = ("time_s", "eval_time_s", "tokens_per_s", "memory_gb")
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def assert_resumes_to(whole: Path, folder: Path, *arguments: str) -> None:
    """The run in `folder` goes on (as it is, or with these arguments) to the metrics and the bits
    of `whole`."""
    assert main(["train", *(arguments or ("--resume", str(folder)))]) == 0
    assert metrics(folder) == metrics(whole)
    ours, theirs = weights(folder / "checkpoint-4"), weights(whole / "checkpoint-4")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_run_leaves_everything_behind(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "rollouts", "samples", "plots", "base_model"} <= names
    assert configuration.load(finished / "config.yaml").steps == 4
    rows = read_jsonl(finished / "metrics.jsonl")
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for key in ("reward", "kl", "entropy", "loss", "grad_norm", "time_s", "tokens_per_s", "epoch"):
        assert all(isinstance(row[key], float) for row in steps), key
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [0, 2, 4]
    assert steps[0]["kl"] == 0.0
    for name in ("reward", "kl", "entropy", "length", "overview"):
        assert (finished / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_jsonl(finished / "rollouts" / "step-000001.jsonl")) == 16


def test_checkpoint_is_a_model_transformers_loads(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "checkpoint-4")
    tokenizer = AutoTokenizer.from_pretrained(finished / "checkpoint-4")
    assert tokenizer("1+2=")["input_ids"] == [3, 12, 4, 13]
    base = load_file(finished / "base_model" / "model.safetensors")
    assert any(not torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_resumed_run_is_bitwise_the_uninterrupted_one(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoint-4")  # as if it had died in step 3 or later,
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # in the middle of a line
    assert_resumes_to(finished, folder)
    assert not [p for p in folder.iterdir() if "partial" in p.name]


def test_run_killed_before_its_report_is_completed(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw_curves(monkeypatch)
    folder = tmp_path / "last"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("report.html", "plots"))
    rows = read_jsonl(folder / "metrics.jsonl")
    assert rows[-1]["step"] == 4 and "eval_accuracy" in rows[-1]
    # As if its last evaluation had failed, too, for which what was learned is saved.
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    (folder / "samples" / "step-000004.jsonl").unlink()
    assert main(["train", "--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(finished)
    for name in ("report.html", "plots/overview.png", "samples/step-000004.jsonl"):
        assert (folder / name).stat().st_size
    message = refusal(["train", "--resume", str(folder)], capsys)
    assert "steps: expected more than the 4" in message


def test_ranks_wait_for_a_checkpoint() -> None:
    done: list[str] = []
    saver, run = MagicMock(), MagicMock()
    saver.save = lambda *_, **__: done.append("save")
    saver.complete.side_effect = [None, 1]  # nothing from before; then the one just written
    run.accelerator.wait_for_everyone = lambda: done.append("wait")
    agro_train.train.save(run, saver, 1, last=True)
    assert done == ["save", "wait"]


def test_error_of_one_rank_leaves_the_process_group_alone(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may be in a collective, and leaving it takes all; the trackers are finished."""
    tracker, ended = MagicMock(), []

    def full_disk(run: Any) -> None:
        run.accelerator.trackers = [tracker]
        run.accelerator.end_training = lambda: ended.append(True)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(agro_train.train, "train", full_disk)
    assert train(tmp_path / "full", *from_base(finished)) == 2
    tracker.finish.assert_called_once_with()
    assert not ended


def sends_sigterm(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """The call of a function of train.py with this number, from 1, is interrupted."""
    function, calls = getattr(agro_train.train, name), []

    def interrupted(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")
        return function(*arguments)

    monkeypatch.setattr(agro_train.train, name, interrupted)


def test_signal_while_completions_are_sampled_drops_them(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the second step, and then, of the run that goes on, of its second evaluation."""
    folder = tmp_path / "run"
    starts = ([f"output_dir={folder}", *QUICK, *from_base(finished)], ["--resume", str(folder)])
    for arguments, name, call, saved in (
        (starts[0], "collect", 2, 1),
        (starts[1], "evaluate", 1, 2),
    ):
        with pytest.MonkeyPatch.context() as patch:
            sends_sigterm(patch, name, call)
            assert main(["train", *arguments]) == 143
        assert capsys.readouterr().err == (
            f"agro: interrupted by SIGTERM; {saved} of 4 steps are saved, and agro train --resume "
            f"{folder} goes on from there\n"
        )
        steps = [row["step"] for row in metrics(folder) if "reward" in row]
        assert steps == list(range(1, saved + 1))
        assert (folder / f"checkpoint-{saved}").is_dir()
        assert len(list((folder / "rollouts").iterdir())) == saved
        assert [path.name for path in (folder / "samples").iterdir()] == ["step-000000.jsonl"]
    assert_resumes_to(finished, folder, *starts[1])


def test_callbacks_are_told_and_may_end_a_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Recording.told.clear()
    settings = [*from_base(finished), "save_every=0", "callbacks=tests.train.test_callbacks:"]
    assert train(tmp_path / "run", *settings[:-1], settings[-1] + "Recording") == 0
    assert Recording.told == [
        ("begin", 4, "run"),
        ("evaluate", 0, True, 16),  # 8 prompts, one greedy completion and one sampled
        ("step", 1, 4.0, 16),
        ("step", 2, 4.0, 16),
        ("evaluate", 2, True, 16),
        ("save", 2, True),
        ("end", 2),
    ]
    assert "A callback ended the run after 2 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").is_file()
    assert train(tmp_path / "bad", *settings[:-1], "eval_every=0", settings[-1] + "Raising") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("agro: callbacks: expected on_step_end of ")
    assert (tmp_path / "bad" / "checkpoint-1").is_dir()  # what was learned is not lost


def test_learning_rate_and_beta_change_in_mid_run_and_the_record_says_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(finished, folder)
    assert main(["train", "--resume", str(folder), "steps=6", "learning_rate=0.03", "beta=1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "; beta is now 1.0, was 0.01; steps is now 6, was 4; learning_rate is now" in said
    first, second = json.loads((folder / "environment.json").read_text())
    assert "changed" not in first and second["changed"] == {
        "beta": {"was": 0.01, "now": 1.0},
        "steps": {"was": 4, "now": 6},
        "learning_rate": {"was": 3e-4, "now": 0.03},
    }
    rows = [row for row in metrics(folder) if "reward" in row]
    # Linear to 0 in 6 steps: what the optimiser has after the fifth is a sixth of the highest.
    assert [row["learning_rate"] for row in rows[4:]] == [pytest.approx(0.03 / 6), 0.0]
    assert [row["loss"] for row in rows[4:]] == [
        pytest.approx(row["agro/variance"] / 2) for row in rows[4:]
    ]
    assert configuration.load(folder / "config.yaml").beta == 1.0
    page = (folder / "report.html").read_text()
    assert "beta from 0.01 to 1.0, steps from 4 to 6, learning_rate from 0.0003 to 0.03" in page


def test_epochs_in_place_of_steps_and_completions_that_were_cut_off(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six prompts, four a step: two steps. Four tokens are too few for nearly every answer."""
    folder = tmp_path / "epoch"
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data={tmp_path / 'p.jsonl'}", "eval_prompts=0", "max_completion_length=4"]
    epochs = [setting for setting in QUICK if not setting.startswith("steps=")]
    epochs += ["num_train_epochs=1", "mask_truncated_completions=true"]
    arguments = ["train", f"output_dir={folder}", *from_base(finished), *epochs, *settings]
    assert main(arguments) == 0
    steps = metrics(folder)
    assert [row["step"] for row in steps] == [1, 2]
    assert [row["epoch"] for row in steps] == [0.0, 4 / 6]
    for row in steps:
        assert row["dropped"] == 16 * row["completions/clipped_ratio"] > 0
        assert row["reward"] is not None  # what they earned is in the record all the same
    assert configuration.load(folder / "config.yaml").steps == 2
    message = refusal(["train", "--resume", str(folder)], capsys)
    assert "num_train_epochs: expected more than the 2 steps that " in message


def test_deleted_rollouts_do_not_stop_a_resume(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("rollouts", "checkpoint-4"))
    assert_resumes_to(finished, folder)


def test_damaged_record_is_refused_on_resume_and_left_as_it_was(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damaged = (folder / "metrics.jsonl").read_bytes().replace(b'{"step": 1', b'{"ste', 1)
    (folder / "metrics.jsonl").write_bytes(damaged)
    message = refusal(["train", "--resume", str(folder), "steps=5"], capsys)
    assert "metrics.jsonl: expected a row of JSON with its step in " in message
    assert ", line 2, got b'{\"ste, " in message and "delete that line" in message
    assert (folder / "metrics.jsonl").read_bytes() == damaged


def test_resume_can_go_on_for_longer(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "longer"
    shutil.copytree(finished, folder)
    assert main(["train", "--resume", str(folder), "steps=5"]) == 0
    assert [row["step"] for row in metrics(folder) if "reward" in row] == [1, 2, 3, 4, 5]


def test_run_without_warm_start_resumes(tmp_path: Path) -> None:
    assert train(tmp_path / "cold", "warm_start_steps=0", "steps=1") == 0
    assert main(["train", "--resume", str(tmp_path / "cold"), "steps=2"]) == 0


def test_run_on_its_own_recorded_rollouts_repeats_the_step(finished: Path, tmp_path: Path) -> None:
    """Offline AGRO on what the policy generated is on-policy AGRO's first step: same loss, same
    gradient.
    """
    recorded = finished / "rollouts" / "step-000001.jsonl"
    assert train(tmp_path / "offline", f"recorded=[{recorded}]", "steps=1") == 0
    offline = next(row for row in metrics(tmp_path / "offline") if "reward" in row)
    online = next(row for row in metrics(finished) if "reward" in row)
    assert offline["reward"] == online["reward"] > 0
    # No prompts were asked for, so there are none to be evaluated on.
    assert not any("eval_accuracy" in row for row in metrics(tmp_path / "offline"))
    assert offline["epoch"] == 0.0  # before its step
    for key in ("loss", "grad_norm"):  # the groups come in another order, so sums round differently
        assert offline[key] == pytest.approx(online[key], rel=1e-5), key


def test_mixed_run_takes_its_share_from_the_record(finished: Path, tmp_path: Path) -> None:
    recorded = finished / "rollouts" / "step-000001.jsonl"
    settings = [f"recorded=[{recorded}]", "recorded_fraction=0.5", "lr_weight=0.5", "steps=1"]
    assert train(tmp_path / "mixed", *settings, *from_base(finished)) == 0
    rollouts = read_jsonl(tmp_path / "mixed" / "rollouts" / "step-000001.jsonl")
    assert len(rollouts) == 16
    known = [(row["prompt_ids"], row["completion_ids"]) for row in read_jsonl(recorded)]
    assert all((row["prompt_ids"], row["completion_ids"]) in known for row in rollouts[8:])
    assert {row["group"] for row in rollouts[8:]} <= {row["group"] for row in read_jsonl(recorded)}


def test_prompt_that_comes_twice_in_a_step_makes_two_groups(finished: Path, tmp_path: Path) -> None:
    recorded = finished / "rollouts" / "step-000001.jsonl"
    settings = [f"recorded=[{recorded}]", "prompts_per_step=8", "steps=1"]
    assert train(tmp_path / "twice", *settings, *from_base(finished)) == 0
    row = next(row for row in metrics(tmp_path / "twice") if "reward" in row)
    assert row["groups"] == 8


@pytest.fixture(scope="module")
def mixed_sources(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on all three kinds of groups: of four a step, one fresh, two replayed, one recorded."""
    folder = tmp_path_factory.mktemp("runs") / "sources"
    settings = [
        *from_base(finished),
        f"recorded=[{finished / 'rollouts' / 'step-000001.jsonl'}]",
        "recorded_fraction=0.25",
        "replay_fraction=0.5",
        "replay_max_staleness=2",
    ]
    assert train(folder, *settings) == 0
    return folder


def test_groups_come_from_all_three_sources(mixed_sources: Path) -> None:
    logs = sorted((mixed_sources / "rollouts").iterdir())
    past: list[Any] = []
    for step, log in enumerate(logs):
        rows = read_jsonl(log)
        sources = [row["source"] for row in rows]
        replayed = min(2, len(past) // 4) * 4
        assert sources == ["fresh"] * (12 - replayed) + ["replayed"] * replayed + ["recorded"] * 4
        for row in rows:
            if row["source"] == "replayed":
                assert 1 <= step - row["step"] <= 2
                assert {**row, "source": "fresh"} in past
        past += [row for row in rows if row["source"] == "fresh"]
    steps = [row for row in metrics(mixed_sources) if "reward" in row]
    assert [row["sample/recorded"] for row in steps] == [0.25] * 4
    assert [row["sample/replayed"] for row in steps] == [0.0, 0.5, 0.5, 0.5]
    assert steps[0]["sample/staleness_mean"] == 0.0
    assert all(row["sample/staleness_mean"] >= 2 / 3 for row in steps[1:])
    assert [row["epoch"] for row in steps] == sorted(row["epoch"] for row in steps)


def test_run_that_replays_resumes_bitwise(mixed_sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(mixed_sources, folder)
    shutil.rmtree(folder / "checkpoint-4")
    assert_resumes_to(mixed_sources, folder)


def test_run_that_replays_goes_on_with_fresh_groups_where_its_record_is_gone(
    mixed_sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "resumed"
    gone = shutil.ignore_patterns("rollouts", "checkpoint-4")
    shutil.copytree(mixed_sources, folder, ignore=gone)
    assert main(["train", "--resume", str(folder)]) == 0
    assert "the rollouts of 2 past steps are gone; fresh" in " ".join(
        capsys.readouterr().out.split()
    )
    for step, replayed in ((3, 0), (4, 8)):
        rows = read_jsonl(folder / "rollouts" / f"step-00000{step}.jsonl")
        fresh = 12 - replayed
        expected = ["fresh"] * fresh + ["replayed"] * replayed + ["recorded"] * 4
        assert [row["source"] for row in rows] == expected


def test_recorded_run_asks_the_reference_once(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The values on disk serve the next run, which takes the same steps without asking."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    log = finished / "rollouts" / "step-000001.jsonl"
    settings = [f"recorded=[{log}]", "steps=2", "eval_every=0", "save_every=0"]
    settings += from_base(finished)
    assert train(tmp_path / "first", *settings) == 0
    assert "log-probabilities of 16 rollouts computed" in capsys.readouterr().out
    assert train(tmp_path / "second", *settings) == 0
    assert "computed" not in capsys.readouterr().out
    assert metrics(tmp_path / "second") == metrics(tmp_path / "first")
    first, second = metrics(tmp_path / "first")
    assert first["kl"] == pytest.approx(0.0, abs=1e-5) and abs(second["kl"]) > 1e-5


def test_reward_that_always_fails_stops_the_run_before_its_first_step(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, and the folder takes the run whose reward is mended."""
    folder = tmp_path / "broken"
    settings = ["steps=1", *from_base(finished)]
    assert train(folder, *settings, "reward=tests.train.reward_functions:broken_reward") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("agro: reward: expected rewards for the first step, got a failure")
    assert metrics(folder) and list(folder.glob("samples/*"))  # of the evaluation before the step
    assert train(folder, *settings, "eval_every=0") == 0
    assert [row["step"] for row in metrics(folder)] == [1]
    assert not list(folder.glob("samples/*"))
    assert list(folder.glob("unfinished-1/samples/*"))


@pytest.mark.parametrize(
    ("name", "failure", "settings"),
    [
        ("flaky_reward", "error", ["steps=4"]),
        ("odd_ones_hang", "timeout", ["steps=2", "reward_timeout_s=1.0"]),
    ],
    ids=["raises", "hangs"],
)
def test_reward_that_fails_now_and_then_costs_no_step(
    name: str, failure: str, settings: list[str], finished: Path, tmp_path: Path
) -> None:
    functions = "tests.train.reward_functions"
    rewards = [f"reward=[{functions}:even_share,{functions}:{name}]", "reward_weights=[1,0.5]"]
    settings = [*settings, *rewards, "eval_every=0", "save_every=0", *from_base(finished)]
    assert train(tmp_path / "flaky", *settings) == 0
    rows = metrics(tmp_path / "flaky")
    rate = f"rewards/{failure}_rate"
    assert [row["skipped"] for row in rows] == [0.0] * len(rows)
    assert 0 < sum(row[rate] for row in rows) < len(rows)
    assert sum(row["dropped"] for row in rows) == sum(16 * row[rate] for row in rows)
    for row in rows:
        assert row[f"rewards/{name}/mean"] == 1.0 and row["rewards/even_share/mean"] > 0


def test_policy_gradient_trains(finished: Path, tmp_path: Path) -> None:
    settings = ["algorithm=pg_reward_baseline_k2", "steps=1", *from_base(finished)]
    assert train(tmp_path / "pg", *settings) == 0
    row = next(row for row in metrics(tmp_path / "pg") if "reward" in row)
    assert row["grad_norm"] > 0


def test_folder_that_holds_a_run_is_refused_and_left_alone(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = metrics(finished)
    message = refusal(["train", f"output_dir={finished}", *QUICK], capsys)
    assert "output_dir: expected a folder without a run" in message and "--resume" in message
    assert metrics(finished) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data=nowhere.jsonl", "nowhere.jsonl"),
        ("recorded=[nowhere.jsonl]", "nowhere.jsonl"),
        ("reward=nothing", "reward: expected"),
        ("model=/nowhere/model", "model: expected"),
        ("lr_scheduler_type=bumpy", "lr_scheduler_type: expected"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "never"
    assert message in refusal(["train", f"output_dir={folder}", *QUICK, setting], capsys)
    assert not folder.exists()


def test_resume_without_a_run_or_a_checkpoint_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(["train", "--resume", str(tmp_path)], capsys) == (
        f"agro: --resume: expected the folder of a run, got '{tmp_path}'; it has no config.yaml: "
        "no run has begun there, so start one, with the configuration, "
        f"output_dir={tmp_path} and no --resume\n"
    )
    shutil.copytree(finished, tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoint-*"))
    refused = refusal(["train", "--resume", str(tmp_path / "bare")], capsys)
    assert "there is none left in it" in refused


def test_resume_refuses_what_the_checkpoint_decides(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--resume", str(finished), "steps=5", "temperature=0.5"]
    assert "temperature: expected only fsdp, beta, steps, " in refusal(arguments, capsys)
    assert configuration.load(finished / "config.yaml").temperature != 0.5
    mistyped = ["train", "--resume", str(finished), "lerning_rate=0.5"]
    assert refusal(mistyped, capsys) == (
        "agro: lerning_rate: expected one of the known keys, got an unknown one; nearest: "
        "learning_rate; agro train --help lists them all\n"
    )


def test_completions_are_text_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    nasty = replace(rollout("g", [1], [2], 1.0), completion="[/asy] [red]x")
    before = replace(rollout("g", [1], [2], 0.0), completion="[asy]", temperature=0.0)
    Display(0, 1).before_and_after([before], [nasty])
    printed = capsys.readouterr().out
    assert "[/asy] [red]x" in printed and "[asy]" in printed


def test_finished_run_asks_for_more_steps(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(["train", "--resume", str(finished)], capsys)
    assert "steps: expected more than the 4" in message and "add steps=N" in message


def test_checkpoint_of_another_model_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(finished, folder)
    state = folder / "checkpoint-4" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "base_model": "0" * 16}))
    more = ["train", "--resume", str(folder), "steps=5"]
    assert "a checkpoint of model=tiny" in refusal(more, capsys)


def test_plot_draws_a_run_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("plots"))
    assert main(["plot", str(tmp_path / "run")]) == 0
    assert len(list((tmp_path / "run" / "plots").glob("*.png"))) == 5
    assert main(["plot", str(tmp_path)]) == 2
