"""A run that is killed at any moment, and goes on, ends as if nothing had happened.

    python -m tests.train.test_resume --kills 40 [--ranks 2] [--fsdp] [--peft] [--ahead K]

kills runs that often, half of the time after a random while, half at a random write to the disk,
and compares every run that comes to its end with one that was left alone. Of a run of several
ranks (gloo, on the CPU) the first or the last is killed, or all at once.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agro_train.cli import main as main_of_agro
from agro_train.data.rows import read_jsonl
from agro_train.policy import checkpoint
from agro_train.run_folder import RunFolder
from tests.train.forked import KILLED, Server, said

STEPS = 5
WRITES = 90  # to its folder: a whole run makes about 140, one that goes on fewer
CLOCKS = (
    *("time_s", "eval_time_s", "tokens_per_s", "memory_gb"),
    *("async/wait_s", "async/engine_idle_s", "async/queue"),
)

# The schedule changes at every step, and the replayed groups come from the run's own record.
SETTINGS = [
    "warm_start_steps=2",
    "reward=tests.train.reward_functions:even_share",
    f"steps={STEPS}",
    "prompts_per_step=4",
    "num_generations=3",
    "replay_fraction=0.5",
    "max_completion_length=6",
    "learning_rate=0.01",
    "lr_scheduler_type=cosine",
    "warmup_steps=1",
    "eval_every=3",
    "eval_prompts=3",
    "eval_generations=1",
    "save_every=2",
    "save_total_limit=1",
]

MODELS = ("base_model", "model")  # before and after

PEFT = ["use_peft=true", "lora_r=4"]
FSDP = ["fsdp=true"]

# Moments of a run, each a kind of write and the end of the name that it is about to reach.
MOMENTS = [
    ("open", "/.partial-config.yaml"),  # before there is a run
    ("open", "/base_model/tokenizer_config.json"),  # before there is the reference
    ("open", "/samples/.partial-step-000000.jsonl"),  # in the first evaluation
    ("open", "/rollouts/.partial-step-000002.jsonl"),  # before the first checkpoint
    ("os.rename", "/rollouts"),  # while it starts again
    ("open", "/.partial-checkpoint-2/optimizer.pt"),  # while the first checkpoint is written
    ("os.rename", "/.partial-checkpoint-2"),  # when it has everything but its name
    ("open", "/samples/.partial-step-000003.jsonl"),  # in an evaluation
    ("os.remove", "/rollouts/step-000003.jsonl"),  # while the record is rewound
    ("open", "/.partial-checkpoint-4/trainer_state.json"),  # while the second one is written
    ("os.rename", "/checkpoint-2"),  # before the one before it goes
    ("os.rename", "/.partial-metrics.jsonl"),  # while the record is rewound
    ("open", "/metrics.jsonl"),  # in the next step
    ("os.rename", "/.partial-checkpoint-5"),  # at the end
]


def record(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves for good, without what a clock or a gauge measured."""
    rows = read_jsonl(folder / "metrics.jsonl")
    last = folder / f"checkpoint-{STEPS}"
    files = [
        *folder.glob("rollouts/*"),
        *folder.glob("samples/*"),
        # Not the configurations in which transformers and peft note where a folder was.
        *(
            last / name
            for name in ("model.safetensors", "config.json", "adapter_model.safetensors")
        ),
        folder / "base_model" / "model.safetensors",
        folder / "model" / "model.safetensors",
    ]
    assert checkpoint.damage(last) is None
    shards = [*last.glob("weights/*"), *last.glob("moments/*")]
    return {
        # Not their bytes: safetensors writes the entries of its header in any order.
        **{str(path.relative_to(folder)): plain(load_file(path)) for path in shards},
        "optimizer and schedule": plain(torch.load(last / "optimizer.pt", weights_only=True)),
        "metrics": [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows],
        **{str(path.relative_to(folder)): path.read_bytes() for path in files if path.exists()},
    }


