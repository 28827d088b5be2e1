"""The worker: owns the models of one device and answers whoever it has dialled in to; knows no HTTP and no database.

It dials again when the connection ends, and keeps its models meanwhile. The inference server's thread computes; the
event loop of this process only passes on what comes and goes.
"""

import asyncio
import logging
import signal
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from smelt.cluster.dialling import serve_for_ever
from smelt.cluster.uplink import Uplink
from smelt.control.catalogue import served_name
from smelt.errors import NotFound
from smelt.inference.events import Event, Load
from smelt.inference.server import InferenceServer
from smelt.inference.service import TextModel
from smelt.library import load
from smelt.models.devices import pick_device
from smelt.models.registry import is_registered, registered_names
from smelt.settings import Settings
from smelt.transport.addresses import Address
from smelt.transport.messages import WorkerStatus
from smelt.transport.streams import Connection

LONGEST_PAUSE_SECONDS = 2.0  # between two tries to dial
GRACE_SECONDS = 30.0  # for what runs when the worker is told to end

log = logging.getLogger(__name__)


class Worker:
    """`run` it on an event loop. `load_model` gives the model of a name, in a thread of its own."""

    def __init__(
        self,
        address: Address,
        load_model: Callable[[str], TextModel],
        device: str,
        *,
        key: bytes | None = None,
        tls: ssl.SSLContext | None = None,
        grace_s: float = GRACE_SECONDS,
    ) -> None:
        self._address = address
        self._key = key
        self._tls = tls
        self._grace_s = grace_s
        self._loop = asyncio.get_running_loop()
        self._server = InferenceServer(load_model, self._deliver)
        self._status = WorkerStatus(device)
        self._uplink: Uplink | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    def preload(self, model: str) -> None:
        """Have a model ready before anybody asks."""
        self._server.preload(model)

    def stop(self) -> None:
        """Finish what runs, within the grace period, and take nothing new; told so a second time, finish nothing."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def run(self) -> None:
        """Serve over one connection after the other until `stop`. ConfigError, or the bug that ended the server."""
        serving = serve_for_ever(
            self._address, "worker", self._serve, longest_pause_s=LONGEST_PAUSE_SECONDS, key=self._key, tls=self._tls
        )
        ends: list[asyncio.Future[Any]] = [
            asyncio.create_task(serving),
            asyncio.create_task(self._stop.wait()),
            asyncio.wrap_future(self._server.ended),
        ]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in done:
                end.result()
            await self._leave()
        finally:
            for end in ends[:2]:
                end.cancel()
            await asyncio.wait(ends[:2])
            await asyncio.to_thread(self._server.close)

    async def _leave(self) -> None:
        if self._uplink is None:
            return
        leaving = asyncio.create_task(self._uplink.leave())
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({leaving, hurry}, timeout=self._grace_s, return_when=asyncio.FIRST_COMPLETED)
        if not leaving.done():
            log.warning("what is still running is dropped")
        leaving.cancel()
        hurry.cancel()

    async def _serve(self, connection: Connection) -> None:
        self._uplink = Uplink(connection, self._server, self._status)
        try:
            await self._uplink.serve()
        finally:
            self._uplink = None

    def _deliver(self, events: list[Event]) -> None:
        """Called on the server's thread; the loop may be closed already when the process ends."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, events)

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Load):
                running, waiting = event.num_running, event.num_waiting
                self._status = WorkerStatus(self._status.device, event.models, running, waiting)
                if self._uplink is not None:
                    self._uplink.take_status(self._status)
            elif self._uplink is not None:
                self._uplink.take(event)


def loader(settings: Settings, preload: str | None) -> Callable[[str], TextModel]:
    """Loads registered models and the preloaded one; no other folder of this machine is anybody's to ask for."""

    def load_model(name: str) -> TextModel:
        if preload is not None and name == served_name(preload):
            return load(preload)
        if not is_registered(name, settings.models):
            known = ", ".join(registered_names(settings.models)) or "none"
            raise NotFound(f"no model {name!r} on this worker; registered: {known}")
        return load(str(settings.models / name))

    return load_model


async def run_worker(
    settings: Settings,
    address: Address,
    preload: str | None = None,
    key: bytes | None = None,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Work for the server at that address until SIGTERM or SIGINT."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)  # before there are threads, which take it over
    device = str(pick_device(settings.device))
    worker = Worker(address, loader(settings, preload), device, key=key, tls=tls)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, worker.stop)
    if preload is not None:
        worker.preload(served_name(preload))
    await worker.run()
