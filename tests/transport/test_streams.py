"""Two processes talk: back-pressure, large frames, many streams, deaths that are noticed, peers that misbehave."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from smelt.errors import ConnectionClosed, TransportError
from smelt.transport.addresses import Address
from smelt.transport.messages import Cancel, Message, Ping, Pong, Result, TextChunk
from smelt.transport.streams import Connection, connect, listen

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

LONELY_PEER = """
import asyncio, sys
from pathlib import Path
from smelt.transport.frames import encode_frame
from smelt.transport.messages import Ping, Result
from smelt.transport.streams import connect

async def main() -> None:
    connection = await connect(Path(sys.argv[1]), "worker", "victim")
    torn = encode_frame(Result("f1", 1, bytes(2000)))[:int(sys.argv[2])]
    await connection._stream.write(encode_frame(Ping(0.0)) + torn)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def listening(address: Address) -> AsyncIterator[tuple[Address, asyncio.Queue[Connection]]]:
    """(the address, the connections that were admitted), which stay open until the block's end."""
    admitted: asyncio.Queue[Connection] = asyncio.Queue()

    async def keep(connection: Connection) -> None:
        admitted.put_nowait(connection)
        await asyncio.Event().wait()

    async with listen(address, keep) as bound:
        yield bound, admitted


@asynccontextmanager
async def both_ends(address: Address) -> AsyncIterator[tuple[Connection, Connection]]:
    """(listener's end, dialler's end) of one connection."""
    async with listening(address) as (bound, admitted), await connect(bound, "worker", "w") as dialler:
        yield await admitted.get(), dialler


async def test_messages_that_are_sent_together_arrive_one_by_one(socket_file: Path) -> None:
    async with both_ends(socket_file) as (listener, dialler):
        messages = [Cancel("a"), Result("b", 1, bytes(3000)), Cancel("c")]
        await dialler.send(*messages)
        assert [await listener.receive() for _ in messages] == messages
        with pytest.raises(TransportError, match="over the limit"):
            await dialler.send(Cancel("never"), Result("f", 1, bytes(2**26)))
        await dialler.send(Cancel("last"))
        assert await listener.receive() == Cancel("last")