def plain(saved: Any) -> Any:
    """The same with every tensor as its bytes; whether a pair is a tuple or a list is all one."""
    if isinstance(saved, dict):
        return {key: plain(value) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return [plain(value) for value in saved]
    return saved.numpy().tobytes() if isinstance(saved, torch.Tensor) else saved


def assert_same(folder: Path, whole: Path) -> None:
    ours, theirs = record(folder), record(whole)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name] == theirs[name], (
            f"{name} of {folder} differs from the uninterrupted run's"
        )


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (3, ["prompts_per_step=6"]),
        (2, FSDP),
        (1, PEFT),
        (1, ["max_staleness=2"]),
        (2, ["max_staleness=1"]),
    ],
    ids=["three-ranks", "two-ranks-sharded", "adapter", "two-steps-ahead", "two-ranks-ahead"],
)
def test_run_of_this_kind_that_is_killed_ends_the_same(
    ranks: int, settings: list[str], server: Server, tmp_path: Path
) -> None:
    """The last rank is killed between two checkpoints, then the main one while it writes one; in
    the end the last one alone is told to end, and all ranks save the step in hand. Of three ranks
    the sum of the gradients depends on its order, of two it does not."""
    alone, folder = tmp_path / "whole", tmp_path / "run"
    assert server.run(alone, *SETTINGS, *settings, ranks=ranks) == 0, said(alone)
    for moment, victim in (
        (("open", "/rollouts/.partial-step-000003.jsonl"), ranks - 1),
        (("open", "/.partial-checkpoint-4/optimizer.pt"), 0),
    ):
        how: dict[str, Any] = {"ranks": ranks, "kill_at": moment, "victims": [victim]}
        assert server.run(folder, *SETTINGS, *settings, **how) == KILLED, said(folder)
    how = {"kill_at": ("open", "/rollouts/.partial-step-000003.jsonl"), "victims": [ranks - 1]}
    # The grace keeps the others from being ended by the launcher.
    how |= {"ranks": ranks, "signal": signal.SIGTERM, "grace": 5.0 if ranks > 1 else 0.0}
    assert server.run(folder, *SETTINGS, *settings, **how) == 143, said(folder)
    assert said(folder).count(sentence(folder, "SIGTERM", 3)) == ranks
    assert checkpoint.damage(folder / "checkpoint-3") is None
    assert server.run(folder, *SETTINGS, *settings, ranks=ranks) == 0, said(folder)
    assert_same(folder, alone)


def test_sharded_run_goes_on_with_other_ranks_and_is_exported(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three ranks have uneven shards; one has whole weights. All learn what two would have."""
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    settings = [*SETTINGS, "replay_fraction=0.25", *FSDP]
    assert server.run(whole, *settings, ranks=2) == 0, said(whole)
    at_step_4 = ("open", "/rollouts/.partial-step-000004.jsonl")
    how: dict[str, Any] = {"ranks": 2, "kill_at": at_step_4, "victims": [0, 1]}
    assert server.run(begun, *settings, **how) == KILLED, said(begun)
    assert list(RunFolder(begun).checkpoints()) == [2]
    size = next((begun / "checkpoint-2" / "moments").iterdir()).stat().st_size
    fails(server, begun, size - 1, f"go on with --resume {begun}", ranks=2)
    assert checkpoint.damage(begun / "checkpoint-2") is None
    assert not list(begun.rglob(".partial-*")) and len(RunFolder(begun).checkpoints()) == 1
    start, expected = (load_file(whole / name / "model.safetensors") for name in MODELS)
    moved = distance(start, expected)
    for ranks, again in ((3, []), (1, ["fsdp=false"])):
        folder = tmp_path / f"on-{ranks}"
        shutil.copytree(begun, folder)
        assert server.run(folder, ranks=ranks, again=again) == 0, said(folder)
        out = tmp_path / f"exported-{ranks}"
        assert main_of_agro(["export", str(folder), str(out)]) == 0
        found = load_file(out / "model.safetensors")
        assert found.keys() == expected.keys()
        assert [asked(folder, step) for step in range(1, STEPS + 1)] == [
            asked(whole, step) for step in range(1, STEPS + 1)
        ]
        assert distance(found, expected) < 1e-3 * moved and moved > 0.1
        if ranks == 3:
            assert len(list(folder.glob("checkpoint-5/weights/shard-0000?-*"))) == 3
            at_the_end = load_file(folder / "model" / "model.safetensors")
            assert all(torch.equal(at_the_end[name], found[name]) for name in found)
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert all(torch.equal(p, found[name]) for name, p in loaded.named_parameters())
    refused(server, tmp_path / "on-3", capsys)


def refused(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with a checkpoint in shards, or with where it is to go, is one sentence."""
    taken, checkpoint_5 = folder.with_name("taken"), folder / "checkpoint-5"
    taken.mkdir()
    broken = folder.with_name("broken")
    shutil.copytree(checkpoint_5, broken)
    *_, last = (broken / "weights").iterdir()
    last.unlink()
    other = folder.with_name("other")
    shutil.copytree(checkpoint_5, other)
    shape = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(shape | {"intermediate_size": 128}))
    capsys.readouterr()
    for arguments, message in (
        (["export", str(folder), str(taken)], f"FOLDER: expected a new name, got {str(taken)!r}"),
        (["export", str(taken), str(folder / "out")], "export: expected a run or one of its"),
        (["eval", str(broken)], f"model: expected a checkpoint as it was written, got {broken!s}"),
        (["export", str(broken), str(folder / "out")], "model: expected a checkpoint as it was"),
        (["eval", str(other)], "model: expected the shards of a LlamaForCausalLM in"),
    ):
        assert main_of_agro(arguments) == 2
        sentence = capsys.readouterr().err.splitlines()[-1].replace("'", "")
        assert sentence.startswith(f"agro: {message}".replace("'", "")), sentence
    assert list(taken.iterdir()) == [] and not (folder / "out").exists()
    (checkpoint_5 / "weights" / last.name).unlink()  # and the one before it is gone: limit 1
    assert server.run(folder, ranks=2, again=["steps=6"]) == 2
    assert f"got only damaged ones: checkpoint-5, where weights/{last.name} is missing" in (
        " ".join(said(folder).split())
    )


