"""Clients that leave and streams that break, message by message."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.requests import Request
from starlette.types import Message

from smelt.api import streaming
from smelt.api.streaming import COMMENT, ClientLeft, EventStream, Presence, json_body
from smelt.errors import TooLarge, UnsupportedEncoding, WorkerLost
from spine import until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

LEFT: Message = {"type": "http.disconnect"}


class Client:
    """What an ASGI server gives an application."""

    def __init__(self, *messages: Message) -> None:
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        for message in messages:
            self.incoming.put_nowait(message)
        self.sent: list[Message] = []
        self.takes = asyncio.Event()
        self.takes.set()

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        await self.takes.wait()

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message["type"] == "http.response.body"]

    async def read(self, events: AsyncGenerator[bytes, None]) -> None:
        await EventStream(events, lambda error: f"last: {error}".encode())({}, self.incoming.get, self.send)


async def events(*texts: bytes, end: Exception | None = None, pause: float = 0) -> AsyncGenerator[bytes, None]:
    for text in texts:
        await asyncio.sleep(pause)
        yield text
    if end is not None:
        raise end


async def waiting(closed: asyncio.Event) -> AsyncGenerator[bytes, None]:
    try:
        yield b"one"
        await asyncio.Event().wait()
    finally:
        closed.set()


async def wait_for_ever(client: Client) -> None:
    async with Presence(client.incoming.get):
        await asyncio.Event().wait()


async def test_who_leaves_ends_the_block_and_no_other() -> None:
    client = Client(LEFT)
    with pytest.raises(ClientLeft):
        await wait_for_ever(client)
    await asyncio.sleep(0)  # would raise, were the cancellation still about
    async with Presence(client.incoming.get):
        pass
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_cancellation_from_outside_stays_one() -> None:
    task = asyncio.create_task(wait_for_ever(Client()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_blocks_own_error_is_raised() -> None:
    with pytest.raises(WorkerLost):
        async with Presence(Client().incoming.get):
            raise WorkerLost("gone")


async def test_events_are_sent_as_they_come() -> None:
    client = Client()
    await client.read(events(b"one", b"two"))
    assert client.bodies == [b"one", b"two", b""]
    assert [message.get("more_body") for message in client.sent] == [None, True, True, False]
    assert (client.sent[0]["status"], dict(client.sent[0]["headers"])[b"cache-control"]) == (200, b"no-cache")


async def test_an_error_before_the_first_event_is_raised_and_a_later_one_told() -> None:
    client = Client()
    with pytest.raises(WorkerLost):
        await client.read(events(end=WorkerLost("gone")))
    assert client.sent == []
    await client.read(events(b"one", end=WorkerLost("gone")))
    assert client.bodies == [b"one", b"last: gone"]
    bug = Client()
    with pytest.raises(ZeroDivisionError):
        await bug.read(events(b"one", end=ZeroDivisionError("bug")))
    assert bug.bodies == [b"one", b"last: bug"]


async def test_who_leaves_a_stream_closes_what_feeds_it() -> None:
    client, closed = Client(), asyncio.Event()
    reading = asyncio.create_task(client.read(waiting(closed)))
    await until(lambda: bool(client.bodies))
    client.incoming.put_nowait(LEFT)
    await asyncio.wait_for(reading, 5)
    assert closed.is_set()
    assert client.bodies == [b"one"]


async def test_only_silence_is_broken_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.1)
    silent, busy = Client(), Client()
    await asyncio.gather(silent.read(events(b"one", pause=0.5)), busy.read(events(*[b"x"] * 10, pause=0.05)))
    assert silent.bodies.count(COMMENT) >= 2
    assert silent.bodies[-2:] == [b"one", b""]
    assert busy.bodies.count(COMMENT) <= 1


@pytest.mark.parametrize("has_events", [True, False])
async def test_a_client_that_takes_nothing_counts_as_gone(monkeypatch: pytest.MonkeyPatch, has_events: bool) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.02)
    monkeypatch.setattr(streaming, "SEND_SECONDS", 0.05)
    client, closed = Client(), asyncio.Event()
    client.takes.clear()
    stream = waiting(closed) if has_events else events(b"never", pause=60)
    await asyncio.wait_for(client.read(stream), 5)
    assert closed.is_set() == has_events


async def test_a_body_is_gathered_up_to_its_limit() -> None:
    def of(*pieces: bytes) -> Client:
        last = len(pieces) - 1
        return Client(*[{"type": "http.request", "body": p, "more_body": n < last} for n, p in enumerate(pieces)])

    async def read(client: Client, kind: bytes = b"application/json") -> bytes:
        return await json_body(Request({"type": "http", "headers": [(b"content-type", kind)]}, client.incoming.get), 2)

    assert await read(of(b"{", b"}"), b"application/json; charset=utf-8") == b"{}"
    assert await read(of(b""), b"Application/JSON") == b""
    with pytest.raises(TooLarge):
        await read(of(b"{ ", b"}"))
    with pytest.raises(ClientLeft):
        await read(Client(LEFT))
    for kind in (b"", b"text/plain", b"application/x-www-form-urlencoded", b"application/jsonp"):
        with pytest.raises(UnsupportedEncoding):
            await read(of(b"{}"), kind)
