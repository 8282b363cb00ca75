"""What several servers asked as one do when one of them fails in the middle of its work.

The servers are stand-ins that answer vLLM's documented requests.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from agro_train.engines.engine import BrokenEngine
from agro_train.engines.vllm_client import Request
from agro_train.engines.vllm_servers import Servers
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