def asked(folder: Path, step: int) -> list[tuple[str, str]]:
    """The prompts of a step in the order of its record, and where each completion came from."""
    record = RunFolder(folder).rollouts(step)
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    return [(row["prompt"], row["source"]) for row in rows]


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return sum(float((ours[n] - theirs[n]).square().sum()) for n in theirs) ** 0.5


def sentence(folder: Path, name: str, saved: int) -> str:
    return (
        f"agro: interrupted by {name}; {saved} of {STEPS} steps are saved, and agro train --resume "
        f"{folder} goes on from there\n"
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_run_that_is_told_to_end_saves_the_step_in_hand_and_goes_on_as_if_nothing_had_happened(
    number: signal.Signals,
    status: int,
    server: Server,
    whole: tuple[Path, float],
    tmp_path: Path,
) -> None:
    """Before its first step is written, and in one after which neither a checkpoint is due nor the
    evaluation is skipped for good."""
    folder = tmp_path / "run"
    for step in (1, 3):
        moment = ("open", f"/rollouts/.partial-step-00000{step}.jsonl")
        how: dict[str, Any] = {"kill_at": moment, "signal": number}
        assert server.run(folder, *SETTINGS, **how) == status, said(folder)
        assert said(folder).endswith(sentence(folder, number.name, step))
        assert "Traceback" not in said(folder)
        assert RunFolder(folder).checkpoints().keys() == {step}
        assert checkpoint.damage(folder / f"checkpoint-{step}") is None
        assert not (folder / ".lock").exists()
    assert server.run(folder) == 0, said(folder)
    assert_same(folder, whole[0])


def complete(folder: Path) -> bool:
    return (folder / f"checkpoint-{STEPS}").is_dir()


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that is left alone, and how many seconds it takes."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    began = time.monotonic()
    assert server.run(folder, *SETTINGS) == 0, said(folder)
    return folder, time.monotonic() - began


def test_run_killed_at_every_kind_of_moment_ends_the_same(
    server: Server, whole: tuple[Path, float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for moment in MOMENTS:
        status = server.run(folder, *SETTINGS, kill_at=moment)
        assert status == KILLED, f"{moment} was never reached:\n{said(folder)}"
    assert server.run(folder, *SETTINGS) == 0, said(folder)
    assert_same(folder, whole[0])
    assert not list(folder.rglob(".partial-*"))


def test_run_killed_at_random_moments_ends_the_same(
    server: Server, whole: tuple[Path, float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    rng = random.Random(20)  # its kills are spread over the run
    kills = kill_until_complete(server, folder, whole[1], rng, most=8)
    assert kills
    assert_same(folder, whole[0])


def kill_until_complete(
    server: Server,
    folder: Path,
    seconds: float,
    rng: random.Random,
    *settings: str,
    most: int,
    ranks: int = 1,
    draw: bool = False,
) -> list[str]:
    """Starts a run again and again, kills it `most` times, and says what was there each time."""
    kills: list[str] = []
    while not complete(folder):
        how: dict[str, Any] = {"draw": draw, "ranks": ranks}
        if ranks > 1:
            how["victims"] = rng.choice([[0], [ranks - 1], list(range(ranks))])
            how["grace"] = rng.choice([0.0, 1.0])
        if len(kills) < most and rng.random() < 0.5:
            how["kill_after"] = rng.uniform(0.0, seconds)
        elif len(kills) < most:
            how["kill_at"] = rng.randint(1, WRITES)
        status = server.run(folder, *SETTINGS, *settings, **how)
        assert status in (0, KILLED), said(folder)
        if status == KILLED:
            of = "" if ranks == 1 else f", rank {' and '.join(map(str, how['victims']))}"
            kills.append(whereabouts(folder) + of)
    return kills


def whereabouts(folder: Path) -> str:
    if not (folder / "config.yaml").is_file():
        return "before the folder was made"
    if any(folder.glob(".partial-checkpoint-*")):
        return "while a checkpoint was written or deleted"
    if not RunFolder(folder).checkpoints():
        return "before the first checkpoint"
    return "after it was complete" if complete(folder) else "between checkpoints"


def test_run_goes_on_from_the_checkpoint_before_a_truncated_one(
    server: Server, whole: tuple[Path, float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = [*SETTINGS, "save_total_limit=2"]
    assert server.run(folder, *settings, kill_at=("os.rename", "/.partial-checkpoint-5")) == KILLED
    damaged = folder / "checkpoint-4" / "optimizer.pt"
    os.truncate(damaged, damaged.stat().st_size - 1)
    assert server.run(folder) == 0, said(folder)
    warning = " ".join(said(folder).split())
    assert "refused as damaged: checkpoint-4, where optimizer.pt has " in warning
    assert "checkpoint-2 is used" in warning
    assert_same(folder, whole[0])


def test_full_disk_ends_a_run_with_a_sentence_and_loses_nothing(
    server: Server, whole: tuple[Path, float], tmp_path: Path
) -> None:
    """The system's limit on the size of a file stands for a disk without room."""
    folder = tmp_path / "run"
    fails(server, folder, (whole[0] / "config.yaml").stat().st_size - 1, "start again")
    assert not (folder / "config.yaml").exists()
    at_step_3 = ("open", "/rollouts/.partial-step-000003.jsonl")
    assert server.run(folder, *SETTINGS, kill_at=at_step_3) == KILLED
    for name in (
        "rollouts/step-000003.jsonl",
        "checkpoint-5/model.safetensors",
        "checkpoint-5/optimizer.pt",
    ):
        fails(server, folder, (whole[0] / name).stat().st_size - 1, f"go on with --resume {folder}")
        assert checkpoint.damage(folder / "checkpoint-2") is None
        assert not list(folder.rglob(".partial-*"))
    assert server.run(folder, *SETTINGS) == 0, said(folder)
    assert_same(folder, whole[0])


def fails(server: Server, folder: Path, file_size: int, advice: str, ranks: int = 1) -> None:
    how: dict[str, Any] = {"ranks": ranks, "file_size": file_size, "grace": 5.0 * (ranks > 1)}
    assert server.run(folder, *SETTINGS, **how) == 2, said(folder)
    last = said(folder).splitlines()[-1]
    assert last.startswith("agro: output_dir: expected room to write to ")
    assert os.strerror(errno.EFBIG) in last and last.endswith(advice)
    assert "Traceback" not in said(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true", help="weights sharded over the ranks")
    parser.add_argument("--peft", action="store_true", help="train an adapter")
    parser.add_argument("--ahead", type=int, default=0, metavar="K", help="max_staleness")
    options = parser.parse_args()
    settings = [*PEFT * options.peft, *FSDP * options.fsdp]
    settings.append(f"max_staleness={options.ahead}")
    if options.ranks > 2:  # a fresh prompt and a held-out one for each
        settings += [f"prompts_per_step={2 * options.ranks}", f"eval_prompts={options.ranks}"]
    server, rng = Server(), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        alone = Path(name) / "whole"
        status = server.run(alone, *SETTINGS, *settings, ranks=options.ranks, draw=True)
        assert status == 0, said(alone)
        how = {"ranks": options.ranks, "draw": True}
        seconds = time.monotonic() - began
        kills: list[str] = []
        runs = 0
        while len(kills) < options.kills:
            folder = Path(name) / f"run-{runs}"
            how["most"] = options.kills - len(kills)
            kills += kill_until_complete(server, folder, seconds, rng, *settings, **how)
            assert_same(folder, alone)
            runs += 1
    server.close()
    print(f"{len(kills)} kills in {runs} runs, each of which ended bitwise as the one left alone:")
    for where, count in Counter(kills).most_common():
        print(f"{count:5}  {where}")


if __name__ == "__main__":
    main()
