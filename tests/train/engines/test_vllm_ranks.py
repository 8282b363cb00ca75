"""vLLM beside several ranks: what an engine is started with, and who generates what. vLLM's place
is taken by a stand-in that answers a prompt by its seed; two ranks are two threads."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agro_train.engines.engine import BrokenEngine
from agro_train.engines.vllm_client import Request
from agro_train.engines.vllm_engine import VllmEngine
from agro_train.engines.vllm_ranks import OF_THE_LAUNCH, Shared, alone, kept


class Exchange:
    """What ranks of a group give each other, all in the same order."""

    def __init__(self, size: int) -> None:
        self.barrier, self.items = Barrier(size, timeout=10), [None] * size

    def gathered(self, rank: int, item: Any) -> list[Any]:
        self.items[rank] = item
        self.barrier.wait()
        found = list(self.items)
        self.barrier.wait()
        return found


ASK: Any = {"seeds": [], "num_generations": 1, "temperature": 1.0, "step": 0}
Rank = tuple[Shared, list[list[int]]]


def rank_of(exchange: Exchange, rank: int) -> Rank:
    """A rank's client, and the seeds that its vLLM is asked for, call by call."""
    calls: list[list[int]] = []

    def generate(prompts: list[Any], parameters: list[dict[str, Any]], **_: object) -> list[Any]:
        calls.append([p["seed"] for p in parameters])
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=[p["seed"]], logprobs=[], finish_reason="stop")],
                prompt_token_ids=prompt["prompt_token_ids"],
                prompt_logprobs=None,
            )
            for prompt, p in zip(prompts, parameters, strict=True)
        ]

    client = object.__new__(Shared)
    client.sampling_params = lambda **given: given
    client.llm = SimpleNamespace(generate=generate)
    client.group = rank
    client._gathered = lambda item: exchange.gathered(rank, item)  # type: ignore[method-assign]
    return client, calls


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[Rank]:
    """The ranks of one engine."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: group)
    exchange = Exchange(2)
    return [rank_of(exchange, rank) for rank in range(2)]


def requests(*seeds: int) -> list[Request]:
    return [Request((seed, 1), {"seed": seed}) for seed in seeds]


def on_ranks(*functions: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(functions)) as ranks:
        return [future.result(20) for future in [ranks.submit(f) for f in functions]]


def test_ranks_of_an_engine_generate_the_same_and_each_keeps_its_own(two: list[Rank]) -> None:
    (one, ones), (other, others) = two
    first, second = on_ranks(lambda: one.ask(requests(3, 4)), lambda: other.ask(requests(5)))
    assert ones == others == [[3, 4, 5]]
    assert [(place, answer.ids) for place, answer in first] == [(0, (3,)), (1, (4,))]
    assert [(place, answer.ids) for place, answer in second] == [(0, (5,))]
    # Alone, the prompt has the same completion.
    alone_, _ = rank_of(Exchange(1), 0)
    assert [answer.ids for _, answer in alone_.ask(requests(5))] == [(5,)]


def test_rank_that_has_all_its_turns_goes_on_generating_for_the_others(two: list[Rank]) -> None:
    (one, ones), (other, others) = two

    def turns(client: Shared, *seeds: int) -> list[int]:
        found = [client.ask(requests(seed))[0][1].ids[0] for seed in seeds]
        client.rest()
        return found

    assert on_ranks(lambda: turns(one, 1), lambda: turns(other, 2, 3, 4)) == [[1], [2, 3, 4]]
    assert ones == others == [[1, 2], [3], [4]]


@pytest.mark.parametrize("also_resting", [False, True], ids=["alone", "and then once more"])
def test_rank_that_fails_still_generates_for_the_others(
    also_resting: bool, two: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the first failure is the one that is told."""
    (one, ones), (other, others) = two

    def engine(client: Shared, *seeds: int, fails: bool) -> VllmEngine:
        def one_turn(prompts: Any, **ask: Any) -> Iterator[tuple[int, list[int]]]:
            for place, seed in enumerate(seeds):
                ((_, answer),) = client.ask(requests(seed))
                yield place, list(answer.ids)
            if fails:
                raise BrokenEngine("vllm: the first failure")

        made = object.__new__(VllmEngine)
        made.client, made.dialogue, made.one_turn = client, None, one_turn  # type: ignore[method-assign]
        return made

    def failing() -> str:
        with pytest.raises(BrokenEngine, match="the first failure") as told:
            list(engine(one, 1, fails=True).sample([], **ASK))
        return "".join(getattr(told.value, "__notes__", []))

    if also_resting:
        rest = one.rest

        def rest_and_fail() -> None:
            rest()
            raise RuntimeError("another rank is gone")

        monkeypatch.setattr(one, "rest", rest_and_fail)
    notes, found = on_ranks(
        failing, lambda: dict(engine(other, 2, 3, 4, fails=False).sample([], **ASK))
    )
    assert found == {0: [2], 1: [3], 2: [4]}
    assert ones == others == [[1, 2], [3], [4]]
    assert ("another rank is gone" in notes) == also_resting


def test_engine_that_failed_is_asked_for_nothing_more(two: list[Rank]) -> None:
    """On any rank: the others may wait in vLLM, and come to no exchange of requests."""

    def failing(client: Shared) -> None:
        exchanges: list[Any] = []
        gathered = client._gathered

        def counted(item: Any) -> list[Any]:
            exchanges.append(item)
            return gathered(item)

        def generate(*_: object, **__: object) -> list[Any]:
            raise RuntimeError("out of memory")

        client._gathered = counted  # type: ignore[method-assign]
        client.llm.generate = generate
        with pytest.raises(BrokenEngine, match="out of memory"), client.asking():
            client.ask(requests(1))
        assert len(exchanges) == 1

    on_ranks(*(lambda client=client: failing(client) for client, _ in two))  # type: ignore[misc]


def test_engine_of_a_ranks_own_knows_nothing_of_the_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in OF_THE_LAUNCH:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with alone(1):
        assert not any(name in os.environ for name in OF_THE_LAUNCH)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert all(os.environ[name] == "7" for name in OF_THE_LAUNCH)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with alone(2):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with alone(1):
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_vllm_in_this_process_leaves_random_numbers_and_threads_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    before, threads = torch.set_num_threads, torch.get_num_threads()
    with kept():
        torch.manual_seed(99)
        torch.set_num_threads = lambda n: None  # as vLLM on a CPU
    assert torch.equal(torch.randn(4), expected)
    assert torch.set_num_threads is before and torch.get_num_threads() == threads
