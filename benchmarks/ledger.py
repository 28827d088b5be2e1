"""What it costs to promise a request: accepted requests per second, and one alone against one fsync.

python benchmarks/ledger.py [--seconds 5] [--url postgresql://...]. The database lies in a temporary folder of the
working directory's disk. Rounds of the bare fsync go before, between and after the others: disks are moody.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

from machine import describe_machine, write_result

from smelt.storage.database import open_database, sqlite_url
from smelt.storage.files import Files
from smelt.storage.futures import Ledger
from smelt.storage.transitions import Submission
from smelt.storage.writer import Writer

NUM_FSYNCS = 200
NUM_CALLERS = 64
BODY = b"x" * 1024  # bytes: a small training request


def fsync_times(folder: Path) -> list[float]:
    """Seconds of a 4 KiB append with fdatasync, which is what a commit to SQLite's log costs at least."""
    times = []
    with (folder / "fsync").open("wb", buffering=0) as file:
        for _ in range(NUM_FSYNCS):
            start = time.perf_counter()
            file.write(b"x" * 4096)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - start)
    return times


async def ask(ledger: Ledger, lane: str, until: float) -> list[float]:
    """One caller: its requests one after the other; seconds that each took."""
    times = []
    while (start := time.perf_counter()) < until:
        seq = len(times) + 1
        await ledger.accept(Submission("ann", "step", f"{seq}", BODY, lane=lane, seq=seq))
        times.append(time.perf_counter() - start)
    return times


async def crowd(ledger: Ledger, name: str, num_callers: int, seconds: float) -> list[float]:
    """Callers side by side, each in a lane of its own."""
    until = time.perf_counter() + seconds
    asked = await asyncio.gather(*[ask(ledger, f"{name} {caller}", until) for caller in range(num_callers)])
    return [taken for times in asked for taken in times]


class Worker:
    """Is granted everything and answers at once, and tells the callers, who go on to their next request."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.answered: dict[str, asyncio.Event] = {}

    async def work(self) -> None:
        """For ever."""
        epoch = await self.ledger.open_epoch()
        while True:
            granted = await self.ledger.next_grants(epoch, NUM_CALLERS, ("whole",))
            await asyncio.gather(*[self.finish(row.id, epoch) for row in granted])

    async def finish(self, future_id: str, epoch: int) -> None:
        """Keep a result."""
        await self.ledger.finish(future_id, epoch, BODY)
        self.answered.setdefault(future_id, asyncio.Event()).set()

    async def ask(self, lane: str, until: float) -> list[float]:
        """One caller, who waits for each result; seconds that each took."""
        times = []
        while (start := time.perf_counter()) < until:
            seq = len(times) + 1
            accepted = await self.ledger.accept(Submission("ann", "whole", f"{seq}", BODY, lane=lane, seq=seq))
            await self.answered.setdefault(accepted, asyncio.Event()).wait()
            del self.answered[accepted]
            times.append(time.perf_counter() - start)
        return times


async def whole_way(ledger: Ledger, seconds: float) -> list[float]:
    """Callers side by side, from the request to its result; seconds that each took."""
    worker = Worker(ledger)
    working = asyncio.create_task(worker.work())
    until = time.perf_counter() + seconds
    asked = await asyncio.gather(*[worker.ask(f"whole {caller}", until) for caller in range(NUM_CALLERS)])
    working.cancel()
    return [taken for times in asked for taken in times]


def row(name: str, times: list[float], seconds: float | None = None) -> str:
    """A line of the table; times in ms."""
    rate = f"{len(times) / seconds:,.0f}" if seconds else "-"
    p99 = statistics.quantiles(times, n=100)[98]
    return f"| {name} | {rate} | {1e3 * statistics.median(times):.2f} | {1e3 * p99:.2f} |"


def measure(url: str | None, seconds: float) -> list[str]:
    """The table's lines."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        engine = open_database(url or sqlite_url(folder / "smelt.db"))
        writer = Writer(engine)
        ledger = Ledger(engine, writer, Files(folder / "bodies"))
        lines = [row("bare fdatasync, before", fsync_times(folder))]
        lines.append(row("accept, 1 caller", asyncio.run(crowd(ledger, "alone", 1, seconds)), seconds))
        lines.append(row("bare fdatasync, between", fsync_times(folder)))
        cpu_start = time.process_time()
        many = asyncio.run(crowd(ledger, "crowd", NUM_CALLERS, seconds))
        cpu_us = 1e6 * (time.process_time() - cpu_start) / len(many)
        lines.append(row(f"accept, {NUM_CALLERS} callers ({cpu_us:.0f} µs of CPU each)", many, seconds))
        cpu_start = time.process_time()
        whole = asyncio.run(whole_way(ledger, seconds))
        cpu_us = 1e6 * (time.process_time() - cpu_start) / len(whole)
        name = f"accept, grant, finish, {NUM_CALLERS} callers ({cpu_us:.0f} µs of CPU each)"
        lines.append(row(name, whole, seconds))
        lines.append(row("bare fdatasync, after", fsync_times(folder)))
        writer.close()
        engine.dispose()
    return lines


def main() -> None:
    """Measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each round")
    parser.add_argument("--url", help="a PostgreSQL database to be written to, instead of SQLite")
    arguments = parser.parse_args()
    table = ["| | per second | p50 ms | p99 ms |", "|---|---|---|---|", *measure(arguments.url, arguments.seconds)]
    load = f"- load average at the end: {os.getloadavg()[0]:.1f}; niceness {os.nice(0)}"
    name = "ledger-postgresql" if arguments.url else "ledger"
    write_result(name, "The ledger", table, [*describe_machine(["sqlalchemy"]), load])


if __name__ == "__main__":
    main()
