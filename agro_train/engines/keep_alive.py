"""Requests over connections that notice it when the host at their other end has vanished.

A process that ends closes its connections. A host that loses its power or its network does not: who
waits for an answer would wait to the end of his time limit.
"""

import http.client
import socket
import urllib.request
from functools import cache
from typing import Any

# Seconds of silence after which the system asks the host whether it is there, seconds from one such
# question to the next, and how many go unanswered before the connection is given up. A host that
# computes for hours answers them. While something sent has not arrived nothing is asked; then the
# last number holds, in milliseconds.
PROBES = {
    "TCP_KEEPIDLE": 60,
    "TCP_KEEPINTVL": 15,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 120_000,
}


def urlopen(request: urllib.request.Request | str, timeout: float) -> Any:
    """As urllib's own: the same proxies, the same errors. A vanished host is an OSError."""
    return _opener().open(request, timeout=timeout)


def probe(connection: socket.socket) -> None:
    """Has the system ask a silent host."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # elsewhere the system's own numbers hold
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Plain(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        probe(self.sock)


class _Encrypted(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        probe(self.sock)


class _PlainHandler(urllib.request.HTTPHandler):
    def do_open(self, http_class: Any, req: Any, **given: Any) -> Any:
        del http_class
        return super().do_open(_Plain, req, **given)


class _EncryptedHandler(urllib.request.HTTPSHandler):
    def do_open(self, http_class: Any, req: Any, **given: Any) -> Any:
        del http_class
        return super().do_open(_Encrypted, req, **given)


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_PlainHandler, _EncryptedHandler)
