"""Workers that dial in over a real socket and do as a test says, and what is asked of them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from smelt.control import links
from smelt.control.workers import Workers
from smelt.storage.futures import Ledger
from smelt.transport.handshake import Role
from smelt.transport.messages import (
    Finish,
    Generate,
    Message,
    Ping,
    TextChunk,
    WorkerStatus,
)
from smelt.transport.streams import Connection, connect
from spine import until

M = TypeVar("M", bound=Message)


Pieces = list[TextChunk | Finish]


@pytest.fixture
def workers(ledger: Ledger) -> Workers:
    return Workers(ledger, patience_s=0.3)


@pytest.fixture(autouse=True)
def waits_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "RETRY_SECONDS", 0.02)


@asynccontextmanager
async def peer(
    workers: Workers, address: Path, name: str = "w", role: Role = "worker", models: tuple[str, ...] = ()
) -> AsyncIterator[Connection]:
    """One that has dialled in, and is known with its models."""
    async with await connect(address, role, name) as connection:
        await connection.send(WorkerStatus("cpu", models))
        if role == "worker":
            await until(lambda: (name, models) in [(known.name, known.models) for known in workers.workers])
        yield connection


async def hear(connection: Connection, kind: type[M]) -> M:
    """The next message of that kind, past pings."""
    while not isinstance(message := await asyncio.wait_for(connection.receive(), 5), kind):
        assert isinstance(message, Ping), message
    return message


def ask(name: str = "r", model: str = "gpt") -> Generate:
    return Generate(name, "ann", model, "To be")


async def collect(answer: AsyncGenerator[TextChunk | Finish, None]) -> Pieces:
    return [piece async for piece in answer]


def text_of(pieces: Pieces) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, TextChunk))


async def gone(workers: Workers) -> None:
    await until(lambda: not workers.workers)
