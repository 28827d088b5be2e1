"""The API's process: opens the database, lets workers dial in, answers HTTP on an inherited socket; knows no route.

    python -m smelt.api.server --fd DESCRIPTOR [--default-model MODEL] [--log-for-people]

SIGTERM drains it: answers get half a minute to finish, what is left of them ends with an error that says so, and what
the ledger holds stays there. A second SIGTERM waits for nothing. What would go wrong at every start ends with 2.
"""

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial

import uvicorn
import uvloop
from sqlalchemy import Engine

from smelt.api.app import create_app
from smelt.api.draining import Draining
from smelt.api.metering import note_background
from smelt.api.protocol import BoundedProtocol
from smelt.api.services import Services
from smelt.api.telemetry import configure_logging
from smelt.control import batch_lines
from smelt.control.abuse_checker import AbuseChecker
from smelt.control.session_cleanup import SessionCleanup
from smelt.control.workers import Workers
from smelt.errors import ConfigError, SmeltError
from smelt.settings import Settings, load_settings, runtime_folder
from smelt.storage.database import check_integrity, open_database
from smelt.storage.faults import fault_from
from smelt.storage.files import Files
from smelt.storage.futures import Granted, Ledger
from smelt.storage.writer import Writer
from smelt.transport.addresses import Address, server_tls, socket_path
from smelt.transport.keys import make_key
from smelt.transport.messages import Result
from smelt.transport.streams import listen

DRAIN_SECONDS = 30.0
LAST_SECONDS = 2.0  # for the last words of answers that did not finish
SETTLING_SECONDS = 30.0  # before the first round of chores
RESULT_SECONDS = 24 * 3600.0  # how long a result is kept

log = logging.getLogger(__name__)


class HttpServer(uvicorn.Server):
    """uvicorn's server, which leaves signals to the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None is taken."""
        yield


class EndSignals:
    """What SIGTERM and SIGINT have asked for so far: the end, or the end at once."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._note)

    def _note(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()


def main() -> None:
    """Serve until a signal; a mistake that another start would repeat is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m smelt.api.server", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="descriptor of the listening socket")
    parser.add_argument("--default-model", help="name or folder of the model that is served beside the registered ones")
    parser.add_argument("--log-for-people", action="store_true", help="log lines instead of JSON")
    arguments = parser.parse_args()
    os.umask(0o077)  # what people ask and are answered is for no other account of this machine
    configure_logging(for_people=arguments.log_for_people)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it says at each start that it has started
    try:
        listener = socket.socket(fileno=arguments.fd)
        listener.set_inheritable(False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(load_settings(), listener, arguments.default_model))
    except SmeltError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


async def run(settings: Settings, listener: socket.socket, default_model: str | None = None) -> None:
    """Serve on a socket until a signal has been obeyed."""
    signals = EndSignals()
    with opened(settings) as (engine, writer, ledger):
        checker = AbuseChecker(settings, engine, writer)

        def witness(row: Granted, result: Result) -> None:
            note_background(checker, row, result)
            services.post_training.figures.note(row, result)

        workers = Workers(ledger, witness=witness)
        services = Services(settings, engine, writer, ledger, workers, checker, default_model)
        app = Draining(create_app(services))
        async with AsyncExitStack() as doors, chores(services):
            for address, key, tls in ways_in(settings):
                way_in = listen(address, workers.serve, key=key, tls=tls, next_epoch=ledger.open_epoch)
                await doors.enter_async_context(way_in)
            server = HttpServer(http_config(app))
            gc.freeze()  # what is here now stays: looking through it again and again would cost each request
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            if await one_of(signals.stop, serving, None):
                app.begin()
                server.should_exit = True
                async with during(workers.drain()):
                    await one_of(signals.hurry, serving, DRAIN_SECONDS)
                await doors.aclose()  # which ends the answers that are still being written
                await asyncio.wait([serving], timeout=LAST_SECONDS)
                server.force_exit = True
            await asyncio.wait([serving], timeout=LAST_SECONDS)


def http_config(app: Draining) -> uvicorn.Config:
    """How uvicorn speaks HTTP. It logs nothing of its own, because the gate does."""
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # whoever sends them could name any client
    )


@contextmanager
def opened(settings: Settings) -> Iterator[tuple[Engine, Writer, Ledger]]:
    """The database and its ledger while the block runs. StorageError where it is damaged."""
    fault = fault_from(settings.fault, settings.fault_note)
    settings.home.mkdir(parents=True, exist_ok=True)
    engine = open_database(settings.database_url)
    try:
        check_integrity(engine)
        writer = Writer(engine)
        try:
            yield engine, writer, Ledger(engine, writer, Files(settings.bodies, fault), fault)
        finally:
            writer.close()
    finally:
        engine.dispose()


def ways_in(settings: Settings) -> Iterator[tuple[Address, bytes | None, ssl.SSLContext | None]]:
    """(address, key, TLS) of each place where workers dial in: on this machine and, if asked, from others."""
    yield socket_path(settings.home, runtime_folder()), None, None
    if settings.worker_address is None:
        return
    if settings.tls_certificate is None or settings.tls_key is None:
        raise ConfigError(
            f"workers cannot dial in at {settings.worker_address} without TLS: give --tls-certificate and --tls-key"
        )
    tls = server_tls(settings.tls_certificate, settings.tls_key)
    yield settings.worker_address, make_key(settings.worker_key_file), tls


@asynccontextmanager
async def chores(services: Services) -> AsyncIterator[None]:
    """Keep the ledger and the folders of sessions tidy while the block runs."""
    ledger = services.ledger
    cleanup = SessionCleanup(services.post_training, services.database, services.writer, services.settings.home)
    rounds: dict[str, tuple[float, Callable[[], Awaitable[object]]]] = {
        "give up missing requests": (60.0, ledger.abandon_holes),
        "drop old results": (600.0, partial(ledger.expire, RESULT_SECONDS, (batch_lines.KIND,))),
        "remove files of no request": (3600.0, ledger.collect_files),
        "remove what sessions left behind": (600.0, cleanup.tidy),
        "remove files whose time is over": (600.0, services.uploads.tidy),
        "end uploads whose time is over": (600.0, services.chunked_uploads.tidy),
    }
    async with AsyncExitStack() as tasks:
        for name, (seconds, chore) in rounds.items():
            await tasks.enter_async_context(during(repeat(name, chore, seconds)))
        yield


async def repeat(name: str, chore: Callable[[], Awaitable[object]], seconds: float) -> None:
    """Do a chore every so often, for ever; one that fails is tried again the next time."""
    await asyncio.sleep(SETTLING_SECONDS)
    while True:
        try:
            await chore()
        except Exception:  # whatever it is, the server answers and the chore can wait
            log.exception("cannot %s; trying again in %g s", name, seconds)
        await asyncio.sleep(seconds)


@asynccontextmanager
async def during(work: Awaitable[None]) -> AsyncIterator[None]:
    """Do this beside the block, and no longer."""
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def one_of(event: asyncio.Event, serving: asyncio.Task[None], timeout_s: float | None) -> bool:
    """Wait for the event, the end of serving or of the time; whether the server still serves. Raises its error."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait([waiting, serving], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if serving.done():
        serving.result()
    return not serving.done()


if __name__ == "__main__":
    main()
