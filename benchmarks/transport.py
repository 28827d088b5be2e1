"""What the stream between a worker and the API carries: token by token over 200 streams, as fast as it goes, 50 MB.

The two ends are processes of their own, as in a server. Tokens leave on a fixed schedule (open loop), and their delay
counts from the moment they were due.

    python benchmarks/transport.py --seconds 5
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from machine import describe_machine, write_result

from smelt.transport.messages import Grant, Ping, Pong, Result, TextChunk
from smelt.transport.streams import Connection, connect, listen

NUM_STREAMS = 200
TOKENS_PER_SECOND = 10_000
NUM_AT_FULL_SPEED = 50_000
LARGE_BYTES = 50 * 10**6
NUM_LARGE = 5


def main() -> None:
    """Measure and report; with --worker, be the other end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the paced part")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        asyncio.run(work(arguments.worker, arguments.seconds))
    else:
        table = asyncio.run(measure(arguments.seconds))
        write_result(
            "transport", "The stream between worker and API (unix socket)", table, describe_machine(["msgspec"])
        )


async def work(socket_file: Path, seconds: float) -> None:
    """The worker's end: paced tokens, tokens as fast as they go, then large bodies sent back."""
    async with await connect(socket_file, "worker", "benchmark") as connection:
        used_before = time.process_time()
        async with asyncio.TaskGroup() as tasks:
            start = time.monotonic() + 0.2
            for stream in range(NUM_STREAMS):
                tasks.create_task(write_paced(connection, stream, start, seconds))
        await connection.send(Ping(time.process_time() - used_before))  # the only message with one number
        for number in range(NUM_AT_FULL_SPEED):
            await connection.send(TextChunk("r", " word", (number,)))
        await connection.send(Pong(0.0))
        for _ in range(NUM_LARGE):
            grant = await connection.receive()
            assert isinstance(grant, Grant)
            await connection.send(Result(grant.future_id, grant.epoch, grant.body))


async def write_paced(connection: Connection, stream: int, start: float, seconds: float) -> None:
    """One stream: a token per interval, each with the time at which it was due; streams begin one after the other."""
    interval = NUM_STREAMS / TOKENS_PER_SECOND
    for number in range(int(seconds / interval)):
        due = start + interval * (number + stream / NUM_STREAMS)
        await asyncio.sleep(due - time.monotonic())
        await connection.send(TextChunk(str(stream), f"{due:.6f}", (number,)))


async def measure(seconds: float) -> list[str]:
    """The API's end; rows of the report."""
    async with worker_connection(seconds) as connection:
        rows = await measure_paced(connection, seconds)
        rows += await measure_full_speed(connection)
        rows += await measure_large(connection)
    return ["| what | figure |", "|---|---|", *rows]


@asynccontextmanager
async def worker_connection(seconds: float) -> AsyncIterator[Connection]:
    """The connection of a worker that is started for it."""
    admitted: asyncio.Queue[Connection] = asyncio.Queue()

    async def keep(connection: Connection) -> None:
        admitted.put_nowait(connection)
        await asyncio.Event().wait()

    with tempfile.TemporaryDirectory(prefix="smelt-", dir="/tmp") as folder:
        socket_file = Path(folder) / "s"
        async with listen(socket_file, keep):
            command = [sys.executable, __file__, "--worker", str(socket_file), "--seconds", str(seconds)]
            worker = await asyncio.create_subprocess_exec(*command)
            yield await admitted.get()
            await worker.wait()


async def measure_paced(connection: Connection, seconds: float) -> list[str]:
    """Tokens on schedule until the worker reports its processor time."""
    delays = []
    used_before, begin = time.process_time(), time.monotonic()
    while isinstance(message := await connection.receive(), TextChunk):
        delays.append(time.monotonic() - float(message.text))
    assert isinstance(message, Ping)
    elapsed = time.monotonic() - begin
    delays.sort()
    p50, p99, worst = (1000 * delays[int(len(delays) * part)] for part in (0.5, 0.99, 0.99999))
    return [
        f"| tokens due over {NUM_STREAMS} streams, one frame each | {TOKENS_PER_SECOND:,}/s for {seconds:g} s |",
        f"| arrived | {len(delays):,} of {int(TOKENS_PER_SECOND * seconds):,} in {elapsed:.2f} s |",
        f"| delay from due to received | p50 {p50:.2f} ms, p99 {p99:.2f} ms, worst {worst:.2f} ms |",
        f"| processor time, receiving end | {(time.process_time() - used_before) / seconds:.0%} of a core |",
        f"| processor time, sending end and its timers | {message.sent_at / seconds:.0%} of a core |",
    ]


async def measure_full_speed(connection: Connection) -> list[str]:
    """Tokens as fast as both ends can."""
    begin, num_tokens = time.monotonic(), 0
    while isinstance(await connection.receive(), TextChunk):
        num_tokens += 1
    return [f"| tokens at full speed, one frame each | {num_tokens / (time.monotonic() - begin):,.0f}/s |"]


async def measure_large(connection: Connection) -> list[str]:
    """A large body to the worker and back, a few times."""
    body, times = bytes(LARGE_BYTES), []
    for number in range(NUM_LARGE):
        begin = time.monotonic()
        await connection.send(Grant(str(number), connection.epoch, "benchmark", None, None, "echo", body=body))
        assert await connection.receive() == Result(str(number), connection.epoch, body)
        times.append(time.monotonic() - begin)
    fastest = min(times)
    return [
        f"| {LARGE_BYTES / 1e6:.0f} MB there and back | median {sorted(times)[NUM_LARGE // 2]:.2f} s, "
        f"fastest {fastest:.2f} s ({2 * LARGE_BYTES / fastest / 1e6:,.0f} MB/s) |"
    ]


if __name__ == "__main__":
    main()
