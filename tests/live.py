"""A real HTTP server on a port of this machine, in a thread: for browsers and streams that no test client can be."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from smelt.control.keys import Caller


def with_caller(app: ASGIApp, caller: Caller) -> ASGIApp:
    """The application as the gate would call it for somebody."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["caller"] = caller
        await app(scope, receive, send)

    return call


class Server(uvicorn.Server):
    """uvicorn's server, which says when it can be reached."""

    def __init__(self, app: ASGIApp, **options: Any) -> None:
        # Whoever follows something when the test is over need not be waited for.
        options = {"log_level": "critical", "lifespan": "off", "timeout_graceful_shutdown": 0, **options}
        super().__init__(uvicorn.Config(app, host="127.0.0.1", port=0, **options))
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}"


@contextmanager
def serving(app: ASGIApp, **options: Any) -> Iterator[str]:
    """The address of the application while the block runs. Options are uvicorn's."""
    server = Server(app, **options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert server.is_up.wait(30)
    yield server.url
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
