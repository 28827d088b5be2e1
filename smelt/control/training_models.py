"""Models in training by request: opened, and each operation on them accepted into the ledger; computes nothing.

A model is a lane of the ledger. An operation that is wrong takes its place in the lane all the same and fails there:
its client never sends that seq again, and a lane does not wait for what cannot come. What `submit` and its like return
is the id of a promise that is on the disk.
"""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec
from sqlalchemy import Connection, Engine

from smelt.control.catalogue import Catalogue, Served
from smelt.control.models import check_free
from smelt.control.saved_weights import Found, WeightsStore, check_name, claim, expiry, folder_of, path_of
from smelt.control.sessions import Sessions, ask
from smelt.errors import AlreadyExists, InvalidInput, NotFound, SmeltError, UnknownModel
from smelt.storage import records, session_rows
from smelt.storage.futures import Ledger
from smelt.storage.records import SamplerRecord, SavedWeights, TrainingModel
from smelt.storage.transitions import Alongside, Submission, future_id
from smelt.transport.failures import failure_of
from smelt.transport.operations import (
    CreateModel,
    LoadWeights,
    MergeWeights,
    OptimStep,
    SaveForSampler,
    SaveWeights,
    UnloadSession,
)

MAX_RANK = 512  # of what a worker takes
MAX_KNOWN = 4096

