"""The launcher: dials in, and does the runs it is granted, each in a process of its own; knows no torch and no step.

    python -m smelt.cluster.launcher --connect SOCKET

A forkserver has imported torch beforehand, so that a run begins at once. When the connection ends, so does the run,
with a checkpoint: the ledger grants it again, and it goes on to the same bits.
"""

import argparse
import asyncio
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from smelt.cluster import trainer
from smelt.cluster.dialling import serve_for_ever
from smelt.configs import RUN_LOG
from smelt.errors import SmeltError, TrainingError, TransportError
from smelt.settings import load_settings
from smelt.transport.failures import failure_of
from smelt.transport.messages import Cancel, Grant, Ping, Pong, Result, TrainRequest, WorkerStatus
from smelt.transport.streams import Connection

STOP_SECONDS = 10.0  # for a run's last step and its checkpoint
LONGEST_PAUSE_SECONDS = 0.2  # between two tries to dial: the server is on this machine
NICENESS = 5  # of runs, where they share the cores with answers that somebody waits for
WARM_UP_SECONDS = 5.0  # after the start, when the worker wants the cores: somebody waits for it
REST_SECONDS = 1.0  # before a run that died is continued
MAX_DEATHS = 3  # of a run's process, one after the other, without a new checkpoint

log = logging.getLogger(__name__)


class TrainerProcess:
    """One life of the process that trains."""

    def __init__(self, grant: Grant) -> None:
        context = multiprocessing.get_context("forkserver")
        self._answer, self._given = context.Pipe(duplex=False)
        self._process = context.Process(target=trainer.main, args=(grant, self._given), name="trainer")
        self._ended = asyncio.Event()

    async def start(self) -> None:
        """Returns when it is forked, for which torch must be ready; OSError or EOFError: the forkserver is gone."""
        await asyncio.to_thread(self._process.start)
        self._given.close()
        asyncio.get_running_loop().add_reader(self._process.sentinel, self._note_end)

    async def result(self) -> Result | None:
        """What it had to say, once it has ended; None where it died without a word."""
        await self._ended.wait()
        with suppress(EOFError):
            if self._answer.poll():
                return msgspec.msgpack.decode(self._answer.recv_bytes(), type=Result)
        return None

    async def stop(self) -> None:
        """Have it save and end, and kill it where that takes too long."""
        self.interrupt()
        await self._ended.wait()

    def interrupt(self) -> None:
        """Ask it to save and end, without waiting."""
        if not self._ended.is_set():
            self._signal(signal.SIGINT)
            asyncio.get_running_loop().call_later(STOP_SECONDS, self._signal, signal.SIGKILL)

    @property
    def exit_code(self) -> int | None:
        """As subprocess has it: below zero is a signal."""
        return self._process.exitcode

    def _signal(self, number: signal.Signals) -> None:
        pid = self._process.pid
        if pid is not None and not self._ended.is_set():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._process.join()
        self._ended.set()


class Launcher:
    """Does what is granted over one connection, one run at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._grants: asyncio.Queue[Grant] = asyncio.Queue()
        self._cancelled: set[str] = set()
        self._running: dict[str, TrainerProcess] = {}

    async def serve(self) -> None:
        """Until the connection ends or this is cancelled: then the run is stopped, and nobody is told what it said."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._receive())
            both.create_task(self._work())

    async def _receive(self) -> None:
        async for message in self._connection:
            match message:
                case Grant():
                    self._grants.put_nowait(message)
                case Cancel():
                    self._cancelled.add(message.request_id)
                    if process := self._running.get(message.request_id):
                        process.interrupt()
                case Ping():
                    await self._connection.send(Pong(message.sent_at))
                case _:
                    raise TransportError(f"the server sends a launcher no {type(message).__name__}")

    async def _work(self) -> None:
        device = load_settings().device
        while True:
            await self._connection.send(WorkerStatus(device, num_running=0))
            grant = await self._grants.get()
            await self._connection.send(WorkerStatus(device, num_running=1))
            await self._connection.send(await self._done(grant))

    async def _done(self, grant: Grant) -> Result:
        """What came of a grant. A run whose process dies goes on in another, as long as it gets further."""
        num_deaths = 0
        try:
            out_dir = Path(msgspec.msgpack.decode(grant.body, type=TrainRequest).config["out_dir"])
            while num_deaths < MAX_DEATHS and grant.future_id not in self._cancelled:
                before = trainer.newest_checkpoint(out_dir)
                result = await self._live(grant)
                if result is not None:
                    return result
                num_deaths = num_deaths + 1 if trainer.newest_checkpoint(out_dir) == before else 1
                await asyncio.sleep(REST_SECONDS)
            if grant.future_id in self._cancelled:
                raise TrainingError("cancelled")
            raise TrainingError(
                f"the run's process died {num_deaths} times without getting further; {out_dir / RUN_LOG} may say why"
            )
        except (SmeltError, msgspec.DecodeError, LookupError) as error:
            return Result(grant.future_id, grant.epoch, failure=failure_of(error))

    async def _live(self, grant: Grant) -> Result | None:
        """One life of the run's process: its result, or None where it died without one."""
        process = self._running[grant.future_id] = TrainerProcess(grant)
        starting = asyncio.create_task(process.start())
        try:
            await asyncio.shield(starting)
            if grant.future_id in self._cancelled:
                process.interrupt()
            result = await process.result()
        except asyncio.CancelledError:
            await starting
            await process.stop()
            raise
        except (OSError, EOFError) as error:
            log.warning("cannot start the process of a run: %s", error or "the forkserver is gone")
            return None
        finally:
            del self._running[grant.future_id]
        if result is None:
            log.warning("the process of run %s died: exit code %s", grant.lane, process.exit_code)
        return result


async def warm_up() -> None:
    """Have torch imported before the first run comes; a run that comes sooner has it imported then."""
    multiprocessing.set_forkserver_preload(list(trainer.PRELOADED))
    await asyncio.sleep(WARM_UP_SECONDS)
    multiprocessing.forkserver.ensure_running()


async def run(address: Path) -> None:
    """Dial in until SIGTERM or SIGINT, which stops the run, with a checkpoint."""
    serving = serve_for_ever(
        address, "launcher", lambda connection: Launcher(connection).serve(), longest_pause_s=LONGEST_PAUSE_SECONDS
    )
    both = asyncio.gather(warm_up(), serving)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, both.cancel)
    with suppress(asyncio.CancelledError):
        await both


def main() -> None:
    """Launch runs for the server whose socket is given."""
    parser = argparse.ArgumentParser(prog="python -m smelt.cluster.launcher", description=__doc__)
    parser.add_argument("--connect", type=Path, required=True, help="the server's socket")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s launcher: %(message)s")
    os.nice(NICENESS)
    try:
        asyncio.run(run(arguments.connect))
    except SmeltError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
