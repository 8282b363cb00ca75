"""Two processes (gloo, CPU) give the run that one gives: replicated and sharded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agro_train.cli import main
from agro_train.data.rows import read_jsonl
from tests.train.forked import Server, said
from tests.train.models import save_llama3_miniature, small_run
from tests.train.torchrun import on_two_ranks

pytestmark = pytest.mark.usefixtures("no_curves")


def settings(folder: Path, model: Path, *more: str) -> list[str]:
    short = ["num_generations=3", "token_budget=40", "learning_rate=0.01", "save_every=1"]
    return small_run(model, folder, *short, "eval_every=2", "eval_prompts=5", *more)


def launch(server: Server, folder: Path, arguments: list[str]) -> None:
    """Two ranks, as torchrun starts them, in a tenth of the time."""
    assert server.launch(folder, arguments, ranks=2) == 0, said(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama3_miniature(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recorded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The rollouts of an on-policy step, and the offline run on them in one process."""
    folder = tmp_path_factory.mktemp("one")
    assert main(settings(folder / "online", model, "steps=1", "eval_every=0")) == 0
    log = folder / "online" / "rollouts" / "step-000001.jsonl"
    assert main(settings(folder / "offline", model, f"recorded=[{log}]")) == 0
    return log, folder / "offline"


