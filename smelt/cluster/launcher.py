"""The launcher: dials in, and has the runs it is granted done in processes of their own; knows no torch and no step.

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
from functools import partial
from pathlib import Path

import msgspec

from smelt.cluster import trainer
from smelt.cluster.dialling import serve_for_ever
from smelt.cluster.launchers import LAUNCHERS, Lives, gave_up
from smelt.control.run_memory import needed_bytes
from smelt.errors import SmeltError, TrainingError, TransportError
from smelt.library import run_config
from smelt.run_configs import newest_checkpoint
from smelt.settings import load_settings
from smelt.transport.failures import failure_of
from smelt.transport.messages import Cancel, Grant, Lent, Ping, Pong, Result, TrainRequest, WorkerStatus
from smelt.transport.streams import Connection

LONGEST_PAUSE_SECONDS = 0.2  # between two tries to dial: the server is on this machine
NICENESS = 5  # of runs, where they share the cores with answers that somebody waits for
WARM_UP_SECONDS = 5.0  # after the start, when the worker wants the cores: somebody waits for it

log = logging.getLogger(__name__)


class Launcher:
    """Does what is granted over one connection, one run at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._grants: asyncio.Queue[Grant] = asyncio.Queue()
        self._cancelled: set[str] = set()
        self._running: dict[str, Lives] = {}
        self._lent: asyncio.Future[Lent] = asyncio.get_running_loop().create_future()

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
                    if lives := self._running.get(message.request_id):
                        lives.interrupt()
                case Lent() if not self._lent.done():
                    self._lent.set_result(message)
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
        """What came of a grant. A run whose processes die goes on in others, as long as it gets further."""
        try:
            request = msgspec.msgpack.decode(grant.body, type=TrainRequest)
            out_dir, num_ranks = Path(request.config["out_dir"]), request.config.get("ranks", 1)
            work = partial(trainer.result_of, grant, await self._room_for(request))
            lives = self._running[grant.future_id] = Lives(
                lambda: LAUNCHERS[load_settings().launcher](work, num_ranks),
                lambda: newest_checkpoint(out_dir),
            )
            if grant.future_id in self._cancelled:
                lives.interrupt()
            result = await lives.result()
            if result is not None:
                return result
            if grant.future_id in self._cancelled:
                raise TrainingError("cancelled")
            raise TrainingError(gave_up(out_dir))
        except (SmeltError, msgspec.DecodeError, LookupError) as error:
            return Result(grant.future_id, grant.epoch, failure=failure_of(error))
        finally:
            self._running.pop(grant.future_id, None)

    async def _room_for(self, request: TrainRequest) -> tuple[str, ...]:
        """Have the workers of this machine leave a run the memory that it needs; the models that they have unloaded."""
        device, num_bytes = await asyncio.to_thread(_needs_of, request)
        if num_bytes == 0:
            return ()
        self._lent = asyncio.get_running_loop().create_future()
        await self._connection.send(WorkerStatus(device, num_running=1, num_needed_bytes=num_bytes))
        return (await self._lent).unloaded


def _needs_of(request: TrainRequest) -> tuple[str, int]:
    """The device of a run, and how much of this machine's memory it takes: nothing where its ranks are on others."""
    settings = load_settings()
    if settings.launcher != "local":
        return settings.device, 0
    with suppress(SmeltError):
        config = run_config(trainer.values_of(request))
        return config.device, needed_bytes(config, settings)
    return settings.device, 0  # what is wrong with it the run itself says


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
