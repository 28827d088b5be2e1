"""HTTP/1.1 as uvicorn speaks it, with a bound on what comes before a body: its bytes and its time; knows no request.

Without it one client could fill the memory with a header that never ends, or hold a connection by sending nothing.
The gate sees a request only when its head is whole.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2**16
HEAD_SECONDS = 20.0

TOO_LARGE = b"431 Request Header Fields Too Large"
TOO_SLOW = b"408 Request Timeout"


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Between two requests, or two pieces of a body, lie so many bytes at most."""

    num_bytes_between = 0
    expects_head = True
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody has connected, and should say why."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of one request, or of several."""
        self.num_bytes_between += len(data)
        super().data_received(data)
        if self.num_bytes_between > MAX_HEAD_BYTES:
            self._refuse(TOO_LARGE)
        elif self.expects_head and self.timer is None:
            self._start_timer()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self.expects_head = True

    def on_headers_complete(self) -> None:
        """The head is whole, and the request can be answered."""
        self.expects_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self.num_bytes_between = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The last byte of a request."""
        self.num_bytes_between = 0
        super().on_message_complete()

    def _start_timer(self) -> None:
        self.timer = self.loop.call_later(HEAD_SECONDS, self._refuse, TOO_SLOW)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _refuse(self, status: bytes) -> None:
        """Say so, unless somebody else is being answered on this connection, and hang up."""
        if self.transport.is_closing():
            return
        if self.expects_head and (self.cycle is None or self.cycle.response_complete):
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()
