"""What the vLLM engine does around vLLM: weights go out, are seen to have arrived, and whatever
answers wrongly, or not at all, ends in one sentence. vLLM's place is taken by a model of the same
shape with weights of its own; vLLM itself is in tests/train/engines/vllm.
"""

import copy
import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from agro_train.config import TrainConfig
from agro_train.data import kept_ids
from agro_train.data.batch import pack
from agro_train.data.chat import Renderer
from agro_train.data.prompts import render
from agro_train.engines import vllm_engine, vllm_server, vllm_start, weights
from agro_train.engines.engine import TOKENS_S, BrokenEngine, Sampling
from agro_train.engines.transformers_engine import generate
from agro_train.engines.turns import Dialogue
from agro_train.engines.vllm_beside import Colocated
from agro_train.engines.vllm_client import Answer, Request
from agro_train.engines.vllm_engine import VllmEngine
from agro_train.engines.vllm_server import Server, serve_command
from agro_train.engines.vllm_servers import Servers
from agro_train.engines.vllm_start import start
from agro_train.engines.weights import Parcel, make_weights_folder, weights_folder
from agro_train.environments.pool import Environments
from agro_train.policy import tiny
from agro_train.types import Prompt
from tests.conftest import SetSizes
from tests.train.engines.servers import Answers, StandIn
from tests.train.models import tiny_policy

TOKENIZER = tiny.build_tokenizer()
PROMPTS = [render({"prompt": text}, TOKENIZER, "{prompt}") for text in ("1+2=", "45+678=")]
CONFIG = TrainConfig(max_completion_length=6)
ASK: dict[str, Any] = {"seeds": [3, 4], "num_generations": 3, "temperature": 1.3}


class OtherModel:
    """Answers as vLLM does, from other weights than the policy's until it is sent those."""

    takes_tensors = False

    def __init__(self) -> None:
        self.policy = tiny_policy(seed=9, dtype=torch.float32)
        self.asked: list[Request] = []
        self.loads = 0
        self.most_at_once = 0  # weights in a parcel
        self.left_out: str | None = None  # a weight that gets lost on its way
        self.dtypes: set[torch.dtype] = set()  # of the weights that came

    def ask(self, requests: Sequence[Request]) -> list[tuple[int, Answer]]:
        self.asked += requests
        return [(place, self._answer(request)) for place, request in enumerate(requests)]

    def _answer(self, request: Request) -> Answer:
        (rollout,) = generate(
            self.policy.model,
            TOKENIZER,
            [Prompt("", "", request.prompt_ids, {})],
            seeds=[request.parameters["seed"]],
            num_generations=1,
            temperature=request.parameters["temperature"],
            max_completion_length=request.parameters["max_tokens"],
            batch_size=1,
            end_tokens=set(request.parameters["stop_token_ids"]) or {99},
            sampling=self.sampling_of(request),
        )
        temperature = request.parameters["temperature"] or 1.0
        read: tuple[float, ...] = ()
        if "prompt_logprobs" in request.parameters:
            ids = request.prompt_ids
            read = logprobs_of(self.policy, ids[:1], ids[1:], 1.0)
        sets = kept_ids.decode(rollout.kept_ids) if rollout.kept_ids else None
        ours = logprobs_of(
            self.policy, rollout.prompt_ids, rollout.completion_ids, temperature, sets
        )
        return Answer(rollout.completion_ids, ours, read, self.likeliest(request, ours, sets))

    def sampling_of(self, request: Request) -> Sampling:
        got = request.parameters
        kept = (got[name] for name in ("top_k", "top_p", "min_p"))
        return Sampling(*kept, tuple(got.get("stop", ())), got["min_tokens"])

    def likeliest(
        self, request: Request, logprobs: Sequence[float], sets: Sequence[Any] | None
    ) -> tuple[tuple[tuple[int, float], ...], ...]:
        """As vLLM tells it: the kept ones, then others at -inf or its word for that, as many as
        were asked for."""
        if not sets:
            return ()
        filled = []
        for kept, logprob in zip(sets, logprobs, strict=True):
            others = [i for i in range(15) if i not in kept]
            pairs = [(int(i), logprob) for i in kept]
            pairs += [(i, (-9999.0, -float("inf"))[i % 2]) for i in others]
            filled.append(tuple(pairs[: request.parameters["logprobs"]]))
        return tuple(filled)

    def load(self, parcels: Iterable[Parcel]) -> None:
        self.loads += 1
        mine = dict(self.policy.model.named_parameters())
        for parcel in parcels:
            held = load_file(parcel) if isinstance(parcel, Path) else parcel
            self.most_at_once = max(self.most_at_once, len(held))
            for name, weight in held.items():
                self.dtypes.add(weight.dtype)
                if name != self.left_out:
                    mine[name].data.copy_(weight)


