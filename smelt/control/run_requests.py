"""Runs that are asked of a server: checked, accepted into the ledger, cancelled, resumed; knows no HTTP and no torch.

What such a run may read is for `run_sources` to say.
"""

import asyncio
import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from smelt.control.model_server import ModelServer
from smelt.control.run_folders import Entry, is_training, new_run_id, write_entry
from smelt.control.run_memory import check_memory
from smelt.control.run_metrics import note
from smelt.control.run_sources import RunSources
from smelt.control.runs import LOST, STOPPED, RunDetails, Runs, RunStatus
from smelt.control.uploads import Uploads
from smelt.errors import InUse, InvalidInput, NotFound
from smelt.run_configs import RunConfig, config_of
from smelt.settings import Settings
from smelt.storage.futures import Future, Ledger
from smelt.storage.transitions import Submission, future_id
from smelt.transport.messages import Failure, TrainRequest

KIND = "train"
NOT_ASKED = ("out_dir", "eval_only", "wandb", "tensorboard")
WILL_GO_ON = "it waits to go on from its last checkpoint"
NEVER_ACCEPTED = "the server went down before it accepted this run; ask for it again"

S = TypeVar("S", bound=RunStatus)


class RunRequests:
    """The runs of one server: those in its folders, seen together with what its ledger knows of them."""

    def __init__(self, settings: Settings, ledger: Ledger, model_server: ModelServer, uploads: Uploads) -> None:
        self.runs = Runs(settings.runs)
        self._sources = RunSources(settings, uploads)
        self._settings = settings
        self._ledger = ledger
        self._model_server = model_server

    async def all(self, owner: str | None = None) -> list[RunStatus]:
        """Every run of an owner, or of all, newest first."""
        return [await self._settled(status) for status in await asyncio.to_thread(self.runs.all, owner)]

    async def status(self, run_id: str, owner: str | None = None) -> RunStatus:
        """How one run stands. NotFound where the owner has none of that id."""
        return await self._settled(await asyncio.to_thread(self.runs.status, run_id, owner))

    async def show(self, run_id: str, owner: str | None = None) -> RunDetails:
        """One run with its config. NotFound where the owner has none of that id."""
        return await self._settled(await asyncio.to_thread(self.runs.show, run_id, owner))

    async def create(self, values: dict[str, Any], owner: str, label: str | None = None) -> RunDetails:
        """Accept a run: when this returns it will be trained, whatever dies. `label` is what its sender calls it.

        ConfigError, InvalidInput and NotFound say what is wrong with its config.
        """
        run_id = new_run_id()
        out_dir = self._settings.runs / run_id
        config = await self._checked(values, out_dir, owner)
        config_values = config.model_dump(mode="json")
        entry = Entry(
            id=run_id, owner=owner, recipe=config.recipe, config=config_values, created=time.time(), label=label
        )
        await self._ask(entry, out_dir)
        return await self.show(run_id)

    async def resume(self, run_id: str, owner: str | None = None, max_iters: int | None = None) -> RunStatus:
        """Have a run that was cancelled, has failed or was lost go on from its last checkpoint, or begin without one.

        With more `max_iters` one that has succeeded goes on too. InUse while it is trained or waits to be, InvalidInput
        where there is nothing left to do, NotFound where the owner has none of that id.
        """
        entry, out_dir = await asyncio.to_thread(self.runs.find, run_id, owner)
        status = await self.status(run_id)
        if status.state in ("queued", "running"):
            raise InUse(f"run {run_id!r} is {status.state} already; cancel it first, or let it go on")
        if status.state == "succeeded" and (max_iters is None or max_iters <= status.step):
            raise InvalidInput(
                f"run {run_id!r} has succeeded at step {status.step}; to go on give more max_iters", param="max_iters"
            )
        if max_iters is not None:
            config = config_of({**entry.config, "max_iters": max_iters})
            entry = msgspec.structs.replace(entry, config=config.model_dump(mode="json"))
        await asyncio.to_thread(note, out_dir, "queued")
        await self._ask(entry, out_dir)
        return await self.status(run_id)

    async def _ask(self, entry: Entry, out_dir: Path) -> None:
        """Write down that a run is asked for, once more, and have the ledger accept it."""
        # A lane of its own, so that the future's id is known, and on the disk, before the ledger has the run.
        seq = entry.num_requests + 1
        entry = msgspec.structs.replace(entry, future_id=future_id(entry.id, seq), num_requests=seq)
        await asyncio.to_thread(write_entry, entry, out_dir, self._settings.runs)
        body = msgspec.msgpack.encode(TrainRequest(entry.id, {**entry.config, "out_dir": str(out_dir)}))
        fingerprint = hashlib.sha256(body).hexdigest()
        submission = Submission(entry.owner, KIND, fingerprint, body, lane=entry.id, seq=seq)
        accepted = await self._ledger.accept(submission)
        assert accepted == entry.future_id

    async def check_unneeded(self, dataset: str) -> None:
        """InUse where a run waits to train on a dataset; while it does, the dataset's own lock says so."""
        for status in await self.all():
            if status.state == "queued":
                entry, _ = await asyncio.to_thread(self.runs.find, status.id)
                if dataset in (entry.config.get("dataset"), entry.config.get("data"), entry.config.get("valid_data")):
                    raise InUse(f"dataset {dataset!r} is in use: {status.id} waits to train on it; cancel that first")

    async def cancel(self, run_id: str, owner: str | None = None) -> RunStatus:
        """Take a queued run back, or have a running one stop after its step, with a checkpoint.

        InvalidInput where the run was not asked of this server, NotFound where the owner has none of that id.
        """
        entry, out_dir = await asyncio.to_thread(self.runs.find, run_id, owner)
        if entry.future_id is None:
            raise InvalidInput(f"run {run_id!r} was started in a terminal; stop it there with Ctrl-C")
        was_cancelled = await self._model_server.cancel(entry.owner, entry.future_id)
        if was_cancelled and not await asyncio.to_thread(is_training, out_dir):
            await asyncio.to_thread(note, out_dir, "cancelled")
        return await self.status(run_id)

    async def _checked(self, values: dict[str, Any], out_dir: Path, owner: str) -> RunConfig:
        given = [name for name in NOT_ASKED if values.get(name)]
        if given:
            raise InvalidInput(f"{given[0]} cannot be set for a run on a server; leave it out", param=given[0])
        machine = {name: getattr(self._settings, name) for name in ("device", "dtype", "threads")}
        config = config_of({**machine, **values, "out_dir": str(out_dir)})
        num_cores = os.cpu_count() or 1
        for name in ("ranks", "threads"):
            if (getattr(config, name) or 1) > num_cores:
                raise InvalidInput(f"{name} {getattr(config, name)} is more than this server's {num_cores} cores", name)
        config = await self._sources.resolved(config, out_dir, owner)
        await asyncio.to_thread(check_memory, config, self._settings, self._device_of(config))
        return config

    def _device_of(self, config: RunConfig) -> str:
        """Where it will be trained, as far as anybody knows before it is: runs find what workers have found."""
        found = [worker.device for worker in self._model_server.workers]
        return config.device if config.device != "auto" or not found else found[0]

    async def _settled(self, status: S) -> S:
        """The status, where its folder cannot tell, as the ledger knows it."""
        if status.state != "queued" and status.reason not in (LOST, STOPPED):
            return status
        entry, _ = await asyncio.to_thread(self.runs.find, status.id)
        if entry.future_id is None:
            return status
        try:
            future = await self._ledger.read(entry.owner, entry.future_id)
        except NotFound:  # the server died before it accepted the run, so nobody was told of it
            return replace(status, state="failed", reason=NEVER_ACCEPTED)
        return _as_in_ledger(status, future)


def _as_in_ledger(status: S, future: Future) -> S:
    if future.state == "failed":
        return replace(status, state="failed", reason=_failure_of(future))
    if future.state == "cancelled":
        return replace(status, state="cancelled", reason="")
    if future.state == "granted" and status.state == "queued" and status.reason:
        return status  # it waits for what it has told
    if future.state in ("queued", "granted"):
        return replace(status, state="queued", reason="" if status.started is None else WILL_GO_ON)
    return status


def _failure_of(future: Future) -> str:
    try:
        return msgspec.msgpack.decode(future.result or b"", type=Failure).message
    except msgspec.DecodeError:
        return "the server could not run it; its log says more"
