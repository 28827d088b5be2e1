"""Answers whose client may leave before they are whole, and streams of events; knows no route and no API's shapes.

Whoever leaves is noticed at once, also while the request waits for its turn, and what was done for them is cancelled.
A stream sends nothing until its first event is there: until then it can still become an error with a status.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from types import TracebackType
from typing import Self, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from smelt.errors import SmeltError, TooLarge, UnsupportedEncoding

KEEP_ALIVE_SECONDS = 15.0  # of silence, after which a comment shows proxies that we are here
SEND_SECONDS = 60.0  # for a client to take what it was sent, before it counts as gone
COMMENT = b": still here\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must hand events on as they come
]

T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody is there to be answered."""


class Presence:
    """A block that is cancelled when the client leaves, and then raises ClientLeft.

    `on_silence` is called whenever the client has been silent, as clients are, for KEEP_ALIVE_SECONDS.
    """

    __slots__ = ("_has_left", "_on_silence", "_receive", "_task", "_watching")

    def __init__(self, receive: Receive, on_silence: Callable[[], Awaitable[None]] | None = None) -> None:
        self._receive = receive
        self._on_silence = on_silence
        self._has_left = False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._task = task
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.cancel()
        if self._has_left and kind is asyncio.CancelledError and self._task.uncancel() == 0:
            raise ClientLeft from None

    async def _watch(self) -> None:
        with suppress(ClientLeft):  # what is said into the silence may find nobody
            while not await self._leaves():
                pass
        self._has_left = True
        self._task.cancel()

    async def _leaves(self) -> bool:
        if self._on_silence is None:
            return bool((await self._receive())["type"] == "http.disconnect")
        try:
            async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                return bool((await self._receive())["type"] == "http.disconnect")
        except TimeoutError:
            await self._on_silence()
            return False


class NoAnswer(Response):
    """For a client that has left: nothing is sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send nothing."""


class EventStream(Response):
    """Server-sent events as they come. An error after the first of them becomes `last_words`, and ends the stream."""

    def __init__(self, events: AsyncGenerator[bytes, None], last_words: Callable[[Exception], bytes]) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._last_words = last_words
        self._has_begun = False
        self._num_sent = 0
        self._num_seen = 0  # of those sent, at the last look for silence
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, until the client leaves. What goes wrong before the first is raised."""
        self._send = send
        try:
            async with aclosing(self._events) as events, Presence(receive, self._break_silence):
                async for event in events:
                    await self._send_event(event)
        except ClientLeft:
            return
        except Exception as error:
            if not self._has_begun:
                raise
            await self._finish(self._last_words(error))
            if not isinstance(error, SmeltError):
                raise  # a bug, for the log
            return
        await self._finish(b"")

    async def _send_event(self, event: bytes) -> None:
        """Without a timeout, which would be a third of the work; `_break_silence` looks at the clock."""
        self._num_sent += 1
        self._sending_since = time.monotonic()
        await self._put(event)
        self._sending_since = None

    async def _break_silence(self) -> None:
        """ClientLeft where it has not taken an event for so long."""
        if self._sending_since is not None:
            if time.monotonic() - self._sending_since > SEND_SECONDS:
                raise ClientLeft
        elif self._num_sent == self._num_seen:
            async with _in_time():
                await self._put(COMMENT)
        self._num_seen = self._num_sent

    async def _finish(self, words: bytes) -> None:
        with suppress(ClientLeft):
            async with _in_time():
                await self._put(words, more=False)

    async def _put(self, words: bytes, more: bool = True) -> None:
        if not self._has_begun:
            self._has_begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await self._send({"type": "http.response.body", "body": words, "more_body": more})


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    """ClientLeft where the client does not take what it is sent."""
    try:
        async with asyncio.timeout(SEND_SECONDS):
            yield
    except TimeoutError:
        raise ClientLeft from None


async def json_body(request: Request, max_bytes: int) -> bytes:
    """The whole body of a request. UnsupportedEncoding where it is no JSON, TooLarge, ClientLeft."""
    check_json(request)
    return await whole_body(request.receive, max_bytes)


def check_json(request: Request) -> None:
    """UnsupportedEncoding where a body is not said to be JSON."""
    content_type = next((value for name, value in request.scope["headers"] if name == b"content-type"), b"")
    if content_type.partition(b";")[0].strip().lower() != b"application/json":
        # A page of another site can send any other type without being asked who it is.
        raise UnsupportedEncoding("send the body with the header `Content-Type: application/json`")


async def whole_body(receive: Receive, max_bytes: int) -> bytes:
    """The body of a request, whatever it is. TooLarge, ClientLeft."""
    pieces: list[bytes] = []
    num_bytes, arriving = 0, True
    while arriving:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        pieces.append(message.get("body", b""))
        arriving = message.get("more_body", False)
        num_bytes += len(pieces[-1])
        if num_bytes > max_bytes:
            raise TooLarge(f"the body has more than {max_bytes:,} bytes; ask for less at once")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