Saving = Literal["weights", "sampler_weights", "external_weights"]
KINDS: dict[Saving, str] = {
    "weights": "save_weights",
    "sampler_weights": "save_weights_for_sampler",
    "external_weights": "save_weights_external",
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lora:
    """What of a model is trained; rank 0 is all of it."""

    rank: int
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operation belongs: a model and its seq there, or None for behind all others.

    `meant` is what was asked for, in a form that is the same whenever it is asked again.
    """

    model: TrainingModel
    seq: int | None
    meant: bytes


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a new model belongs: number so-and-so of a session. `meant` is as in Place."""

    owner: str
    session_id: str
    number: int
    meant: bytes
    user_metadata: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Keep:
    """How weights shall be kept. Without a name they are numbered by their seq."""

    name: str | None = None
    ttl_s: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None


class TrainingModels:
    """The models of every owner."""

    def __init__(
        self,
        ledger: Ledger,
        database: Engine,
        catalogue: Catalogue,
        sessions: Sessions,
        weights: WeightsStore,
    ) -> None:
        self._ledger = ledger
        self._database = database
        self._catalogue = catalogue
        self._sessions = sessions
        self._weights = weights
        self._known: dict[str, TrainingModel] = {}

    async def create(self, slot: Slot, base_model: str, lora: Lora) -> tuple[str, str]:
        """Open a model of a session: its id, and that of the promise. NotFound, UnknownModel, InvalidInput."""
        if not 0 <= lora.rank <= MAX_RANK:
            raise InvalidInput(f"lora_config.rank must be from 1 to {MAX_RANK}, not {lora.rank}", "lora_config")
        served = await self._catalogue.find(base_model)
        seed = secrets.randbits(31) if lora.seed is None else lora.seed
        body = CreateModel(served.name, lora.rank, seed, lora.train_attn, lora.train_mlp, lora.train_unembed)
        return await self._open(slot, _new_model(slot, base_model, served.name, lora), "create_model", body)

    async def create_from(
        self, slot: Slot, path: str, *, with_optimizer: bool, base_model: str | None = None
    ) -> tuple[str, str]:
        """Open a model with saved weights: its id, and that of the promise. NotFound, UnknownModel, InvalidInput."""
        found = await self._weights.find_saved(slot.owner, path)
        _check_loadable(found.weights, with_optimizer)
        source = found.model
        if base_model is not None and (await self._catalogue.find(base_model)).name != source.served_model:
            raise InvalidInput(f"{path} was trained on {source.base_model}, not on {base_model}", "base_model")
        body = LoadWeights(found.weights.folder, path, with_optimizer, source.served_model)
        lora = Lora(source.rank, None, source.train_attn, source.train_mlp, source.train_unembed)
        model = _new_model(slot, base_model or source.base_model, source.served_model, lora)
        return await self._open(slot, model, "load_weights", body)

    async def find(self, owner: str, model_id: str) -> TrainingModel:
        """The owner's model. NotFound."""
        found = await self.find_any(model_id)
        if found.owner != owner:
            raise _no_model(model_id)
        return found

    async def find_any(self, model_id: str) -> TrainingModel:
        """The model, whoever owns it: for what was published. NotFound."""
        known = self._known.get(model_id)
        if known is None:
            known = await self._ask(partial(session_rows.any_model, model_id=model_id))
            if known is None:
                raise _no_model(model_id)
            self._remember(known)
        return known

    async def served(self, model: TrainingModel) -> Served | None:
        """The base model as it is served; None where it is not any more."""
        try:
            return await self._catalogue.find(model.served_model)
        except UnknownModel:
            return None

    async def page(
        self, owner: str, limit: int, offset: int, project_id: str | None = None
    ) -> tuple[list[TrainingModel], int]:
        """The owner's models (of a project), newest first, and how many there are."""
        return await self._ask(
            partial(session_rows.models_page, owner=owner, limit=limit, offset=offset, project_id=project_id)
        )

    async def last_request(self, model: TrainingModel) -> float:
        """When something was asked of a model last, in seconds since 1970."""
        return await self._ask(partial(session_rows.last_request, lane=model.id)) or model.created

    async def was_opened(self, model: TrainingModel) -> bool:
        """Whether a model is there, or may still come: False where opening it has failed."""
        opening = future_id(model.id, 0)
        return await self._ask(partial(session_rows.state_of, future_id=opening)) not in ("failed", "cancelled")

    async def forward_backward(self, place: Place, body: bytes, error: SmeltError | None = None) -> str:
        """Promise a loss, and its gradient; `error` is why it will fail."""
        return await self._submit(place, "forward_backward", b"" if error else body, error)

    async def optim_step(self, place: Place, step: OptimStep | SmeltError) -> str:
        """Promise a step of the optimizer; it fails where the step is an error."""
        if isinstance(step, SmeltError):
            return await self._submit(place, "optim_step", b"", step)
        return await self._submit(place, "optim_step", msgspec.msgpack.encode(step))

    async def refuse(self, place: Place, kind: str, error: SmeltError) -> str:
        """Promise an operation that will fail."""
        return await self._submit(place, kind, b"", error)

    async def save(self, place: Place, what: Saving, keep: Keep) -> str:
        """Promise to save weights under a name."""
        model, kind, now = place.model, KINDS[what], time.time()
        name = keep.name if keep.name is not None else f"{place.seq or 0:06d}"
        try:
            check_name(name)
            expires = expiry(keep.ttl_s, now)
        except InvalidInput as error:
            return await self.refuse(place, kind, error)
        weights = SavedWeights(
            owner=model.owner, created=now, model_id=model.id, type=what, name=name,
            folder=folder_of(model.id, what, name), future_id=None, expires=expires, user_metadata=keep.user_metadata,
        )  # fmt: skip
        body = _saving(what, weights)

        def take_name(connection: Connection, future_id: str) -> bytes | None:
            try:
                claim(connection, replace(weights, future_id=future_id), overwrite=keep.overwrite)
            except AlreadyExists as error:
                return msgspec.msgpack.encode(failure_of(error))
            return None

        return await self._submit(place, kind, msgspec.msgpack.encode(body), alongside=take_name)

    async def merge(self, place: Place, name: str) -> str:
        """Promise a model of that name: the base model with the adapter in its weights. AlreadyExists, InvalidInput."""
        models_folder = self._catalogue.models_folder
        await asyncio.to_thread(check_free, name, models_folder)
        body = MergeWeights(name, models_folder.name)
        return await self._submit(place, "merge_weights", msgspec.msgpack.encode(body))

    async def save_ephemeral(self, place: Place, number: int) -> str:
        """Promise a sampler that has no name: number so-and-so of the session."""
        model, kind = place.model, "save_weights_for_sampler"
        if place.seq is None:
            raise InvalidInput("weights without a name need a seq_id", "seq_id")
        sampler = SamplerRecord(
            owner=model.owner, id=f"{model.session_id}:sample:{number}", session_id=model.session_id,
            base_model=model.base_model, served_model=model.served_model, lane=model.id, seq=place.seq,
        )  # fmt: skip
        folder = folder_of(model.id, "ephemeral", sampler.id.replace(":", "_"))
        body = msgspec.msgpack.encode(SaveForSampler(folder, sampler.id))

        def add_sampler(connection: Connection, _future_id: str) -> bytes | None:
            try:
                records.add(connection, replace(sampler, folder=folder))
            except AlreadyExists:
                taken = InvalidInput(f"{sampler.id} is another sampler already", "sampling_session_seq_id")
                return msgspec.msgpack.encode(failure_of(taken))
            return None

        return await self._submit(place, kind, body, alongside=add_sampler)

    async def load(self, place: Place, path: str, *, with_optimizer: bool) -> str:
        """Promise to go on from saved weights, which may be about to be saved by this very model."""
        kind, model = "load_weights", place.model
        try:
            found = await self._weights.find(model.owner, path)
            if found.weights.model_id != model.id and not found.is_saved:
                raise NotFound(f"{path} is not saved yet; wait for the result of saving it")
            _check_loadable(found.weights, with_optimizer)
            _check_alike(found, model, path)
        except (InvalidInput, NotFound) as error:
            return await self.refuse(place, kind, error)
        body = LoadWeights(found.weights.folder, path, with_optimizer, model.served_model)
        return await self._submit(place, kind, msgspec.msgpack.encode(body))

    async def unload(self, model: TrainingModel) -> str:
        """Promise that the model's memory is given back, after all that was asked before. Nothing follows."""
        unloaded = replace(model, unloaded=time.time())

        def mark(connection: Connection, _future_id: str) -> None:
            records.replace(connection, unloaded)

        place = Place(model, None, b"unload_model")
        accepted = await self._submit(place, "unload_model", msgspec.msgpack.encode(UnloadSession()), alongside=mark)
        self._remember(unloaded)
        return accepted

    async def _open(
        self, slot: Slot, model: TrainingModel, kind: str, body: CreateModel | LoadWeights
    ) -> tuple[str, str]:
        await self._sessions.read(model.owner, model.session_id)

        def add_model(connection: Connection, _future_id: str) -> None:
            records.add(connection, model)

        place = Place(model, 0, slot.meant)
        return model.id, await self._submit(place, kind, msgspec.msgpack.encode(body), alongside=add_model)

    async def _submit(
        self,
        place: Place,
        kind: str,
        body: bytes,
        error: SmeltError | None = None,
        alongside: Alongside | None = None,
    ) -> str:
        model = place.model
        if model.unloaded is not None and error is None:
            error = InvalidInput(f"{model.id} was given up; open another model from weights that it has saved")
        submission = Submission(
            model.owner,
            kind,
            hashlib.sha256(place.meant).hexdigest(),
            body,
            model.id,
            place.seq,
            first_seq=0,
            failure=None if error is None else msgspec.msgpack.encode(failure_of(error)),
        )
        return await self._ledger.accept(submission, alongside)

    def _remember(self, model: TrainingModel) -> None:
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[model.id] = model

    async def _ask(self, run: Callable[[Connection], T]) -> T:
        return await asyncio.to_thread(ask, self._database, run)


def _no_model(model_id: str) -> NotFound:
    return NotFound(f"there is no model {model_id[:200]!r}")


def _new_model(slot: Slot, base_model: str, served_model: str, lora: Lora) -> TrainingModel:
    return TrainingModel(
        owner=slot.owner, id=f"{slot.session_id}:train:{slot.number}", session_id=slot.session_id, number=slot.number,
        base_model=base_model, served_model=served_model, rank=lora.rank, train_attn=lora.train_attn,
        train_mlp=lora.train_mlp, train_unembed=lora.train_unembed, user_metadata=slot.user_metadata,
    )  # fmt: skip


def _saving(what: Saving, weights: SavedWeights) -> SaveWeights | SaveForSampler:
    path = path_of(weights)
    if what == "weights":
        return SaveWeights(weights.folder, path)
    return SaveForSampler(weights.folder, path, path)


def _check_loadable(weights: SavedWeights, with_optimizer: bool) -> None:
    if weights.type == "external_weights" or (weights.type != "weights" and with_optimizer):
        raise InvalidInput(f"{path_of(weights)} holds no optimizer to go on with; load weights that save_state saved")


def _check_alike(found: Found, model: TrainingModel, path: str) -> None:
    """InvalidInput where weights do not fit into a model that is there already."""
    source = found.model
    if source.served_model != model.served_model:
        raise InvalidInput(
            f"{path} was trained on {source.base_model}, and {model.id} is on {model.base_model}", "path"
        )
    shapes = [(each.rank, each.train_attn, each.train_mlp, each.train_unembed) for each in (source, model)]
    # One from elsewhere may change less than the model trains.
    is_alike = source.rank == model.rank if found.is_registered else shapes[0] == shapes[1]
    if not is_alike:
        raise InvalidInput(f"{path} has rank {source.rank}, and {model.id} rank {model.rank}, or trains other parts")