def logprobs_of(
    policy: Any,
    prompt: tuple[int, ...],
    completion: tuple[int, ...],
    temperature: float,
    sets: Sequence[Any] | None = None,
) -> tuple[float, ...]:
    rollout = vllm_engine.cut(
        Prompt("", "", prompt, {}),
        list(completion),
        TOKENIZER,
        set(),
        temperature,
        None,
        kept_sets=sets,
    )
    (micro,) = pack([rollout], token_budget=1, share_prompts=False)
    with torch.no_grad():
        return tuple(policy(micro, temperature).logprobs.tolist())


@pytest.fixture
def engine() -> Iterator[VllmEngine]:
    policy = tiny_policy(seed=0, dtype=torch.float32)
    accelerator = Accelerator(cpu=True)
    ends = {TOKENIZER.eos_token_id}
    engine = VllmEngine(OtherModel(), policy, accelerator, TOKENIZER, ends, CONFIG)
    yield engine
    engine.close()


def take_a_step(engine: VllmEngine, size: float = 0.05) -> None:
    for parameter in engine.policy.parameters():
        parameter.data += size * torch.randn_like(parameter)


def test_completions_come_from_the_policy_as_it_is(engine: VllmEngine) -> None:
    for step in range(2):
        rollouts = engine.complete(PROMPTS, **ASK, step=step)
        assert [r.group for r in rollouts] == [p.group for p in PROMPTS for _ in range(3)]
        for r in rollouts:
            expected = logprobs_of(engine.policy, r.prompt_ids, r.completion_ids, 1.3)
            assert r.sampling_logprobs == pytest.approx(expected, abs=1e-5)
            assert r.step == step and r.temperature == 1.3
        take_a_step(engine)
    again = engine.complete(PROMPTS, **ASK, step=1)
    assert [r.completion_ids for r in again] == [r.completion_ids for r in rollouts]
    assert engine.client.loads == 2  # once a step, not once a request


def test_every_completion_has_a_seed_of_its_own_and_no_sampling_default_applies(
    engine: VllmEngine,
) -> None:
    engine.complete(PROMPTS, **ASK, step=0)
    engine.complete(PROMPTS[1:], **{**ASK, "seeds": [4]}, step=0)
    sampled = [r.parameters for r in engine.client.asked if r.parameters["temperature"]]
    seeds = [parameters["seed"] for parameters in sampled]
    assert len(set(seeds[:6])) == 6 and seeds[6:] == seeds[3:6]  # of the prompt, not of the batch
    for parameters in sampled:
        assert parameters["top_p"] == 1.0 and parameters["top_k"] == 0 == parameters["min_p"]
        assert parameters["stop_token_ids"] == [TOKENIZER.eos_token_id]
        assert parameters["ignore_eos"] and parameters["max_tokens"] == 6


