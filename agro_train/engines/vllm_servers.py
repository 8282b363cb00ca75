"""Several vLLM servers, asked as one."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, as_completed
from contextlib import ExitStack
from functools import partial

import torch

from agro_train.engines.background import at_once
from agro_train.engines.engine import BrokenEngine
from agro_train.engines.vllm_client import Answer, Request
from agro_train.engines.vllm_server import Server
from agro_train.engines.weight_transfer import Kind
from agro_train.engines.weights import Parcel

logger = logging.getLogger(__name__)

AT_ONCE = 256  # requests to a server
# Answers to be, each with its request's place and the server that was asked.
Asked = dict[Future[Answer], tuple[int, Server]]


class Servers:
    """Several vLLM servers of the same weights, asked as one: each is asked for whole groups.

    One that does not answer is left out for good, and what it was asked is asked again elsewhere:
    it may come back with the weights that it was started with.
    """

    def __init__(self, base_urls: Sequence[str], timeout_s: float) -> None:
        self.alive = [Server(url, timeout_s) for url in base_urls]

    @property
    def takes_tensors(self) -> bool:
        return any(server.transfer for server in self.alive)

    def check(self, length: int) -> None:
        """Every server's. Raises Refusal, as one that is missing at the start is a mistake."""
        for server in self.alive:
            server.check(length)

    def join(self, kind: Kind, device: torch.device) -> None:
        """Has each server join a group with this process. Raises BrokenEngine where one does
        not."""
        for server in self.alive:
            server.join(kind, device)

    def take_files(self) -> None:
        for server in self.alive:
            server.take_files()

    def close(self) -> None:
        for server in self.alive:
            server.close()

    def check_logprobs(self, count: int) -> None:
        for server in self.alive:
            server.check_logprobs(count)

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        left = dict(enumerate(requests))
        while left:
            failed: dict[Server, BrokenEngine] = {}  # the first failure of each
            with ExitStack() as stack:
                asked = self._asked(left, stack)
                for future in as_completed(asked):
                    place, server = asked[future]
                    try:
                        answer = future.result()
                    except CancelledError:
                        continue
                    except BrokenEngine as error:
                        failed.setdefault(server, error)
                        drop(asked, server)
                        continue
                    del left[place]
                    yield place, answer
            for server, failure in failed.items():
                self.leave_out(server, failure)

    def _asked(self, left: Mapping[int, Request], stack: ExitStack) -> Asked:
        """A round of the requests that are left, until the stack ends."""
        prompts = {ids: n for n, ids in enumerate({r.prompt_ids: None for r in left.values()})}
        shares: list[list[int]] = [[] for _ in self.alive]
        for place, request in left.items():
            shares[prompts[request.prompt_ids] % len(shares)].append(place)
        asked: Asked = {}
        for server, share in zip(self.alive, shares, strict=True):
            # Threads of its own: a slow server must not hold up what another one is asked.
            calls = [partial(server._tokens, left[place]) for place in share]
            futures = stack.enter_context(at_once(calls, AT_ONCE))
            asked |= {future: (place, server) for future, place in zip(futures, share, strict=True)}
        return asked

    def answers(self, request: Request) -> list[Answer]:
        """Every server's."""
        found: list[Answer] = []
        self._all(lambda server: found.append(server._tokens(request)))
        return found

    def load(self, parcels: Iterable[Parcel]) -> None:
        self._all(lambda server: server.start_load())
        for parcel in parcels:
            self._all(lambda server, parcel=parcel: server.take(parcel))  # type: ignore[misc]
        self._all(lambda server: server.finish_load())

    def keep(self, base_urls: set[str]) -> None:
        """Leaves out the others: another rank has found them dead."""
        for server in self.alive:
            if server.base_url not in base_urls:
                server.close()
        self.alive = [server for server in self.alive if server.base_url in base_urls]
        if not self.alive:
            raise BrokenEngine(
                "vllm: expected a server that answers all ranks, got none that does; start them "
                "again with `agro serve MODEL`, and then the run with --resume"
            )

    def leave_out(self, server: Server, error: BrokenEngine) -> None:
        """Raises the error if the server is the last one."""
        if server not in self.alive:
            return
        if len(self.alive) == 1:
            raise error
        self.alive.remove(server)
        server.close()
        logger.warning(
            "%s is left out, %d server(s) go on: %s", server.base_url, len(self.alive), error
        )

    def _all(self, function: Callable[[Server], None]) -> None:
        for server in list(self.alive):
            try:
                function(server)
            except BrokenEngine as error:
                self.leave_out(server, error)


def drop(asked: Asked, server: Server) -> None:
    """What the server has not been asked yet, it is not asked in this round."""
    for future, (_, whose) in asked.items():
        if whose is server:
            future.cancel()