@asynccontextmanager
async def lonely_peer(socket_file: Path, num_torn_bytes: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that dials in, sends a Ping and the beginning of a frame, and then nothing."""
    command = [sys.executable, "-c", LONELY_PEER, str(socket_file), str(num_torn_bytes)]
    process = await asyncio.create_subprocess_exec(*command)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def answer_pings(connection: Connection) -> None:
    async for message in connection:
        assert isinstance(message, Ping)
        await connection.send(Pong(message.sent_at))


async def let_others_run() -> None:
    """Long enough for everything that can go on without us to be done."""
    for _ in range(2000):
        await asyncio.sleep(0)


async def is_alive(connection: Connection) -> bool:
    await connection.send(Ping(1.5))
    return await connection.receive() == Pong(1.5)


@pytest.mark.parametrize("address", ["unix", "127.0.0.1:0"])
async def test_messages_go_both_ways(address: str, socket_file: Path) -> None:
    async with both_ends(socket_file if address == "unix" else address) as (listener, dialler):
        await dialler.send(Cancel("up"))
        await listener.send(Cancel("down"))
        assert await listener.receive() == Cancel("up")
        assert await dialler.receive() == Cancel("down")


async def test_both_ends_know_who_dialled_in_and_epochs_increase(socket_file: Path) -> None:
    seen = []

    async def note(connection: Connection) -> None:
        seen.append((connection.role, connection.name, connection.epoch))
        await answer_pings(connection)

    async with (
        listen(socket_file, note),
        await connect(socket_file, "worker", "a") as first,
        await connect(socket_file, "launcher", "b") as second,
    ):
        assert await is_alive(first)
        assert await is_alive(second)
        assert (first.epoch, second.epoch) == (1, 2)
    assert seen == [("worker", "a", 1), ("launcher", "b", 2)]


async def test_epochs_may_come_from_somewhere_that_lasts(socket_file: Path) -> None:
    async def open_epoch() -> int:
        await asyncio.sleep(0)
        return 41

    async with (
        listen(socket_file, answer_pings, next_epoch=open_epoch),
        await connect(socket_file, "worker", "a") as connection,
    ):
        assert connection.epoch == 41


async def test_a_frame_of_50_mb_arrives_whole(socket_file: Path) -> None:
    body = os.urandom(2**20) * 50
    async with both_ends(socket_file) as (listener, dialler):
        sending = asyncio.create_task(dialler.send(Result("f1", 1, body)))
        assert await listener.receive() == Result("f1", 1, body)
        await sending


async def test_too_large_a_message_is_refused_before_it_is_sent(socket_file: Path) -> None:
    async with both_ends(socket_file) as (listener, dialler):
        with pytest.raises(TransportError, match="over the limit"):
            await dialler.send(Result("f1", 1, bytes(2**26)))
        await dialler.send(Cancel("next"))
        assert await listener.receive() == Cancel("next")


async def test_200_streams_of_tokens_keep_their_order(socket_file: Path) -> None:
    num_streams, num_tokens = 200, 50
    received: dict[str, list[int]] = {}
    async with both_ends(socket_file) as (api, worker), asyncio.TaskGroup() as tasks:

        async def write_stream(request_id: str) -> None:
            for token in range(num_tokens):
                await worker.send(TextChunk(request_id, "x", (token,)))

        for stream in range(num_streams):
            tasks.create_task(write_stream(f"r{stream}"))
        for _ in range(num_streams * num_tokens):
            chunk = await api.receive()
            assert isinstance(chunk, TextChunk)
            received.setdefault(chunk.request_id, []).extend(chunk.token_ids)
    assert received == {f"r{stream}": list(range(num_tokens)) for stream in range(num_streams)}


async def test_senders_wait_for_a_slow_reader_and_lose_nothing(socket_file: Path) -> None:
    num_messages, body = 400, bytes(2**16)
    num_sent = 0

    async with both_ends(socket_file) as (listener, dialler), asyncio.TaskGroup() as tasks:

        async def send(number: int) -> None:
            nonlocal num_sent
            await dialler.send(Result(str(number), 1, body))
            num_sent += 1

        for number in range(num_messages):
            tasks.create_task(send(number))
        await let_others_run()
        in_flight = num_sent * len(body)
        assert 0 < in_flight < 2**21  # what the kernel and one read-ahead hold, of 25 MiB
        found = [await listener.receive() for _ in range(num_messages)]
    assert [result.future_id for result in found if isinstance(result, Result)] == list(map(str, range(num_messages)))


@pytest.mark.parametrize(
    ("num_torn_bytes", "told"), [(0, "between frames"), (3, "1 bytes before a"), (1000, "bytes before a frame's end")]
)
async def test_a_peer_that_is_killed_is_noticed_within_a_second(
    num_torn_bytes: int, told: str, socket_file: Path
) -> None:
    async with listening(socket_file) as (_, admitted), lonely_peer(socket_file, num_torn_bytes) as peer:
        connection = await admitted.get()
        assert await connection.receive() == Ping(0.0)
        peer.kill()
        start = time.monotonic()
        with pytest.raises(ConnectionClosed, match=told):
            await connection.receive()
        assert time.monotonic() - start < 1
        with pytest.raises(ConnectionClosed):
            await connection.send(Cancel("f1"))


async def test_a_peer_that_sends_garbage_is_hung_up_on_and_others_are_not(
    socket_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with listen(socket_file, answer_pings), await connect(socket_file, "worker", "good") as good:
        async with await connect(socket_file, "worker", "bad") as bad:
            await bad._stream.write(b"\x00\x00\x00\x04junk")
            with pytest.raises(ConnectionClosed):
                await bad.receive()
        assert await is_alive(good)
    assert "hung up on worker 'bad' of epoch 2: a frame of 4 bytes is no message of ours" in caplog.text


async def test_a_bug_in_a_handler_ends_its_connection_and_is_reported(socket_file: Path) -> None:
    loop, reported = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))

    async def stumble(connection: Connection) -> None:
        assert await connection.receive() == Cancel("never sent")

    async with listen(socket_file, stumble), await connect(socket_file, "worker", "w") as dialler:
        await dialler.send(Ping(0.0))
        with pytest.raises(ConnectionClosed):
            await dialler.receive()
        await let_others_run()
    loop.set_exception_handler(None)
    assert [type(error) for error in reported] == [AssertionError]


async def test_the_end_of_listening_hangs_up_and_frees_the_address(socket_file: Path) -> None:
    for _ in range(2):
        async with listen(socket_file, answer_pings):
            dialler = await connect(socket_file, "worker", "w")
            assert await is_alive(dialler)
        with pytest.raises(ConnectionClosed):
            await dialler.receive()
        await dialler.close()
    with pytest.raises(TransportError, match="cannot reach a server"):
        await connect(socket_file, "worker", "w")


async def test_a_connection_that_we_closed_says_so(socket_file: Path) -> None:
    async with both_ends(socket_file) as (_, dialler):
        await dialler.close()
        with pytest.raises(ConnectionClosed, match="the connection is closed"):
            await dialler.send(Cancel("late"))


async def test_what_was_sent_before_the_close_arrives(socket_file: Path) -> None:
    sent: list[Message] = [Result(str(number), 1, bytes(2**14)) for number in range(20)]
    async with both_ends(socket_file) as (listener, dialler):

        async def send_and_close() -> None:
            for message in sent:
                await dialler.send(message)
            await dialler.close()

        sending = asyncio.create_task(send_and_close())
        await let_others_run()
        assert [await listener.receive() for _ in sent] == sent
        await sending


@pytest.mark.parametrize("address", [Path("/tmp/smelt-nobody.sock"), "127.0.0.1:1"])
async def test_nobody_there(address: Address) -> None:
    with pytest.raises(TransportError, match="cannot reach a server at"):
        await connect(address, "worker", "w")


async def test_an_address_that_is_taken() -> None:
    async with listen("127.0.0.1:0", answer_pings) as bound:
        with pytest.raises(TransportError, match="cannot listen at"):
            async with listen(bound, answer_pings):
                pass
