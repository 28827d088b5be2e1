"""The API's process: how it begins, how it ends while answers are being written, and what it does beside them."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest

from processes import eventually
from serving import environment, write_tiny_model
from smelt.api import server
from smelt.cluster.claims import base_url, listening_socket
from smelt.errors import ConfigError, ConnectionClosed
from smelt.settings import load_settings, runtime_folder
from smelt.storage.database import open_database, sqlite_url
from smelt.transport.addresses import socket_path
from smelt.transport.messages import Finish, Generate, Ping, Pong, TextChunk, WorkerStatus
from smelt.transport.streams import Connection, connect

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(90)]

Process = subprocess.Popen[str]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listening_socket("127.0.0.1", 0) as opened:
        yield opened


@pytest.fixture
def start(tmp_path: Path, home: Path, listener: socket.socket) -> Iterator[Callable[[], Process]]:
    """Starts the API on the listening socket, with a model; none is left at the end."""
    model = write_tiny_model(tmp_path / "tiny")
    started: list[Process] = []

    def start_one() -> Process:
        command = [
            sys.executable,
            "-m",
            "smelt.api.server",
            "--fd",
            str(listener.fileno()),
            "--default-model",
            str(model),
        ]
        process = subprocess.Popen(
            command, env=environment(home), pass_fds=[listener.fileno()], stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


@asynccontextmanager
async def client_of(listener: socket.socket) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=base_url(listener), timeout=30) as client:
        yield client


@asynccontextmanager
async def pretended_worker(home: Path) -> AsyncIterator[tuple[Connection, asyncio.Queue[Generate]]]:
    """Somebody who has dialled in, and the requests that come; the first word of each is answered at once."""
    address = socket_path(home, runtime_folder())
    asked: asyncio.Queue[Generate] = asyncio.Queue()

    async def receive(connection: Connection) -> None:
        async for message in connection:
            if isinstance(message, Generate):
                asked.put_nowait(message)
                await connection.send(TextChunk(message.request_id, " upon", (1,)))
            elif isinstance(message, Ping):
                await connection.send(Pong(message.sent_at))

    async with await connect(address, "worker", "pretended") as connection:
        await connection.send(WorkerStatus("cpu", ("tiny",)))
        receiving = asyncio.create_task(receive(connection))
        try:
            yield connection, asked
        finally:
            receiving.cancel()
            with suppress(asyncio.CancelledError, ConnectionClosed):
                await receiving


async def ready(client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).status_code == 200


async def exit_code(process: Process) -> int:
    return await asyncio.to_thread(process.wait, 60)


def streamed(client: httpx.AsyncClient) -> object:
    body = {"model": "tiny", "prompt": "Once", "stream": True, "max_tokens": 60}
    return client.stream("POST", "/v1/completions", json=body)


async def test_connections_wait_for_it_and_sigterm_ends_it(
    start: Callable[[], Process], listener: socket.socket
) -> None:
    async with client_of(listener) as client:
        asking = asyncio.create_task(client.get("/healthz"))
        process = start()
        assert (await asking).json() == {"status": "ok"}
        process.terminate()
        assert await exit_code(process) == 0


async def test_an_answer_that_is_being_written_is_finished(
    start: Callable[[], Process], listener: socket.socket, home: Path
) -> None:
    process = start()
    async with client_of(listener) as client:
        await ready(client)
        async with pretended_worker(home) as (worker, asked), streamed(client) as answer:
            request_id = (await asked.get()).request_id
            lines = answer.aiter_lines()
            assert " upon" in await anext(lines)
            address = listener.getsockname()
            process.terminate()
            listener.close()
            await asyncio.to_thread(eventually, lambda: closed(address), "the closed door")
            await worker.send(TextChunk(request_id, " a time", (2,)))
            await worker.send(Finish(request_id, "stop", 4, 2))
            rest = "\n".join([line async for line in lines])
    assert " a time" in rest
    assert rest.rstrip().endswith("data: [DONE]")
    assert "error" not in rest
    assert await exit_code(process) == 0


def closed(address: tuple[str, int]) -> bool:
    """Whether nobody listens there any more."""
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return True
    return False


async def test_an_answer_that_may_not_finish_ends_with_an_error(
    start: Callable[[], Process], listener: socket.socket, home: Path
) -> None:
    process = start()
    async with client_of(listener) as client:
        await ready(client)
        async with pretended_worker(home) as _, streamed(client) as answer:
            lines = answer.aiter_lines()
            assert " upon" in await anext(lines)
            address = listener.getsockname()
            process.terminate()
            listener.close()
            await asyncio.to_thread(eventually, lambda: closed(address), "the closed door")
            process.terminate()
            rest = "\n".join([line async for line in lines])
    assert '"error"' in rest
    assert "[DONE]" not in rest
    assert await exit_code(process) == 0


async def test_who_only_follows_holds_nothing_up(start: Callable[[], Process], listener: socket.socket) -> None:
    process = start()
    async with client_of(listener) as client, client.stream("GET", "/v1/runs/events") as following:
        assert following.status_code == 200
        began = time.monotonic()
        process.terminate()
        assert await exit_code(process) == 0
        assert time.monotonic() - began < 10


def torn(database: Path) -> bytes:
    """A database of today's schema that has lost its last page."""
    open_database(sqlite_url(database)).dispose()
    whole = database.read_bytes()
    assert len(whole) > 40_000
    return whole[:-4096]


@pytest.mark.parametrize("damage", [lambda _: b"this is no database" * 1000, torn])
def test_a_damaged_database_is_one_clear_line(
    start: Callable[[], Process], home: Path, damage: Callable[[Path], bytes]
) -> None:
    home.mkdir()
    (home / "smelt.db").write_bytes(damage(home / "smelt.db"))
    process = start()
    assert process.wait(60) == 2
    assert process.stderr is not None
    said = process.stderr.read()
    assert said.startswith("error: ")
    assert "smelt.db" in said
    assert said.count("\n") == 1


async def test_a_chore_that_fails_is_done_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SETTLING_SECONDS", 0.0)
    times: list[float] = []
    enough = asyncio.Event()

    async def chore() -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            raise OSError("the disk is asleep")
        if len(times) == 3:
            enough.set()

    async with server.during(server.repeat("wake the disk", chore, 0.05)):
        await enough.wait()
    assert all(later - earlier >= 0.05 for earlier, later in zip(times, times[1:], strict=False))


def test_workers_of_other_machines_need_tls(home: Path) -> None:
    home.mkdir()
    assert [door[1:] for door in server.ways_in(load_settings())] == [(None, None)]
    with pytest.raises(ConfigError, match="give --tls-certificate and --tls-key"):
        list(server.ways_in(load_settings(worker_address="0.0.0.0:8001")))