def sampling(engine: VllmEngine, **settings: Any) -> VllmEngine:
    config = replace(CONFIG, **settings)
    parts = (engine.client, engine.policy, engine.accelerator, TOKENIZER, engine.end_tokens)
    return VllmEngine(*parts, config)


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 3}, {"top_k": 5, "top_p": 0.8}, {"top_k": 5, "min_p": 0.1}, {"top_k": 14}],
    ids=str,
)
def test_completions_are_scored_over_the_ids_that_vllm_kept(
    settings: dict[str, Any], engine: VllmEngine
) -> None:
    engine = sampling(engine, **settings, min_new_tokens=2)
    for r in engine.complete(PROMPTS, **ASK, step=0):
        sets = kept_ids.decode(r.kept_ids or "")
        assert max(map(len, sets)) <= settings["top_k"]
        assert all(token in kept for token, kept in zip(r.completion_ids, sets, strict=True))
        expected = logprobs_of(engine.policy, r.prompt_ids, r.completion_ids, 1.3, sets)
        assert r.sampling_logprobs == pytest.approx(expected, abs=1e-5)
    sampled = [r.parameters for r in engine.client.asked if r.parameters["temperature"]]
    for parameters in sampled:
        assert {name: parameters[name] for name in settings} == settings
        assert parameters["min_tokens"] == 2
        assert parameters["logprobs"] == min(2 * settings["top_k"], 15)
    probe = next(r.parameters for r in engine.client.asked if not r.parameters["temperature"])
    assert probe["min_tokens"] == 0 and probe["logprobs"] == 0
    greedy = engine.complete(PROMPTS, **{**ASK, "temperature": 0.0}, step=0)
    assert all(r.kept_ids is None for r in greedy)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda likeliest: (), "fewer than 6 with top_k=3, got up to 0 for 0;"),
        (lambda likeliest: tuple(((0, -9999.0),) for _ in likeliest), "got up to 0 for"),
        # Six of six have a probability: a seventh may tie with them, or nothing was left out.
        (lambda likeliest: (tuple((i, -1.8) for i in range(6)),) * len(likeliest), "to 6 for"),
    ],
)
def test_ids_that_vllm_does_not_tell_in_full_are_one_sentence(
    spoil: Any, message: str, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sampling(engine, top_k=3)
    ask = engine.client.ask
    monkeypatch.setattr(
        engine.client,
        "ask",
        lambda rs: [(i, replace(a, likeliest=spoil(a.likeliest))) for i, a in ask(rs)],
    )
    with pytest.raises(BrokenEngine, match=f"vllm: expected the ids kept for each .*{message}"):
        engine.complete(PROMPTS, **ASK, step=0)


def test_stop_strings_are_vllms_and_end_the_completion_here_as_there(engine: VllmEngine) -> None:
    engine = sampling(engine, stop=["3", "7"])
    rollouts = engine.complete(PROMPTS, **{**ASK, "num_generations": 8}, step=0)
    assert {r.finish for r in rollouts} == {"length", "stop"}
    for r in rollouts:
        assert not set(r.completion[:-1]) & {"3", "7"}
        assert len(r.sampling_logprobs or ()) == len(r.completion_ids)
    assert engine.client.asked[-1].parameters["stop"] == ["3", "7"]
    assert engine.client.asked[-1].parameters["skip_special_tokens"] is False
    probe = next(r.parameters for r in engine.client.asked if not r.parameters["temperature"])
    assert probe["stop"] == []


def test_answer_that_vllm_ended_early_has_stopped(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the stop string is not seen here."""
    engine = sampling(engine, stop=["never"])
    ask = engine.client.ask
    short = lambda a: replace(a, ids=a.ids[:2], logprobs=a.logprobs[:2])  # noqa: E731
    monkeypatch.setattr(engine.client, "ask", lambda rs: [(i, short(a)) for i, a in ask(rs)])
    monkeypatch.setattr(engine, "send", lambda prompt: None)
    assert {r.finish for r in engine.complete(PROMPTS, **ASK, step=0)} == {"stop"}


def test_colocated_vllm_looks_for_text_only_where_it_is_to_stop_at_some() -> None:
    asked: list[dict[str, Any]] = []
    found = {4: SimpleNamespace(logprob=-0.5), 2: SimpleNamespace(logprob=-1.0)}
    one = SimpleNamespace(token_ids=[4], logprobs=[found], finish_reason="length")
    output = SimpleNamespace(outputs=[one], prompt_token_ids=[3], prompt_logprobs=None)
    client = object.__new__(Colocated)
    client.sampling_params = lambda **given: asked.append(given)
    client.llm = SimpleNamespace(generate=lambda prompts, *_, **__: [output] * len(prompts))
    requests = [Request((3,), {"logprobs": 0}), Request((3,), {"logprobs": 4})]
    (_, plain), (_, kept) = client.ask(requests)
    client.ask([Request((3,), {"stop": ["x"]}), Request((3,), {"stop": []})])
    assert [given["detokenize"] for given in asked] == [False, False, True, False]
    assert plain == Answer((4,), (-0.5,), (), ())
    assert kept == Answer((4,), (-0.5,), (), (((4, -0.5), (2, -1.0)),))
    one.finish_reason = "abort"
    with pytest.raises(BrokenEngine, match="whole completions of the engine beside the trainer"):
        client.ask(requests)


def test_server_tells_the_likeliest_ids_as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    top = [{"token": "token_id:4", "logprob": -0.5}, {"token": "token_id:2", "logprob": -9999.0}]
    content = [{"token": "token_id:4", "logprob": -0.5, "top_logprobs": top}]
    card = {"choices": [{"token_ids": [4], "logprobs": {"content": content}}]}
    monkeypatch.setattr(Server, "_read", lambda *_: json.dumps(card).encode())
    server = Server("http://127.0.0.1:9", 5.0)
    ((_, answer),) = Servers([server.base_url], 5.0).ask([Request((3,), {"logprobs": 4})])
    assert answer == Answer((4,), (-0.5,), (), (((4, -0.5), (2, -9999.0)),))
    ((_, answer),) = Servers([server.base_url], 5.0).ask([Request((3,), {"logprobs": 0})])
    assert answer == Answer((4,), (-0.5,), ())


def test_server_that_tells_too_few_log_probabilities_is_refused(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not after the first step's completions."""

    def refused(self: Server, request: Request, timeout_s: float) -> Answer:
        raise BrokenEngine(f"status 400: {request.parameters['logprobs']} is more than 20")

    monkeypatch.setattr(Server, "check", lambda self, length: None)
    monkeypatch.setattr(Server, "take_files", lambda self: None)
    monkeypatch.setattr(Server, "_tokens", refused)
    config = replace(CONFIG, use_vllm=True, vllm_mode="server", top_k=6)
    with pytest.raises(ValueError, match="top_k: expected a server that tells 12 log-"):
        start(config, engine.policy, engine.accelerator, TOKENIZER, {1}, 8)


def test_probe_is_drawn_from_the_weights_that_were_sent(engine: VllmEngine) -> None:
    engine.complete(PROMPTS, **ASK, step=0)
    (expected,) = generate(
        engine.policy.model,
        TOKENIZER,
        PROMPTS[:1],
        seeds=[0],
        num_generations=1,
        temperature=0.0,
        max_completion_length=5,
        batch_size=1,
        end_tokens={99},
    )
    assert engine.probe.completion_ids == expected.completion_ids


@pytest.mark.parametrize("size", [0.05, 1e-6], ids=["large", "within the noise"])
def test_update_that_does_not_arrive_is_noticed(
    size: float, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.complete(PROMPTS, **ASK, step=0)
    take_a_step(engine, size)
    monkeypatch.setattr(engine.client, "load", list)  # reads the files, and forgets them
    with pytest.raises(BrokenEngine, match="vllm: expected the policy's .* got the same ones as"):
        engine.complete(PROMPTS, **ASK, step=1)


def test_update_of_which_a_part_is_lost_is_noticed(engine: VllmEngine) -> None:
    engine.complete(PROMPTS, **ASK, step=0)
    take_a_step(engine)
    engine.client.left_out = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(BrokenEngine, match=r"got others by 0\.\d+ nats; the weights did not"):
        engine.complete(PROMPTS, **ASK, step=1)


def test_logprobs_that_stay_are_stale_once_ours_moved_by_more_than_rounding(
    engine: VllmEngine,
) -> None:
    engine.complete(PROMPTS, **ASK, step=0)
    ours, theirs = engine.before
    assert torch.equal(engine.check(ours + 1e-6), theirs)
    with pytest.raises(BrokenEngine, match="got the same ones as before the update"):
        engine.check(ours + 1e-4)


def test_in_bfloat16_the_noise_alone_decides(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.config = replace(CONFIG, mixed_precision="bf16")
    engine.complete(PROMPTS, **ASK, step=0)
    assert engine.client.dtypes == {torch.bfloat16}  # what vLLM computes in, and half the bytes
    ours, theirs = engine.before
    assert 0 < (ours - theirs).abs().mean() < vllm_engine.NOISE[torch.bfloat16]
    monkeypatch.setattr(engine.client, "load", list)
    take_a_step(engine, 1e-5)  # as one of an adapter that is lost in the rounding of the sum
    engine.complete(PROMPTS, **ASK, step=1)
    take_a_step(engine, 0.3)
    with pytest.raises(BrokenEngine, match=r"got others by \d+\.\d+ nats; the weights did not"):
        engine.complete(PROMPTS, **ASK, step=2)


def test_policy_that_is_not_finite_is_no_match(engine: VllmEngine) -> None:
    engine.complete(PROMPTS, **ASK, step=0)
    with pytest.raises(BrokenEngine, match="got others by nan nats"):
        engine.check(engine.before[1] * float("nan"))


@pytest.mark.parametrize(
    ("worse", "message"),
    [
        ({"logprobs": ()}, "expected tokens and as many log-probabilities, got 5 and 0"),
        ({"ids": (), "logprobs": ()}, "expected tokens .* got 0 and 0"),
        ({"prompt_logprobs": (-1.0,)}, "expected 5 finite log-probabilities of a prompt's tokens"),
        ({"prompt_logprobs": (float("nan"),) * 5}, r"expected 5 finite .* got \[nan"),
    ],
)
def test_answers_that_lack_something_are_one_sentence(
    worse: dict[str, Any], message: str, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = engine.client.ask
    monkeypatch.setattr(
        engine.client, "ask", lambda rs: [(i, replace(a, **worse)) for i, a in ask(rs)]
    )
    with pytest.raises(BrokenEngine, match=message):
        engine.complete(PROMPTS, **ASK, step=0)


def test_probe_of_the_longest_prompt_fits_completions_of_one_token(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[int] = []
    monkeypatch.setattr(Server, "check", lambda self, length: asked_for.append(length))
    monkeypatch.setattr(Server, "take_files", lambda self: None)
    config = replace(CONFIG, max_completion_length=1, use_vllm=True, vllm_mode="server")
    longest = len(PROMPTS[0].ids)
    found = start(config, engine.policy, engine.accelerator, TOKENIZER, {1}, longest)
    found.client = engine.client
    found.complete(PROMPTS[:1], **{**ASK, "seeds": [3]}, step=0)
    read = [len(r.prompt_ids) + r.parameters["max_tokens"] for r in engine.client.asked]
    assert asked_for == [max(read)]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_weights_folder_is_the_one_that_is_set(mode: str, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    config = replace(CONFIG, use_vllm=True, vllm_mode=mode, vllm_weights_dir=str(folder))
    assert weights_folder(config) == folder
    make_weights_folder(config)
    assert folder.is_dir()
    folder.rmdir()
    folder.touch()
    with pytest.raises(ValueError, match="vllm_weights_dir: expected a folder to write weights to"):
        make_weights_folder(config)


def test_colocated_client_tells_its_own_failures_from_those_of_the_files() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such layer")

    def full() -> Iterator[Path]:
        raise OSError("no space left")
        yield Path()

    client = object.__new__(Colocated)
    client.llm = SimpleNamespace(start_weight_update=lambda: None, update_weights=fail)
    with pytest.raises(OSError, match="no space left"):
        client.load(full())
    with pytest.raises(BrokenEngine, match="to take new weights, got RuntimeError: no such layer"):
        client.load([Path()])


def test_weights_that_cannot_be_written_are_one_sentence(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "weights_folder", lambda *_, **__: Path("/dev/full"))
    with pytest.raises(BrokenEngine, match="expected to write weights to /dev/full, 1.1 GB and a"):
        engine.complete(PROMPTS, **ASK, step=0)


def test_step_that_changes_nothing_is_no_failure(engine: VllmEngine) -> None:
    for step in range(2):
        engine.complete(PROMPTS, **ASK, step=step)


def test_weights_go_out_in_files_of_limited_size(
    engine: VllmEngine, set_sizes: SetSizes, tmp_path: Path
) -> None:
    model = engine.policy.model
    set_sizes(weights, FILE_BYTES=200_000)
    arrived: dict[str, torch.Tensor] = {}
    count = 0
    for path in weights.one_by_one(iter(model.named_parameters()), tmp_path, torch.float32):
        count += 1
        arrived |= {name: weight.clone() for name, weight in load_file(path).items()}
        assert list(tmp_path.iterdir()) == [path]
    assert count > 2 and not list(tmp_path.iterdir())
    assert all(torch.equal(arrived[name], p) for name, p in model.named_parameters())
    assert arrived.keys() == dict(model.named_parameters()).keys()


# --- How weights travel ---------------------------------------------------------------------------


def test_weights_that_need_no_file_come_as_they_are(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "weights_folder", lambda *_, **__: Path("/dev/full"))
    engine.client.takes_tensors = True
    engine.complete(PROMPTS, **ASK, step=0)
    take_a_step(engine)
    engine.complete(PROMPTS, **ASK, step=1)
    assert engine.client.loads == 2
    assert engine.client.most_at_once == 1  # in this process: no more than a tensor at a time
    engine.config = replace(CONFIG, mixed_precision="bf16")
    engine.complete(PROMPTS, **ASK, step=2)
    assert torch.bfloat16 in engine.client.dtypes


class Place:
    """Accelerate's, of a process on a device."""

    def __init__(self, device: str, *, main: bool = True) -> None:
        self.device, self.is_main_process = torch.device(device), main


URLS = ["http://127.0.0.1:9", "http://127.0.0.1:10"]


def with_vllm(name: str, found: Any = importlib.util.find_spec) -> Any:
    """find_spec where vLLM is installed; others ask it, too, of their own packages."""
    return object() if name == "vllm" else found(name)


@pytest.mark.parametrize(
    ("wanted", "device", "kind"),
    [
        ("files", "cuda", None),
        ("auto", "cpu", None),
        ("auto", "cuda", "nccl"),
        ("nccl", "cuda", "nccl"),
        ("gloo", "cpu", "gloo"),
        ("gloo", "cuda", "gloo"),
    ],
)
def test_group_is_the_one_that_both_sides_can_join(
    wanted: Any, device: str, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[str] = []
    files: list[str] = []
    monkeypatch.setattr(Server, "join", lambda self, kind, device: joined.append(kind))
    monkeypatch.setattr(Server, "take_files", lambda self: files.append(self.base_url))
    monkeypatch.setattr(vllm_start.importlib.util, "find_spec", with_vllm)
    config = replace(CONFIG, vllm_weight_transfer=wanted)
    found = vllm_start.join_group(config, Servers(URLS, 5.0), Place(device))
    assert found == (kind is not None) and joined == ([kind] * 2 if kind else [])
    assert files == ([] if wanted == "nccl" else URLS)  # vLLM's own backend knows of none


def test_files_take_the_groups_place_only_where_nobody_asked_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files: list[str] = []

    def fail(self: Server, kind: str, device: torch.device) -> None:
        raise BrokenEngine("expected the server at A and the trainer at B to join, got neither")

    monkeypatch.setattr(Server, "join", fail)
    monkeypatch.setattr(Server, "take_files", lambda self: files.append(self.base_url))
    monkeypatch.setattr(vllm_start.importlib.util, "find_spec", with_vllm)
    for wanted in ("nccl", "gloo"):
        config = replace(CONFIG, vllm_weight_transfer=wanted)
        with pytest.raises(BrokenEngine, match="server at A and the trainer at B"):
            vllm_start.join_group(config, Servers(URLS, 5.0), Place("cuda"))
    assert files == URLS and not caplog.records  # gloo: they were asked for nothing yet
    files.clear()
    config = replace(CONFIG, vllm_weight_transfer="auto")
    assert not vllm_start.join_group(config, Servers(URLS, 5.0), Place("cuda"))
    assert files == URLS * 2
    (line,) = caplog.messages
    assert line.startswith("Weights go to vLLM by files: expected the server at A and")


@pytest.mark.parametrize("wanted", ["auto", "files", "gloo"])
def test_main_rank_alone_tells_servers_how_weights_come(
    wanted: Any, two: list["Mortal"], engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank's word, which may come later, would end the group that the main one joined."""
    monkeypatch.setattr(Server, "join", lambda self, kind, device: None)
    config = replace(CONFIG, use_vllm=True, vllm_mode="server", vllm_weight_transfer=wanted)
    config = replace(config, vllm_server_base_url=[server.url for server in two])
    for main in (False, True):
        start(config, engine.policy, Place("cpu", main=main), TOKENIZER, {1}, 8)
        for server in two:
            assert server.told.count("/init_weight_transfer_engine") == main


def test_server_that_takes_no_weights_is_refused(address: str) -> None:
    server = Server(address + "/elsewhere", 5.0)
    with pytest.raises(BrokenEngine, match="(?s)that takes new weights, got .* 404.* serve M"):
        server.take_files()


def test_nccl_needs_a_gpu_and_vllm_here(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, vllm_weight_transfer="nccl")
    with pytest.raises(ValueError, match="expected the trainer on a GPU with nccl, got cpu; set"):
        vllm_start.join_group(config, Servers(URLS, 5.0), Place("cpu"))
    monkeypatch.setattr(vllm_start.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BrokenEngine, match="expected the package vllm with nccl, got none; pip"):
        vllm_start.join_group(config, Servers(URLS, 5.0), Place("cuda"))


# --- Engines beside several ranks -----------------------------------------------------------------


def on_a_node(monkeypatch: pytest.MonkeyPatch, engine: VllmEngine, local_rank: int) -> None:
    """Its rank is one of the second node's two; vLLM is beside each."""

    class Beside(Colocated, OtherModel):
        ask, load, __init__ = OtherModel.ask, OtherModel.load, OtherModel.__init__

    engine.client = Beside()
    engine.accelerator = SimpleNamespace(
        num_processes=4,
        process_index=2 + local_rank,
        local_process_index=local_rank,
        is_main_process=False,
        is_local_main_process=local_rank == 0,
        device=torch.device("cpu"),
    )


def test_every_ranks_own_engine_gets_the_weights(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_node(monkeypatch, engine, local_rank=1)
    for step in range(2):
        engine.complete(PROMPTS, **ASK, step=step)
        take_a_step(engine)
    assert engine.client.loads == 2


@pytest.mark.parametrize("local_rank", [0, 1])
def test_copied_weights_wait_once_a_node(
    local_rank: int, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_a_node(monkeypatch, engine, local_rank)
    engine.load(engine.snapshot(0, PROMPTS[0]))
    take_a_step(engine)
    written = tmp_path / "of-this-node"
    written.mkdir()
    found = weights.written(
        engine.policy.model.named_parameters(),
        written,
        torch.float32,  # type: ignore[arg-type]
    )
    of_node = tuple(found)
    real = vllm_engine.gathered

    def gathered(item: Any, group: Any) -> list[Any]:
        if isinstance(item, tuple):
            assert bool(item) == (local_rank == 0)  # who has written
            return [("another node's",), (), item or of_node, ()]
        return real(item, group)

    monkeypatch.setattr(vllm_engine, "gathered", gathered)
    snapshot = engine.snapshot(1, PROMPTS[0])
    engine.load(snapshot)
    assert engine.client.loads == 2
    # The one that has written them deletes them.
    assert [file.exists() for file in snapshot.files] == [local_rank == 1]


class Handler(Answers):
    """A server that answers one request of tokens and breaks down at the next."""

    requests = 0

    def do_GET(self) -> None:
        self.answer({"data": [{"max_model_len": 20}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/init_weight_transfer_engine":
            self.answer({})
        elif self.path == "/inference/v1/generate" and Handler.requests == 0:
            Handler.requests += 1
            self.answer({"choices": [{"token_ids": [1]}]})
        elif self.path == "/inference/v1/generate":
            self.connection.close()
        else:
            self.send_error(404)

    def finish(self) -> None:
        if not self.connection._closed:  # type: ignore[attr-defined]
            super().finish()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with StandIn(Handler) as server:
        yield server.url


def test_servers_failures_are_one_sentence_each(address: str) -> None:
    server = Server(address, 5.0)
    server.check(20)
    with pytest.raises(ValueError, match="expected a server that reads 21 tokens, .* reads 20"):
        server.check(21)
    with pytest.raises(BrokenEngine, match="start_weight_update to work, got status 404"):
        Servers([address], 5.0).load([])
    with pytest.raises(BrokenEngine, match="vllm: expected an answer from .* --resume"):
        list(Servers([server.base_url], 5.0).ask([Request((1, 2), {})]))
    with pytest.raises(
        ValueError, match="expected a vLLM server at .* got no answer of one within 0"
    ):
        Server("http://127.0.0.1:9", 0.1).check(1)


@pytest.mark.parametrize(
    "text",
    [
        b"<html>",
        b"\xff",
        b"",
        b"null",
        b"[1]",
        b'{"choices": []}',
        b'{"choices": [{"token_ids": [null]}]}',
        b'{"choices": [{"token_ids": ["a"]}]}',
        b'{"choices": [{"token_ids": [1], "logprobs": {"content": [{}]}}]}',
        b'{"choices": [{"token_ids": [1]}], "prompt_logprobs": [null, {"3": {"logprob": 0}}]}',
    ],
)
def test_answers_in_another_form_are_one_sentence(
    text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "_read", lambda *_: text)
    server = Server("http://127.0.0.1:9", 0.0)
    for wrong in (
        lambda: list(Servers([server.base_url], 5.0).ask([Request((1, 2), {})])),
        lambda: Servers(["http://127.0.0.1:9"], 0.0).load([]),
    ):
        with pytest.raises(BrokenEngine, match="an answer from http://127.0.0.1:9 in the form of"):
            wrong()
    with pytest.raises(ValueError, match="expected a vLLM server at .* in the form of vLLM's"):
        server.check(1)


def test_failure_that_breaks_off_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost:
        def read(self) -> bytes:
            raise ConnectionResetError

        def close(self) -> None:
            pass

    def urlopen(request: Any, timeout: float) -> Any:
        raise HTTPError(request.full_url, 500, "", {}, Lost())  # type: ignore[arg-type]

    monkeypatch.setattr(vllm_server, "urlopen", urlopen)
    with pytest.raises(BrokenEngine, match=r"got ConnectionResetError\(\); start the server again"):
        list(Servers(["http://127.0.0.1:9"], 1.0).ask([Request((1,), {})]))


def test_tokens_may_take_longer_than_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[str, float]] = []

    def read(self: Server, request: Any, timeout_s: float) -> bytes:
        limits.append((request.selector, timeout_s))
        card = {"data": [{"max_model_len": 8}], "choices": [{"token_ids": [1]}], "success": True}
        return json.dumps(card).encode()

    monkeypatch.setattr(Server, "_read", read)
    server = Server("http://127.0.0.1:9", 5.0)
    server.check(8)
    Servers(["http://127.0.0.1:9"], 5.0).load([Path()])
    assert {limit for _, limit in limits} == {5.0}
    list(Servers([server.base_url], 5.0).ask([Request((1,), {})]))
    assert limits[-1] == ("/inference/v1/generate", TOKENS_S) and limits[-1][1] > 3600


@pytest.mark.parametrize("times", [1, 2])
def test_refused_connection_is_tried_once_more_for_tokens_alone(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def urlopen(request: Any, timeout: float) -> Any:
        tried.append(request.selector)
        if len(tried) <= times:
            raise URLError(ConnectionRefusedError())
        return BytesIO(b'{"choices": [{"token_ids": [1]}]}')

    monkeypatch.setattr(vllm_server, "RETRY_S", 0.0)
    monkeypatch.setattr(vllm_server, "urlopen", urlopen)
    server = Server("http://127.0.0.1:9", 5.0)
    if times == 1:
        assert list(Servers([server.base_url], 5.0).ask([Request((1,), {})])) == [
            (0, Answer((1,), (), ()))
        ]
    else:
        with pytest.raises(BrokenEngine, match="vllm: expected an answer from"):
            list(Servers([server.base_url], 5.0).ask([Request((1,), {})]))
    assert len(tried) == 2
    tried.clear()
    with pytest.raises(BrokenEngine, match="vllm: expected an answer from"):
        Servers([server.base_url], 5.0).load([])
    assert len(tried) == 1


def test_server_is_started_for_this_machine_only_and_ready_for_weights() -> None:
    command, environment = serve_command("folder", ["--port", "8001"])
    assert command[3:5] == ["--model", "folder"] and command[-2:] == ["--port", "8001"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--max-logprobs") + 1] == "2048"
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    # Where seeded requests may not be read in parts; the user's own options come last, and count.
    assert ("--no-enable-chunked-prefill" in command) is not torch.cuda.is_available()


# --- Ahead of the updates, and several servers ----------------------------------------------------


def test_weights_wait_in_files_until_they_are_taken(engine: VllmEngine) -> None:
    engine.load(engine.snapshot(0, PROMPTS[0]))
    assert engine.client.loads == 1  # the first ones went out at once
    for step in (1, 2):
        take_a_step(engine)
        snapshot, copied = engine.snapshot(step, PROMPTS[0]), copy.deepcopy(engine.policy)
        take_a_step(engine)  # the trainer goes on
        assert engine.client.loads == step and all(file.exists() for file in snapshot.files)
        engine.load(snapshot)
        assert not any(file.parent.exists() for file in snapshot.files)
        groups = dict(engine.sample(PROMPTS, **ASK, step=step))
        assert sorted(groups) == [0, 1]
        for r in (r for group in groups.values() for r in group):
            expected = logprobs_of(copied, r.prompt_ids, r.completion_ids, 1.3)
            assert r.sampling_logprobs == pytest.approx(expected, abs=1e-5) and r.step == step


def test_copied_weights_that_get_lost_are_noticed(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load(engine.snapshot(0, PROMPTS[0]))
    take_a_step(engine, 0.3)
    snapshot = engine.snapshot(1, PROMPTS[0])
    monkeypatch.setattr(engine.client, "load", list)
    with pytest.raises(BrokenEngine, match="got the same ones as before the update"):
        engine.load(snapshot)


class Mortal(StandIn):
    """Answers every prompt with its own first token, until it is told to break down."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.told: list[str] = []  # the paths of all requests
        self.dead = False
        mortal = self

        class Answering(Handler):
            def do_POST(self) -> None:
                body = self.asked()
                mortal.told.append(self.path)
                if mortal.dead:
                    self.connection.close()
                    return
                if self.path == "/inference/v1/generate":
                    mortal.asked.append(body["token_ids"][0])
                    self.answer({"choices": [{"token_ids": body["token_ids"][:1]}]})
                else:
                    self.answer({"success": True})

        super().__init__(Answering)


@pytest.fixture
def two() -> Iterator[list[Mortal]]:
    with Mortal() as one, Mortal() as other:
        yield [one, other]


def first_tokens(servers: Servers, prompts: Sequence[int]) -> list[int]:
    answers = dict(servers.ask([Request((token, 9), {}) for token in prompts]))
    return [answers[place].ids[0] for place in range(len(prompts))]


def test_servers_share_the_groups_and_one_that_dies_is_left_out(two: list[Mortal]) -> None:
    servers = Servers([server.url for server in two], 5.0)
    servers.check(20)
    prompts = [3, 3, 4, 4, 5, 5, 6, 6]
    two[0].asked.clear()
    two[1].asked.clear()
    assert first_tokens(servers, prompts) == prompts
    assert sorted(two[0].asked) == [3, 3, 5, 5] and sorted(two[1].asked) == [4, 4, 6, 6]
    two[0].dead = True
    assert first_tokens(servers, prompts) == prompts
    assert [server.base_url for server in servers.alive] == [two[1].url]
    two[0].dead = False  # it came back, with whatever weights
    two[0].asked.clear()
    assert first_tokens(servers, prompts) == prompts and not two[0].asked
    two[1].dead = True
    with pytest.raises(BrokenEngine, match="vllm: expected an answer from .* --resume"):
        first_tokens(servers, prompts)


def test_server_that_misses_the_weights_is_left_out(two: list[Mortal]) -> None:
    servers = Servers([server.url for server in two], 5.0)
    two[1].dead = True
    servers.load([Path("weights")])
    assert [server.base_url for server in servers.alive] == [two[0].url]
    with pytest.raises(BrokenEngine, match="expected a server that answers all ranks, got none"):
        servers.keep({two[1].url})  # as another rank says


def test_server_that_dies_between_weights_and_probe_is_left_out(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that answers with other log-probabilities ends the run: it is no good as it is set up."""
    other, policys = OtherModel(), engine.client
    ours: dict[str, Any] = {URLS[0]: policys, URLS[1]: other}
    dead: set[str] = set()

    def tokens(self: Server, request: Request, timeout_s: float = TOKENS_S) -> Answer:
        if self.base_url in dead:
            raise BrokenEngine(f"vllm: expected an answer from {self.base_url}, got none")
        return ours[self.base_url]._answer(request)

    def take(self: Server, parcel: Path) -> None:
        ours[self.base_url].load([parcel])

    monkeypatch.setattr(Server, "_tokens", tokens)
    monkeypatch.setattr(Server, "take", take)
    for name in ("start_load", "finish_load"):
        monkeypatch.setattr(Server, name, lambda self: None)
    engine.client = Servers(URLS, 5.0)
    engine.complete(PROMPTS, **ASK, step=0)
    take_a_step(engine)
    monkeypatch.setattr(Server, "finish_load", lambda self: dead.add(URLS[0]))
    assert len(engine.complete(PROMPTS, **ASK, step=1)) == 6
    assert [server.base_url for server in engine.client.alive] == URLS[1:]
    take_a_step(engine)
    other.left_out = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(BrokenEngine, match=r"got others by 0\.\d+ nats; the weights did not"):
        engine.complete(PROMPTS, **ASK, step=2)


def test_several_turns_are_asked_of_vllm_one_by_one(engine: VllmEngine) -> None:
    settings = {"max_completion_length": 12, "stop": ["3", "7"], "top_k": 9, "min_new_tokens": 2}
    engine = sampling(engine, **settings)
    environments = Environments("tests.train.environments.odd:Counts", 30.0)
    engine.dialogue = Dialogue(environments, Renderer(TOKENIZER), engine.config, 40)
    rollouts = engine.complete(PROMPTS, **ASK, step=0)
    assert len(rollouts) == 6 and any(len(r.sampled) > 1 for r in rollouts)
    for r in rollouts:
        (micro,) = pack([r], token_budget=1, share_prompts=False)
        expected = engine.policy(micro, 1.3).logprobs.tolist()
        assert r.sampling_logprobs == pytest.approx(expected, abs=1e-5)
        assert len(r.completion_ids) <= 12 and len(micro.targets) == len(r.sampled_ids)
    asked = [r for r in engine.client.asked if r.parameters["temperature"]]
    later = [r for r in asked if r.prompt_ids not in {p.ids for p in PROMPTS}]
    assert later and len({r.parameters["seed"] for r in asked}) == len(asked)
    for request in later:
        used = request.parameters["max_tokens"] + len(request.prompt_ids)
        assert used in {len(p.ids) + 12 for p in PROMPTS}
        assert request.parameters["min_tokens"] == min(2, request.parameters["max_tokens"])
