"""The policy's weights reach vLLM, its samples are the policy's, and a run survives its end."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.data import kept_ids
from agro_train.data.batch import pack
from agro_train.data.prompts import render
from agro_train.data.rows import read_jsonl
from agro_train.engines import vllm_engine, vllm_start
from agro_train.engines.engine import BrokenEngine
from agro_train.engines.transformers_engine import generate
from agro_train.engines.vllm_engine import VllmEngine
from agro_train.policy import shards
from agro_train.policy.load import end_tokens, load_model, load_tokenizer
from agro_train.policy.policy import Policy
from agro_train.types import Rollout
from tests.train.engines.vllm.conftest import Started
from tests.train.models import small_run
from tests.train.torchrun import on_two_ranks

# vLLM and what it imports warn of many things.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]
ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def started(
    model: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> VllmEngine:
    """With a head of its own, and with one that is the embeddings."""
    folder = model
    if request.param:
        folder = tmp_path_factory.mktemp("tied")
        tied = LlamaForCausalLM.from_pretrained(model, tie_word_embeddings=True)
        tied.tie_weights()
        tied.save_pretrained(folder)
        load_tokenizer(str(model)).save_pretrained(folder)
    config = TrainConfig(model=str(folder), use_vllm=True, max_completion_length=8)
    tokenizer, llama = load_tokenizer(str(folder)), load_model(str(folder), config)
    embeddings, head = llama.get_input_embeddings(), llama.get_output_embeddings()
    assert (embeddings.weight is head.weight) == request.param
    ends = end_tokens(llama, tokenizer)
    return vllm_start.start(config, Policy(llama), Accelerator(cpu=True), tokenizer, ends, 20)


@pytest.fixture
def engine(started: VllmEngine) -> VllmEngine:
    """One for all tests, each of which is a process of its own for accelerate."""
    started.accelerator = Accelerator(cpu=True)
    return started


def ask(
    engine: VllmEngine,
    texts: list[str],
    step: int,
    *,
    seed: int = 0,
    num_generations: int = 4,
    temperature: float = 1.3,
) -> list[Rollout]:
    prompts = [render({"prompt": text}, engine.tokenizer, "{prompt}") for text in texts]
    return engine.complete(
        prompts,
        seeds=[seed + len(text) for text in texts],
        num_generations=num_generations,
        temperature=temperature,
        step=step,
    )


def mismatch(engine: VllmEngine, rollouts: list[Rollout]) -> float:
    """Largest difference of a token's log-probability between vLLM and the policy."""
    worst = 0.0
    with torch.no_grad():
        for rollout in rollouts:
            (micro,) = pack([rollout], token_budget=1, share_prompts=False)
            ours = engine.policy(micro, rollout.temperature).logprobs
            worst = max(worst, float((ours - micro.sampling_logprobs).abs().max()))
    return worst


def take_a_step(engine: VllmEngine, size: float) -> None:
    for parameter in engine.policy.parameters():
        parameter.data += size * torch.randn_like(parameter)


def test_samples_are_the_policys_before_and_after_an_update(engine: VllmEngine) -> None:
    texts = ["1+2=", "3", "45+678="]
    before = ask(engine, texts, step=0)
    assert mismatch(engine, before) < 1e-4
    take_a_step(engine, 0.05)
    assert mismatch(engine, before) > 0.01
    after = ask(engine, texts, step=1)
    assert mismatch(engine, after) < 1e-4


def test_more_tokens_at_once_than_a_pass_reads(engine: VllmEngine) -> None:
    """vLLM would read some of the prompts in parts, which ends it on a CPU."""
    rollouts = ask(engine, ["1+2=" * 4], step=1, num_generations=400)
    assert len(rollouts) == 400 and mismatch(engine, rollouts[:20]) < 1e-4


def test_completions_are_scored_over_the_ids_that_vllm_kept(engine: VllmEngine) -> None:
    config = replace(engine.config, top_k=5, top_p=0.8, min_p=0.01, min_new_tokens=2)
    parts = (engine.client, engine.policy, engine.accelerator, engine.tokenizer, engine.end_tokens)
    narrow = VllmEngine(*parts, config)
    rollouts = ask(narrow, ["1+2=", "3", "45+678="], step=1)
    assert mismatch(narrow, rollouts) < 1e-4
    sizes = [len(kept) for r in rollouts for kept in kept_ids.decode(r.kept_ids or "")]
    assert max(sizes) <= 5 and min(sizes) < 5
    assert min(len(r.completion_ids) for r in rollouts) > 2


def test_greedy_completions_are_those_of_transformers(engine: VllmEngine) -> None:
    texts = ["1+2=", "45+678="]
    ours = ask(engine, texts, step=1, num_generations=1, temperature=0.0)
    theirs = generate(
        engine.policy.model,
        engine.tokenizer,
        [render({"prompt": text}, engine.tokenizer, "{prompt}") for text in texts],
        seeds=[0, 0],
        num_generations=1,
        temperature=0.0,
        max_completion_length=8,
        batch_size=2,
        end_tokens=engine.end_tokens,
    )
    assert [(r.completion_ids, r.finish) for r in ours] == [
        (r.completion_ids, r.finish) for r in theirs
    ]


def test_a_completion_depends_on_its_own_seed_only(engine: VllmEngine) -> None:
    together = ask(engine, ["1+2=", "3", "45+678="], step=1, seed=5)
    alone = ask(engine, ["45+678="], step=1, seed=5)
    assert [r.completion_ids for r in alone] == [r.completion_ids for r in together[8:]]
    other = ask(engine, ["45+678="], step=1, seed=6)
    assert [r.completion_ids for r in other] != [r.completion_ids for r in alone]
    ends = {r.finish for r in together}
    for r in together:
        assert (r.finish == "stop") == (r.completion_ids[-1] in engine.end_tokens)
    assert ends == {"stop", "length"}


