"""Weights reach a server's workers by a group of its own: over gloo as they would over NCCL.

The server is a stand-in that answers vLLM's documented requests, its workers are threads.
"""

import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from agro_train.engines import weight_transfer
from agro_train.engines.background import in_background
from agro_train.engines.engine import BrokenEngine
from agro_train.engines.vllm_server import Server
from agro_train.engines.vllm_servers import Servers
from agro_train.engines.weight_transfer import GlooGroup, NcclGroup, Transfer, sizes, unpacked
from agro_train.engines.weights import parcels
from tests.train.engines.servers import Answers, StandIn

CPU = torch.device("cpu")
# What vLLM 0.32 takes at /init_weight_transfer_engine with its backend for NCCL.
FIELDS = {
    "master_address",
    "master_port",
    "rank_offset",
    "world_size",
    "packed",
    "packed_buffer_size_bytes",
    "packed_num_buffers",
}


class Workers(StandIn):
    """A server of two workers, which take what the trainer broadcasts and keep it."""

    def __init__(self) -> None:
        self.groups: list[GlooGroup] = []
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.held: list[dict[str, Tensor]] = [{}, {}]  # by each worker
        self.failing = ""  # the request that is answered with an error
        workers = self

        class Answering(Answers):
            def do_GET(self) -> None:
                self.answer({"world_size": 2})

            def do_POST(self) -> None:
                body = self.asked()
                name = self.path.removeprefix("/")
                workers.told.append((name, body))
                if name == workers.failing:
                    self.answer({"error": {"message": "no such backend"}}, status=500)
                    return
                if name == "init_weight_transfer_engine":
                    workers.join(body["init_info"])
                elif name == "update_weights" and workers.groups:
                    workers.receive(**body["update_info"])
                self.answer({"success": True})

        super().__init__(Answering)

    def join(self, info: dict[str, Any]) -> None:
        self.groups = []
        if not info:
            return
        where, size = (info["master_address"], info["master_port"]), info["world_size"]

        def one(rank: int) -> GlooGroup:
            within = timedelta(seconds=5)
            store = dist.TCPStore(
                *where, None, False, within, wait_for_workers=False, use_libuv=False
            )
            return GlooGroup(store, rank, size, "127.0.0.1", 5, 5)

        offset = info["rank_offset"]
        made = [in_background(lambda r=r: one(r)) for r in range(offset, size)]
        self.groups = [future.result(5) for future in made]

    def receive(self, names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> None:
        for group, held in zip(self.groups, self.held, strict=True):
            packed = torch.empty(sum(sizes(dtype_names, shapes)), dtype=torch.uint8)
            done = group.start(packed)
            while not done():
                time.sleep(0.001)
            held.update(unpacked(packed, names, dtype_names, shapes))


@pytest.fixture
def two() -> Iterator[list[Workers]]:
    with Workers() as one, Workers() as other:
        yield [one, other]


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"embed": (5, 4), "norm": (4,), "head": (3, 4), "scale": ()}
    made = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    made["head"] = made["head"].T  # as it lies in memory, another order
    return made


