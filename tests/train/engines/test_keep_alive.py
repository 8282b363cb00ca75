"""Connections ask a silent host whether it is still there, with the options that the system has."""

import socket

import pytest

from agro_train.engines import keep_alive
from agro_train.engines.keep_alive import urlopen
from tests.train.engines.servers import Answers, StandIn


class Greeting(Answers):
    def do_GET(self) -> None:
        self.answer({"hello": 1})


def option(way: socket.socket, name: str) -> int:
    level = socket.SOL_SOCKET if name == "SO_KEEPALIVE" else socket.IPPROTO_TCP
    return way.getsockopt(level, getattr(socket, name))


def test_vanished_host_is_noticed_within_two_minutes() -> None:
    with StandIn(Greeting) as server, urlopen(server.url, timeout=5.0) as response:
        way = response.fp.raw._sock
        assert option(way, "SO_KEEPALIVE")
        found = {name: option(way, name) for name in keep_alive.PROBES if hasattr(socket, name)}
        assert response.read() == b'{"hello": 1}'
    assert found == {name: keep_alive.PROBES[name] for name in found}
    idle, interval, count, unanswered = keep_alive.PROBES.values()
    assert idle + interval * count == unanswered / 1000 == 120


def test_options_that_a_system_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in keep_alive.PROBES:
        monkeypatch.delattr(socket, name, raising=False)
    with socket.socket() as way:
        keep_alive.probe(way)
        assert option(way, "SO_KEEPALIVE")


def test_encrypted_connections_are_probed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encryption alone is left out: the stand-in has none."""
    probed: list[socket.socket] = []
    monkeypatch.setattr(keep_alive, "probe", probed.append)
    monkeypatch.setattr("ssl.SSLContext.wrap_socket", lambda self, way, **_: way)
    with StandIn(Greeting) as server:
        address = server.url.replace("http:", "https:")
        assert urlopen(address, timeout=5.0).read() == b'{"hello": 1}'
    assert len(probed) == 1