def test_sampled_frequencies_are_the_tempered_softmax(engine: VllmEngine) -> None:
    count = 3000
    rollouts = ask(engine, ["1+2="], step=1, num_generations=count, temperature=1.7)
    counts = torch.bincount(torch.tensor([r.completion_ids[0] for r in rollouts]), minlength=15)
    ids = torch.tensor([rollouts[0].prompt_ids])
    logits = engine.policy.model(input_ids=ids).logits[0, -1].detach()
    expected = (logits / 1.7).softmax(-1) * count
    assert float(((counts - expected) ** 2 / expected).sum()) < 36.1  # 0.1 % point, 14 degrees


@pytest.mark.parametrize("size", [0.05, 1e-5], ids=["large", "within the noise"])
def test_update_that_does_not_arrive_is_noticed(
    size: float, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(engine, ["1+2="], step=2)
    take_a_step(engine, size)
    with monkeypatch.context() as patch:
        patch.setattr(engine.client, "load", list)
        with pytest.raises(BrokenEngine, match="got the same ones as before the update"):
            ask(engine, ["1+2="], step=3)
    assert mismatch(engine, ask(engine, ["1+2="], step=3)) < 1e-4  # sent again, it is there


def test_update_of_other_weights_is_noticed(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(engine, ["1+2="], step=4)
    take_a_step(engine, 0.05)
    with monkeypatch.context() as patch:
        real = vllm_engine.merged_weights
        patch.setattr(
            vllm_engine,
            "merged_weights",
            lambda m: ((n, -w if n.endswith("up_proj.weight") else w) for n, w in real(m)),
        )
        with pytest.raises(BrokenEngine, match="got others by .* nats"):
            ask(engine, ["1+2="], step=5)
    ask(engine, ["1+2="], step=5)


def settings(model: Path, folder: Path, *more: str) -> list[str]:
    short = ["num_generations=4", "token_budget=60", "learning_rate=0.001", "use_vllm=true"]
    evaluated = ["eval_every=1", "eval_prompts=4", "eval_generations=2"]
    return small_run(model, folder, *short, *evaluated, *more)


def check_run(folder: Path, steps: int = 2, *, sharded: bool = False) -> None:
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in rows] == [*range(1, steps + 1)]
    for row in rows:
        assert 0 < row["sampling/sampling_logp_difference/mean"] < 1e-5
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert rows[-1]["kl"] != 0.0
    checkpoint = folder / f"checkpoint-{steps}"
    assert (checkpoint / "model.safetensors").is_file() is not sharded
    assert shards.are_in(checkpoint) is sharded


@pytest.mark.parametrize(
    "more",
    [["fsdp=true"], ["fsdp=true", "vllm_tensor_parallel_size=2"]],
    ids=["an engine of each", "a shared one"],
)
def test_run_of_two_processes_with_vllm_beside_them(
    more: list[str], model: Path, tmp_path: Path
) -> None:
    arguments = settings(model, tmp_path / "run", "vllm_mode=colocate", *more)
    on_two_ranks("agro_train", *arguments, timeout_s=600)
    check_run(tmp_path / "run", sharded=True)


def test_run_with_vllm_beside_it(model: Path, tmp_path: Path) -> None:
    assert main(settings(model, tmp_path / "run", "vllm_mode=colocate")) == 0
    check_run(tmp_path / "run")


def test_adapters_updates_reach_vllm(model: Path, tmp_path: Path) -> None:
    more = ["vllm_mode=colocate", "use_peft=true", "lora_r=4", "learning_rate=0.01"]
    assert main(settings(model, tmp_path / "run", *more, "save_every=0")) == 0
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    assert rows[1]["kl"] != 0.0 and rows[1]["sampling/sampling_logp_difference/max"] < 1e-4


def test_sharded_run_of_two_processes_and_a_server_that_is_killed(
    model: Path, serve: Callable[[], Started], tmp_path: Path
) -> None:
    address, group, _ = serve()
    server = ["vllm_mode=server", f"vllm_server_base_url={address}", "vllm_server_timeout=120"]
    sharded = ["fsdp=true", "vllm_weight_transfer=gloo"]
    arguments = settings(model, tmp_path / "two", *server, *sharded)
    on_two_ranks("agro_train", *arguments, timeout_s=600)
    check_run(tmp_path / "two", sharded=True)

    # The reward function kills the server while the third step is scored; the step is completed,
    # and the server is missed by the next one to ask.
    more = [
        *server,
        "steps=5",
        "eval_every=0",
        "reward=tests.train.engines.vllm.killing:third_time",
    ]
    killed = subprocess.run(
        [sys.executable, "-m", "agro_train", *settings(model, tmp_path / "killed", *more)],
        cwd=ROOT,
        env={**os.environ, "AGRO_TEST_KILL": str(group)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert killed.returncode == 2, killed.stderr[-3000:]
    (sentence,) = [line for line in killed.stderr.splitlines() if line.startswith("agro: ")]
    assert sentence.startswith(f"agro: vllm: expected an answer from {address}, got ")
    check_run(tmp_path / "killed", steps=3)  # nothing of the three steps is lost

    again = serve().address
    resumed = main(["train", "--resume", str(tmp_path / "killed"), f"vllm_server_base_url={again}"])
    assert resumed == 0
    check_run(tmp_path / "killed", steps=5)