def assert_same_steps(two: Path, alone: Path, model: Path) -> None:
    """The two updates of two ranks are those of one process, up to the order of sums."""
    ours, theirs = (
        [row for row in read_jsonl(folder / "metrics.jsonl") if "reward" in row]
        for folder in (two, alone)
    )
    assert len(ours) == len(theirs) == 2
    for key in ("reward", "loss", "grad_norm", "kl", "entropy", "groups", "tokens"):
        for mine, one in zip(ours, theirs, strict=True):
            assert mine[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
    assert ours[1]["kl"] != 0.0
    # Of a sharded run the last checkpoint is in shards, and written as one file at its end.
    whole = two / "model" if (two / "model").is_dir() else two / "checkpoint-2"
    assert (two / "model").is_dir() == (two / "checkpoint-2" / "weights").is_dir()
    weights, expected = (
        load_file(folder / "model.safetensors") for folder in (whole, alone / "checkpoint-2")
    )
    assert weights.keys() == expected.keys()
    # As a whole, not element by element: where a gradient is nothing but rounding noise, Adam moves
    # the weight by the learning rate all the same, in the noise's direction.
    start = load_file(model / "model.safetensors")
    apart = sum(float((weights[n] - expected[n]).square().sum()) for n in weights) ** 0.5
    moved = sum(float((expected[n] - start[n]).square().sum()) for n in weights) ** 0.5
    assert moved > 0.1 and apart < 1e-3 * moved


@pytest.mark.parametrize("fsdp", ["false", "true"], ids=["replicated", "sharded"])
def test_two_ranks_take_the_steps_of_one(
    fsdp: str, model: Path, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    log, alone = recorded
    on_two_ranks(
        "tests.train.rank_main",
        *settings(tmp_path / "two", model, f"recorded=[{log}]", f"fsdp={fsdp}"),
    )
    assert_same_steps(tmp_path / "two", alone, model)


def by_group(rows: list[dict[str, Any]], name: str) -> dict[str, list[Any]]:
    """A column by group, each in its order: a step has one rank's groups after the other's."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row[name])
    return found


@pytest.mark.parametrize("fsdp", ["false", "true"], ids=["replicated", "sharded"])
def test_two_ranks_ahead_take_the_steps_of_one(
    fsdp: str, model: Path, server: Server, tmp_path: Path
) -> None:
    """Both steps' groups are sampled by the first weights, so the completions are the same."""
    ahead = ["max_staleness=1", "eval_every=0"]
    assert main(settings(tmp_path / "one", model, *ahead)) == 0
    launch(server, tmp_path / "two", settings(tmp_path / "two", model, *ahead, f"fsdp={fsdp}"))
    for step in (1, 2):
        ours, theirs = (
            read_jsonl(tmp_path / name / "rollouts" / f"step-{step:06d}.jsonl")
            for name in ("two", "one")
        )
        assert by_group(ours, "completion_ids") == by_group(theirs, "completion_ids")
        assert all(row["step"] == 0 for row in ours)
    assert_same_steps(tmp_path / "two", tmp_path / "one", model)


def test_two_ranks_have_the_turns_of_one(server: Server, tmp_path: Path) -> None:
    """Each has its environments in a process of its own."""
    more = ["environment=tests.train.environments.odd:Counts", "stop=['3', '7', '=']"]
    more += ["reward=[environment,tests.train.reward_functions:even_share]", "steps=1"]
    more += ["warm_start_steps=0", "max_completion_length=14", "eval_every=0"]
    assert main(settings(tmp_path / "one", Path("tiny"), *more)) == 0
    launch(server, tmp_path / "two", settings(tmp_path / "two", Path("tiny"), *more, "fsdp=false"))
    ours, theirs = (
        read_jsonl(tmp_path / name / "rollouts" / "step-000001.jsonl") for name in ("two", "one")
    )
    assert any(len(row["turns"]) > 1 for row in theirs) and len(theirs) == 9
    for name in ("completion_ids", "turns", "rewards", "failure"):
        assert by_group(ours, name) == by_group(theirs, name)


def test_sharded_in_bfloat16_with_checkpointing_is_near_the_run_of_one(
    model: Path, recorded: tuple[Path, Path], server: Server, tmp_path: Path
) -> None:
    log, _ = recorded
    more = ["mixed_precision=bf16", "gradient_checkpointing=true", "steps=1", "eval_every=0"]
    shared = [f"recorded=[{log}]", *more]
    assert main(settings(tmp_path / "one", model, *shared)) == 0
    launch(server, tmp_path / "two", settings(tmp_path / "two", model, *shared, "fsdp=true"))
    (ours,), (theirs,) = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    # FSDP2 and autocast round in different places, and the reference's log-probabilities are kept
    # from the first run.
    assert theirs["kl"] == 0.0 and abs(ours["kl"]) < 0.01 and not ours["skipped"]
    for key in ("loss", "grad_norm", "entropy"):
        assert ours[key] == pytest.approx(theirs[key], rel=0.03), key


@pytest.mark.parametrize(
    "placement",
    [["fsdp=false"], ["fsdp=true"], ["fsdp=true", "use_peft=true"]],
    ids=["replicated", "sharded", "sharded-adapter"],
)
def test_two_ranks_generate_evaluate_and_resume(
    placement: list[str], model: Path, server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # From the second step on the main rank reads one group of three from the run's own record.
    more = ["replay_fraction=0.34", "lr_scheduler_type=constant"]
    launch(server, folder, settings(folder, model, *placement, *more))
    launch(server, folder, ["train", "--resume", str(folder), "steps=3"])
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [0, 2, 3]
    for step in (1, 2, 3):
        rollouts = read_jsonl(folder / "rollouts" / f"step-{step:06d}.jsonl")
        assert len(rollouts) == 9 and len({row["group"] for row in rollouts}) == 3
        replayed = sum(row["source"] == "replayed" for row in rollouts)
        assert replayed == (0 if step == 1 else 3)
    greedy = [
        r for r in read_jsonl(folder / "samples" / "step-000003.jsonl") if not r["temperature"]
    ]
    assert len({row["group"] for row in greedy}) == 5
    if "use_peft=true" in placement:
        one, three = (
            load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")
            for step in (2, 3)
        )
        assert one.keys() == three.keys() and len(one) == 2 * 7 * 2
        assert all(weight.any() for weight in three.values())
        assert any(not torch.equal(one[name], three[name]) for name in one)
