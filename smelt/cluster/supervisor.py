"""The supervisor: starts the processes, starts them again, ends them in order; knows no work of theirs and no torch.

The listening socket is its own and outlives each of them: while the API restarts, clients wait in the backlog. When
the supervisor itself is killed, the kernel ends the others with it, and another one can start at once.
"""

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from smelt.cluster.children import Child, Deaths, Program, manner_of_death, start
from smelt.settings import Settings, runtime_folder
from smelt.transport.addresses import socket_path

DRAIN_SECONDS = 40.0  # the API gives answers 30 s to finish
LAST_SECONDS = 3.0  # between SIGTERM and SIGKILL
MANY_DEATHS = 3  # within a minute
USER_ERROR = 2  # the exit code of a mistake, which another start would only repeat

# These are told first that the end has come; what they let finish needs the others.
DRAINING = ("api", "launcher")

log = logging.getLogger(__name__)


def programs(settings: Settings, listener: socket.socket, model: str | None, with_worker: bool) -> list[Program]:
    """What a server consists of."""
    door = str(socket_path(settings.home, runtime_folder()))
    api = ("--fd", str(listener.fileno()), *(("--default-model", model) if model else ()))
    api += ("--log-for-people",) if sys.stderr.isatty() else ()  # it writes to a pipe itself
    worker = ("worker", "--connect", door, *(("--preload", model) if model else ()))
    found = [
        Program("api", "smelt.api.server", api, (listener.fileno(),)),
        Program("launcher", "smelt.cluster.launcher", ("--connect", door)),
    ]
    return [*found, Program("worker", "smelt", worker)] if with_worker else found


class Supervisor:
    """Runs programs until it is told to stop, or one of them says that it never can."""

    def __init__(self, programs: Sequence[Program], listener: socket.socket, environment: Mapping[str, str]) -> None:
        self._programs = programs
        self._listener = listener
        self._environment = environment
        self._children: dict[str, Child] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._exit_code = 0

    async def run(self, when_ready: Callable[[], None]) -> int:
        """The exit code, once every program has ended; `when_ready` is called when the API first answers."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        announcing = asyncio.create_task(self._announce(when_ready))
        self._keepers = {program.name: asyncio.create_task(self._keep(program)) for program in self._programs}
        stopping = asyncio.create_task(self._stop.wait())
        # A keeper that ends by itself has met a bug of ours, and half a server is worse than none.
        await asyncio.wait([stopping, *self._keepers.values()], return_when=asyncio.FIRST_COMPLETED)
        announcing.cancel()
        self._stop.set()
        await self._drain()
        await asyncio.gather(*self._keepers.values())
        return self._exit_code

    def stop(self) -> None:
        """Let what is being answered finish; told so a second time, do not wait for it."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _keep(self, program: Program) -> None:
        """Start the program again whenever it ends."""
        deaths = Deaths()
        while not self._stop.is_set():
            child = self._children[program.name] = await start(program, self._environment)
            code = await child.wait()
            del self._children[program.name]
            if self._stop.is_set():
                return
            if code == USER_ERROR:
                self._give_up(program)
                return
            report_death(child, code, deaths)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), deaths.pause)

    def _give_up(self, program: Program) -> None:
        log.error("the %s cannot run, for the reason above: stopping", program.name)
        self._exit_code = USER_ERROR
        self._hurry.set()
        self._stop.set()

    async def _drain(self) -> None:
        """End all programs: those that answer somebody first, and whoever does not listen by force."""
        self._listener.close()  # from now on nobody shall wait for an API
        self._tell(DRAINING)
        await self._wait_for(DRAINING)
        self._tell(self._keepers)
        await asyncio.wait(self._keepers.values(), timeout=LAST_SECONDS)
        for child in self._children.values():
            log.warning("the %s does not end; killing it", child.name)
            child.kill()

    def _tell(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._children:
                self._children[name].terminate()

    async def _wait_for(self, names: Iterable[str]) -> None:
        """Return when these have ended, or after long enough, or when somebody is in a hurry."""
        keepers = [keeper for name, keeper in self._keepers.items() if name in names]
        if not keepers:
            return
        racing: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(asyncio.wait(keepers)),
            asyncio.ensure_future(self._hurry.wait()),
        ]
        await asyncio.wait(racing, timeout=DRAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for runner in racing:
            runner.cancel()

    async def _announce(self, when_ready: Callable[[], None]) -> None:
        """Ask the API how it is: the question waits in the backlog until there is one that takes it."""
        host, port = self._listener.getsockname()[:2]
        while not await answers(host, port):  # noqa: ASYNC110 - it waits itself, until an API answers or dies
            await asyncio.sleep(0.1)
        when_ready()


def report_death(child: Child, code: int, deaths: Deaths) -> None:
    """Say that a program has died and, when it does so again and again, what it said last."""
    num_deaths = deaths.note(time.monotonic())
    how = f"the {child.name} (pid {child.pid}) {manner_of_death(code)}"
    if num_deaths < MANY_DEATHS:
        log.warning("%s; starting it again", how)
        return
    said = child.last_words or "nothing"
    log.error("%s: death %d within a minute; next try in %g s. It said last:\n%s", how, num_deaths, deaths.pause, said)


async def answers(host: str, port: int) -> bool:
    """Whether an API has answered there; waits for as long as the connection is neither answered nor broken."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return bool(await reader.readline())
        finally:
            writer.close()
    except OSError:
        return False