def assert_holds(held: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert held.keys() == expected.keys()
    for name, weight in expected.items():
        assert held[name].dtype == weight.dtype and torch.equal(held[name], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_worker_of_every_server_gets_the_weights(
    dtype: torch.dtype, two: list[Workers]
) -> None:
    servers = Servers([server.url for server in two], 5.0)
    assert not servers.takes_tensors
    servers.join("gloo", CPU)
    assert servers.takes_tensors
    for _ in range(2):
        sent = weights(dtype)
        servers.load(parcels(iter(sent.items()), full=50))
        for server in two:
            for held in server.held:
                assert_holds(held, sent)
    names = [name for name, _ in two[0].told]
    updates = ["update_weights"] * (3 if dtype == torch.float32 else 2)  # of 50 bytes and a tensor
    update = ["start_weight_update", *updates, "finish_weight_update", "reset_prefix_cache"]
    assert names == ["init_weight_transfer_engine", *update, *update]
    servers.close()


def test_copied_weights_that_waited_in_a_file_go_by_the_group(
    two: list[Workers], tmp_path: Path
) -> None:
    sent = {name: weight.contiguous() for name, weight in weights().items()}
    save_file(sent, tmp_path / "weights")
    servers = Servers([two[0].url], 5.0)
    servers.join("gloo", CPU)
    servers.load([tmp_path / "weights"])
    assert_holds(two[0].held[1], sent)
    servers.take_files()
    two[0].told.clear()
    servers.load([tmp_path / "weights"])
    path = {"update_info": {"path": str(tmp_path / "weights")}}
    assert ("update_weights", path) in two[0].told


def test_nccl_is_joined_in_the_words_of_vllms_own_backend(
    two: list[Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(weight_transfer.MADE_BY, "nccl", weight_transfer.gloo_group)
    server = Server(two[0].url, 5.0)
    server.join("nccl", CPU)
    ((name, body),) = two[0].told
    info = body["init_info"]
    assert name == "init_weight_transfer_engine" and info.keys() == FIELDS
    assert info["world_size"] == 3 and info["rank_offset"] == 1 and info["packed"]
    server.close()
    server.join("gloo", CPU)
    assert two[0].told[-1][1]["init_info"].keys() == FIELDS | {"group"}
    server.close()


def test_group_that_does_not_come_about_is_one_sentence_with_both_addresses(
    two: list[Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    two[0].failing = "init_weight_transfer_engine"
    begun = time.monotonic()
    pattern = (
        rf"vllm_weight_transfer: expected the server at {two[0].url} and the trainer at "
        r"127\.0\.0\.1:\d+ to join a group of gloo within 5 s, got .* status 500: no such "
        r"backend; let "
    )
    with pytest.raises(BrokenEngine, match=pattern):
        Server(two[0].url, 5.0).join("gloo", CPU)
    assert time.monotonic() - begun < 4  # what the server says is not waited for to the end
    # A server that says it has joined, and has not.
    monkeypatch.setattr(two[1], "join", lambda info: None)
    with pytest.raises(BrokenEngine, match=r"within 0.3 s, got nothing in that time; let the"):
        Server(two[1].url, 0.3).join("gloo", CPU)
    with pytest.raises(BrokenEngine, match="trainer at no address of this machine to join"):
        weight_transfer.join("gloo", "http://127.0.0.1:9", 1, print, CPU, 1.0)


@pytest.mark.parametrize("late", [False, True], ids=["made", "made too late"])
def test_group_that_the_server_does_not_join_is_closed(
    late: bool, two: list[Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, given_up, closed = Event(), Event(), Event()

    def make(*_: Any) -> Any:
        if late:
            assert given_up.wait(5)
        made.set()
        return SimpleNamespace(close=closed.set)

    def tell(meeting: dict[str, Any]) -> None:
        assert late or made.wait(5)
        raise BrokenEngine("no such backend")

    monkeypatch.setitem(weight_transfer.MADE_BY, "gloo", make)
    with pytest.raises(BrokenEngine, match="to join a group of gloo .* got no such backend; let"):
        weight_transfer.join("gloo", two[0].url, 2, tell, CPU, 5.0)
    assert not (late and closed.is_set())
    given_up.set()
    assert closed.wait(5)


def test_server_that_takes_no_weights_is_left_out_and_the_others_get_theirs(
    two: list[Workers],
) -> None:
    servers = Servers([server.url for server in two], 1.0)
    servers.join("gloo", CPU)
    two[0].failing = "update_weights"
    sent = weights()
    servers.load([sent])
    assert [server.base_url for server in servers.alive] == [two[1].url]
    assert_holds(two[1].held[0], sent)
    two[1].failing = "update_weights"
    with pytest.raises(BrokenEngine, match="update_weights to work, got status 500"):
        servers.load([sent])


class Stuck:
    device = CPU

    def start(self, packed: Tensor) -> Any:
        return lambda: False

    def close(self) -> None:
        pass


def test_broadcast_that_never_ends_is_given_up() -> None:
    with pytest.raises(BrokenEngine, match="expected 16 bytes .* within 0.1 s, got nothing in"):
        Transfer(Stuck(), 0.1).send({"a": torch.zeros(4)}, lambda update: time.sleep(1))


def test_vllm_without_nccl_sends_nothing_silently() -> None:
    with pytest.raises(RuntimeError, match="vLLM found no NCCL here"):
        NcclGroup(SimpleNamespace(disabled=True), CPU)


def test_trainer_is_reached_at_its_address_on_the_way_to_the_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with weight_transfer.listen(f"http://localhost:{port}") as listening:
            assert listening.getsockname()[0] == "127.0.0.1"
            assert listening.getsockname()[1] not in (0, port)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://server", ("server", 80)),
        ("https://server", ("server", 443)),
        ("https://server:8000/v1", ("server", 8000)),
    ],
)
def test_server_is_asked_at_its_schemes_port(
    url: str, expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ConnectionRefusedError):
        weight_transfer.listen(url)
    assert asked == [expected]
