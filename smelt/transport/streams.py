"""Connections between processes: `listen`, `connect`, and messages both ways; knows no meaning of any message.

The end of the stream is the notice of the peer's death. Nothing is kept for a peer that is gone, so whoever needs an
answer asks again on the next connection, which has a higher epoch. Senders wait while the peer does not read.
"""

import asyncio
import itertools
import logging
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Self

from smelt.errors import ConnectionClosed, SmeltError, TransportError
from smelt.transport.addresses import Address, check_exposure, host_and_port
from smelt.transport.frames import MAX_FRAME_BYTES, FrameStream, decode_message, encode_frame
from smelt.transport.handshake import HANDSHAKE_SECONDS, Identity, NextEpoch, Role, admit, check_key, introduce
from smelt.transport.messages import Message

READ_AHEAD_BYTES = 2**18  # taken from the kernel before anybody receives; then the sender has to wait

log = logging.getLogger(__name__)

Handler = Callable[["Connection"], Awaitable[None]]
Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]


class Connection:
    """Messages to and from one peer.

    role, name, epoch: who dialled in, and the number of this connection at the listener; the same at both ends.
    """

    def __init__(self, stream: FrameStream, identity: Identity) -> None:
        self._stream = stream
        self.role = identity.role
        self.name = identity.name
        self.epoch = identity.epoch

    async def send(self, *messages: Message) -> None:
        """Returns when the peer has room for more, which is no promise that it has read them.

        ConnectionClosed: the peer is gone, and the messages with it. TransportError: one is too large for a frame;
        nothing was sent.
        """
        frames = [encode_frame(message) for message in messages]
        await self._stream.write(frames[0] if len(frames) == 1 else b"".join(frames))

    async def receive(self) -> Message:
        """The next message. ConnectionClosed: there will be none. TransportError: no message of ours; close it."""
        return decode_message(await self._stream.read(MAX_FRAME_BYTES))

    async def __aiter__(self) -> AsyncIterator[Message]:
        """Messages until `receive` raises: a death is never mistaken for an orderly end."""
        while True:
            yield await self.receive()

    async def close(self) -> None:
        """Hang up; what was sent before gets a moment to leave."""
        await self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


@asynccontextmanager
async def listen(
    address: Address,
    handler: Handler,
    *,
    key: bytes | None = None,
    tls: ssl.SSLContext | None = None,
    next_epoch: NextEpoch | None = None,
) -> AsyncIterator[Address]:
    """While the block runs, `handler` runs for every peer that dials in and is admitted; its end hangs up.

    Gives the address, with the port that was chosen for port 0. `next_epoch` gives each admitted connection a number
    above all before it; a ledger's outlast this process, and without one they count from 1. A handler may let the
    errors of `receive` pass. At the block's end handlers are cancelled and waited for.

    ConfigError: other machines reach this address, and TLS or the key is missing. TransportError: it is taken.
    """
    check_exposure(address, key, tls)
    check_key(key)
    next_epoch = next_epoch or _count_from_1()
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_serve(_frame_stream(reader, writer), handler, key, next_epoch))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await _start_server(accept, address, tls)
    try:
        yield _bound_address(server, address)
    finally:
        server.close()
        await _cancel(tasks)
        await server.wait_closed()


async def connect(
    address: Address, role: Role, name: str, *, key: bytes | None = None, tls: ssl.SSLContext | None = None
) -> Connection:
    """Dial in. `name` is shown to people.

    ConfigError: the address is not of this machine, and TLS or the key is missing. TransportError: nobody answers,
    the listener refuses us, or it is not the one that knows the key.
    """
    check_exposure(address, key, tls)
    check_key(key)
    stream = await _dial(address, tls)
    async with AsyncExitStack() as undo:
        undo.push_async_callback(stream.close)
        identity = await introduce(stream, role, name, key)
        undo.pop_all()
    return Connection(stream, identity)


def _count_from_1() -> NextEpoch:
    epochs = itertools.count(1)

    async def next_epoch() -> int:
        return next(epochs)

    return next_epoch


async def _serve(stream: FrameStream, handler: Handler, key: bytes | None, next_epoch: NextEpoch) -> None:
    peer = "a stranger"
    try:
        identity = await admit(stream, key, next_epoch)
        peer = f"{identity.role} {identity.name!r} of epoch {identity.epoch}"
        log.info("%s has dialled in", peer)
        await handler(Connection(stream, identity))
    except ConnectionClosed as end:
        log.info("%s: %s", peer, end)
    except SmeltError as fault:
        log.warning("hung up on %s: %s", peer, fault)
    finally:
        await stream.close()


async def _start_server(accept: Accept, address: Address, tls: ssl.SSLContext | None) -> asyncio.Server:
    try:
        if isinstance(address, Path):
            return await asyncio.start_unix_server(accept, address, limit=READ_AHEAD_BYTES)
        host, port = host_and_port(address)
        patience = HANDSHAKE_SECONDS if tls else None
        return await asyncio.start_server(
            accept, host, port, limit=READ_AHEAD_BYTES, ssl=tls, ssl_handshake_timeout=patience
        )
    except OSError as error:
        raise TransportError(f"cannot listen at {address}: {error}") from error


async def _dial(address: Address, tls: ssl.SSLContext | None) -> FrameStream:
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            if isinstance(address, Path):
                return _frame_stream(*await asyncio.open_unix_connection(address, limit=READ_AHEAD_BYTES))
            host, port = host_and_port(address)
            return _frame_stream(*await asyncio.open_connection(host, port, limit=READ_AHEAD_BYTES, ssl=tls))
    except OSError as error:
        reason = str(error) or f"no answer within {HANDSHAKE_SECONDS:g} s"
        raise TransportError(f"cannot reach a server at {address}: {reason}") from error


def _frame_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> FrameStream:
    """A machine that loses its power sends no end of file: ask the kernel to find out within half a minute."""
    tcp = writer.get_extra_info("socket")
    if tcp.family != socket.AF_UNIX:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    return FrameStream(reader, writer)


def _bound_address(server: asyncio.Server, address: Address) -> Address:
    if isinstance(address, Path):
        return address
    host, _, _ = address.rpartition(":")
    return f"{host}:{server.sockets[0].getsockname()[1]}"


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
