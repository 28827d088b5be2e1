"""Dialling in and, when the connection ends, dialling again: for workers and launchers; knows nothing of their work."""

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable

from smelt.errors import TransportError
from smelt.transport.addresses import Address
from smelt.transport.handshake import Role
from smelt.transport.streams import Connection, connect

FIRST_PAUSE_SECONDS = 0.05  # between two tries; doubled each time

log = logging.getLogger(__name__)


async def serve_for_ever(
    address: Address,
    role: Role,
    serve: Callable[[Connection], Awaitable[None]],
    *,
    longest_pause_s: float,
    key: bytes | None = None,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Dial in, and `serve` one connection after the other. ConfigError: the address needs TLS and a key."""
    name = f"{socket.gethostname()}:{os.getpid()}"
    pause, last_reason = FIRST_PAUSE_SECONDS, ""
    while True:
        try:
            async with await connect(address, role, name, key=key, tls=tls) as connection:
                log.info("connected to %s, as %s", address, name)
                pause, last_reason = FIRST_PAUSE_SECONDS, ""
                await serve(connection)
        except* TransportError as ends:
            reason = str(ends.exceptions[0])
            if reason != last_reason:
                log.warning("%s; dialling again", reason)
            last_reason = reason
        await asyncio.sleep(pause)
        pause = min(2 * pause, longest_pause_s)
