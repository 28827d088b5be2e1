"""Runs that are asked of a server: checked, accepted into the ledger, cancelled; knows no HTTP and no torch.

What such a run may use is what the server has: registered datasets and models, built-in text. A path or a URL in a
request would make the server read what its sender cannot.
"""

import asyncio
import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from smelt.configs import RUN_METRICS
from smelt.control.model_server import ModelServer
from smelt.control.run_folders import Entry, new_run_id, write_entry
from smelt.control.runs import RunDetails, Runs, RunStatus
from smelt.data.bpe import is_tiktoken_name
from smelt.data.datasets import dataset_folder, open_dataset
from smelt.errors import InvalidInput, NotFound
from smelt.models.registry import registered_name, registered_names
from smelt.run_configs import RunConfig, TrainConfig, config_of
from smelt.settings import Settings
from smelt.storage.futures import Future, Ledger
from smelt.storage.transitions import Submission, future_id
from smelt.transport.messages import Failure, TrainRequest

KIND = "train"
NOT_ASKED = ("out_dir", "eval_only", "wandb", "tensorboard")
WILL_GO_ON = "its process was lost; it waits to go on from its last checkpoint"


S = TypeVar("S", bound=RunStatus)


class RunRequests:
    """The runs of one server: those in its folders, seen together with what its ledger knows of them."""

    def __init__(self, settings: Settings, ledger: Ledger, model_server: ModelServer) -> None:
        self.runs = Runs(settings.runs)
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

    async def create(self, values: dict[str, Any], owner: str) -> RunDetails:
        """Accept a run: when this returns it will be trained, whatever dies.

        ConfigError, InvalidInput and NotFound say what is wrong with its config.
        """
        run_id = new_run_id()
        out_dir = self._settings.runs / run_id
        config = await asyncio.to_thread(self._checked, values, out_dir)
        config_values = config.model_dump(mode="json")
        # A lane of its own, so that the future's id is known, and on the disk, before the ledger has the run.
        entry = Entry(
            id=run_id,
            owner=owner,
            recipe=config.recipe,
            config=config_values,
            created=time.time(),
            future_id=future_id(run_id, 1),
        )
        await asyncio.to_thread(write_entry, entry, out_dir, self._settings.runs)
        body = msgspec.msgpack.encode(TrainRequest(run_id, config_values))
        fingerprint = hashlib.sha256(body).hexdigest()
        accepted = await self._ledger.accept(Submission(owner, KIND, fingerprint, body, lane=run_id, seq=1))
        assert accepted == entry.future_id
        return await self.show(run_id)

    async def cancel(self, run_id: str, owner: str | None = None) -> RunStatus:
        """Take a queued run back, or have a running one stop after its step, with a checkpoint.

        InvalidInput where the run was not asked of this server, NotFound where the owner has none of that id.
        """
        entry, out_dir = await asyncio.to_thread(self.runs.find, run_id, owner)
        if entry.future_id is None:
            raise InvalidInput(f"run {run_id!r} was started in a terminal; stop it there with Ctrl-C")
        was_cancelled = await self._model_server.cancel(entry.owner, entry.future_id)
        if was_cancelled and entry.started is None:
            await asyncio.to_thread(_note_cancelled, out_dir)
        return await self.status(run_id)

    def _checked(self, values: dict[str, Any], out_dir: Path) -> RunConfig:
        given = [name for name in NOT_ASKED if name in values]
        if given:
            raise InvalidInput(f"{given[0]} cannot be set for a run on a server; leave it out", param=given[0])
        machine = {name: getattr(self._settings, name) for name in ("device", "dtype", "threads")}
        config = config_of({**machine, **values, "out_dir": str(out_dir)})
        if isinstance(config, TrainConfig):
            self._check_source(config)
        if config.init_from == "scratch":
            return config
        name = registered_name(config.init_from, self._settings.models)
        if name is None:
            known = ", ".join(registered_names(self._settings.models)) or "none"
            raise NotFound(f"init_from {config.init_from!r} is no registered model; registered: {known}")
        return config.replace(init_from=name)

    def _check_source(self, config: TrainConfig) -> None:
        """The text and its tokenizer must be the server's own."""
        if config.dataset is not None:
            open_dataset(dataset_folder(self._settings.datasets, config.dataset))
        elif config.data_path is None:
            raise InvalidInput("no data to train on: give dataset, the name of a registered one", param="dataset")
        elif not config.data_path.startswith("builtin:"):
            raise InvalidInput(
                f"data_path {config.data_path!r} is not built in; a run on a server takes builtin:pydoc, or dataset, "
                f"the name of a registered one",
                param="data_path",
            )
        name = config.tokenizer
        if name is None or name in ("bytes", "char") or name.startswith("bpe:") or is_tiktoken_name(name):
            return
        raise InvalidInput(f"tokenizer {name!r} is unknown; use bytes, char, bpe:N or gpt2", param="tokenizer")

    async def _settled(self, status: S) -> S:
        """The status, where its folder cannot tell, as the ledger knows it."""
        if status.state not in ("queued", "lost"):
            return status
        entry, _ = await asyncio.to_thread(self.runs.find, status.id)
        if entry.future_id is None:
            return status
        try:
            future = await self._ledger.read(entry.owner, entry.future_id)
        except NotFound:  # the server died before it accepted the run, so nobody was told of it
            return replace(status, state="lost", reason="the server went down before it accepted this run")
        return _as_in_ledger(status, future)


def _as_in_ledger(status: S, future: Future) -> S:
    if future.state == "failed":
        return replace(status, state="failed", reason=_failure_of(future))
    if future.state == "cancelled":
        return replace(status, state="cancelled", reason="")
    if future.state in ("queued", "granted") and status.state == "lost":
        return replace(status, state="queued", reason=WILL_GO_ON)
    return status


def _failure_of(future: Future) -> str:
    try:
        return msgspec.msgpack.decode(future.result or b"", type=Failure).message
    except msgspec.DecodeError:
        return "the server could not run it; its log says more"


def _note_cancelled(out_dir: Path) -> None:
    with (out_dir / RUN_METRICS).open("a", encoding="utf-8") as file:
        file.write('{"kind": "cancelled"}\n')
