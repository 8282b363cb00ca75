"""What several servers asked as one do when one of them fails in the middle of its work.

The servers are stand-ins that answer vLLM's documented requests.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import Any

import pytest

from agro_train.engines import vllm_servers
from agro_train.engines.engine import BrokenEngine
from agro_train.engines.vllm_client import Request
from agro_train.engines.vllm_servers import Servers
from agro_train.interrupt import Interrupted
from tests.train.engines.servers import Answers, StandIn


class Standing(StandIn):
    """Answers a prompt with its own first token, or as it is told to."""

    def __init__(self) -> None:
        self.prompts: list[int] = []  # the first tokens of those that came
        self.choice: Callable[[int], dict[str, Any]] = lambda token: {"token_ids": [token]}
        standing = self

        class Answering(Answers):
            def do_POST(self) -> None:
                token = self.asked()["token_ids"][0]
                standing.prompts.append(token)
                self.answer({"choices": [standing.choice(token)]})

        super().__init__(Answering)


@pytest.fixture
def two() -> Iterator[list[Standing]]:
    with Standing() as one, Standing() as other:
        yield [one, other]


def requests(tokens: Sequence[int]) -> list[Request]:
    return [Request((token, 9), {"max_tokens": 64}) for token in tokens]


def asked(servers: Servers, tokens: Sequence[int]) -> list[int]:
    """The answers to the prompts that begin so."""
    answers = dict(servers.ask(requests(tokens)))
    return [answers[place].ids[0] for place in range(len(tokens))]


def ending(reason: str | None) -> Callable[[int], dict[str, Any]]:
    """Answers that vLLM has ended for that reason."""
    return lambda token: {"token_ids": [token], "finish_reason": reason}


# --- A completion that vLLM broke off -------------------------------------------------------------


@pytest.mark.parametrize("reason", ["abort", "error", "repetition", "a later vLLM's word"])
def test_completion_that_a_server_broke_off_is_asked_for_elsewhere(
    reason: str, two: list[Standing]
) -> None:
    two[0].choice = ending(reason)
    servers = Servers([server.url for server in two], 5.0)
    assert asked(servers, [3, 4]) == [3, 4]
    assert [server.base_url for server in servers.alive] == [two[1].url]
    assert sorted(two[1].prompts) == [3, 4]
    two[1].choice = ending(reason)
    with pytest.raises(BrokenEngine, match=f"expected whole completions of {two[1].url}, got one "):
        asked(servers, [5])


@pytest.mark.parametrize("reason", ["stop", "length", None])
def test_completion_that_ended_by_itself_is_taken(reason: str | None, two: list[Standing]) -> None:
    two[0].choice = ending(reason)
    assert asked(Servers([two[0].url], 5.0), [3]) == [3]


# --- A server that dies before the probe ----------------------------------------------------------


def test_every_server_is_asked_for_a_probe_and_one_that_is_gone_is_left_out(
    two: list[Standing],
) -> None:
    servers = Servers([server.url for server in two], 5.0)
    (request,) = requests([3])
    assert [answer.ids for answer in servers.answers(request)] == [(3,), (3,)]
    two[0].choice = ending("abort")
    assert [answer.ids for answer in servers.answers(request)] == [(3,)]
    assert [server.base_url for server in servers.alive] == [two[1].url]
    two[1].choice = ending("abort")
    with pytest.raises(BrokenEngine, match="expected whole completions"):
        servers.answers(request)


# --- What is dropped, and what is not asked any more ----------------------------------------------


@pytest.fixture
def held() -> Iterator[Event]:
    """Set, it lets the servers answer."""
    event = Event()
    yield event
    event.set()


def test_interrupt_drops_what_has_not_been_answered(
    two: list[Standing], held: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_servers, "AT_ONCE", 2)

    def choice(token: int) -> dict[str, Any]:
        assert token == 3 or held.wait(2)
        return {"token_ids": [token]}

    two[0].choice = choice
    answers = Servers([two[0].url], 30.0).ask(requests([3, *[4] * 20]))
    assert next(answers)[0] == 0
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        answers.throw(Interrupted(signal.SIGTERM))
    assert time.monotonic() - begun < 1  # nor are those in flight waited for
    held.set()
    time.sleep(0.1)
    assert len(two[0].prompts) <= 3  # the first, and the two that were under way


def test_server_that_failed_once_is_asked_no_more_in_that_round(
    two: list[Standing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_servers, "AT_ONCE", 1)

    def choice(token: int) -> dict[str, Any]:
        if token == 3:
            return {"token_ids": [3], "finish_reason": "abort"}
        time.sleep(0.3)  # by then the failure has been read
        return {"token_ids": [token]}

    two[0].choice = choice
    servers = Servers([server.url for server in two], 5.0)
    prompts = [3, 4, *[5, 6] * 10]  # by turns for the one and the other
    assert asked(servers, prompts) == prompts
    assert two[0].prompts in ([3], [3, 5])  # 5 where it was begun before the failure was read
    assert [server.base_url for server in servers.alive] == [two[1].url]
