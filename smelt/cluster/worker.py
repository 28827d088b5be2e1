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
from pathlib import Path
from typing import Any

import torch

from smelt.cluster.dialling import serve_for_ever
from smelt.cluster.training_lanes import Told, TrainingLanes
from smelt.cluster.uplink import Uplink
from smelt.control.catalogue import served_name
from smelt.errors import NotFound
from smelt.inference.classifier import TextClassifier
from smelt.inference.events import Event, Load
from smelt.inference.memory import MIB, Candidate, Upkeep, classifier_bytes, default_cache_bytes, predicted_bytes
from smelt.inference.server import InferenceServer
from smelt.inference.service import TextModel
from smelt.library import load, load_classifier
from smelt.models.devices import pick_device, pick_dtype
from smelt.models.folders import base_of, classifier_in, is_adapter, read_config, stamp_of
from smelt.models.kernels import start_build
from smelt.models.registry import is_registered, registered_names, resolve
from smelt.settings import Settings
from smelt.storage.faults import Fault, fault_from, no_fault
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
        load_model: Callable[[str], TextModel | TextClassifier],
        device: str,
        *,
        upkeep: Upkeep | None = None,
        key: bytes | None = None,
        tls: ssl.SSLContext | None = None,
        grace_s: float = GRACE_SECONDS,
    ) -> None:
        self._address = address
        self._key = key
        self._tls = tls
        self._grace_s = grace_s
        self._loop = asyncio.get_running_loop()
        self._server = InferenceServer(load_model, self._deliver, upkeep)
        self._lanes: TrainingLanes | None = None
        self._status = WorkerStatus(device)
        self._uplink: Uplink | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    def keep_sessions(self, home: Path, fault: Fault = no_fault) -> None:
        """Train by request too. What sessions save lies below the home folder."""
        self._lanes = TrainingLanes(self._server, home, self._deliver_told, fault)

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
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._server.close()
        if self._lanes is not None:
            self._lanes.close()

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
        self._uplink = Uplink(connection, self._server, self._status, self._lanes)
        try:
            await self._uplink.serve()
        finally:
            self._uplink = None

    def _deliver(self, events: list[Event]) -> None:
        """Called on the server's thread; the loop may be closed already when the process ends."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, events)

    def _deliver_told(self, told: list[Told]) -> None:
        """The same, of sessions."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take_told, told)

    def _take_told(self, told: list[Told]) -> None:
        for each in told:
            if self._uplink is not None:
                self._uplink.take_told(each)

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Load):
                self._status = WorkerStatus(
                    self._status.device,
                    event.models,
                    event.num_running,
                    event.num_waiting,
                    model_loads=event.model_loads,
                    num_lent_bytes=event.num_lent_bytes,
                )
                if self._uplink is not None:
                    self._uplink.take_status(self._status)
            elif self._uplink is not None:
                self._uplink.take(event)


class Shelf:
    """The models that a worker may load: registered ones, the preloaded one, and what sessions have made of them; no
    other folder of this machine is anybody's to ask for. Raises NotFound for others."""

    def __init__(self, settings: Settings, preload: str | None) -> None:
        self._settings = settings
        self._preload = preload
        self._device = pick_device(settings.device)
        self._dtype = pick_dtype(settings.dtype, self._device)

    def load(self, name: str) -> TextModel | TextClassifier:
        """The model of that name."""
        source = self._source(name)
        path = resolve(source, self._settings.models)
        if not path.is_file() and classifier_in(base_of(path)) is not None:
            return load_classifier(source)
        text_model = load(source)
        text_model.model.gradient_checkpointing = self._settings.gradient_checkpointing  # where sessions train on it
        return text_model

    def examine(self, name: str) -> Candidate:
        """The state of its files, and the memory it would take."""
        path = resolve(self._source(name), self._settings.models)
        return Candidate(stamp_of(path), self._predicted_bytes(path))

    def _source(self, name: str) -> str:
        if self._preload is not None and name == served_name(self._preload, self._settings.models):
            return self._preload
        if (own := model_of_session(name, self._settings.home)) is not None:
            return str(own)
        if not is_registered(name, self._settings.models):
            known = ", ".join(registered_names(self._settings.models)) or "none"
            raise NotFound(f"no model {name!r} on this worker; registered: {known}")
        return str(self._settings.models / name)

    def _predicted_bytes(self, path: Path) -> int:
        if path.is_file():  # nanoGPT's: its shape is known once it is read
            return 2 * path.stat().st_size
        settings = self._settings
        if (shape := classifier_in(base_of(path))) is not None:
            return classifier_bytes(shape, self._dtype)
        config = read_config(base_of(path))
        cache = settings.kv_cache_bytes or default_cache_bytes(config, self._dtype, self._device, settings.max_running)
        return predicted_bytes(config, self._dtype, cache, settings.quantize == "int8")


def model_of_session(name: str, home: Path) -> Path | None:
    """The folder of a whole model that a session has saved, where a name means that: its path below the home folder."""
    sessions, folder = (home / "sessions").resolve(), (home / name).resolve()
    is_within = name.startswith("sessions/") and folder.is_relative_to(sessions)
    return folder if is_within and folder.is_dir() and not is_adapter(folder) else None


def upkeep_of(settings: Settings, shelf: Shelf, device: torch.device) -> Upkeep:
    """How the worker's models come and go."""
    limit = None if settings.model_memory_mb is None else settings.model_memory_mb * MIB
    return Upkeep(shelf.examine, limit, settings.keep_alive_s, device=device)


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
    device = pick_device(settings.device)
    if device.type == "cpu":
        start_build(settings.kernels)  # seconds, the first time on a machine: not those of the first answer
    shelf = Shelf(settings, preload)
    upkeep = upkeep_of(settings, shelf, device)
    worker = Worker(address, shelf.load, str(device), upkeep=upkeep, key=key, tls=tls)
    worker.keep_sessions(settings.home, fault_from(settings.fault, settings.fault_note))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, worker.stop)
    if preload is not None:
        worker.preload(served_name(preload, settings.models))
    await worker.run()
