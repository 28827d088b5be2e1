"""Adapters in training by the names that their owners gave them; knows no HTTP, renders and computes nothing.

A name is a session of its own, in which the adapter is the newest model: one that was removed may be followed by
another of the same name. Such sessions do not end by themselves, for those who speak plain HTTP never say that they
are still there.
"""

import asyncio
import hashlib
import re
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine

from smelt.control.catalogue import Catalogue, Served
from smelt.control.loss_requests import check_loss, fault_of
from smelt.control.model_server import ModelServer
from smelt.control.post_training import PostTraining
from smelt.control.promises import outcome
from smelt.control.saved_weights import SCHEME, Found
from smelt.control.sessions import NAMED, ask
from smelt.control.training_models import Keep, Lora, Place, Slot
from smelt.errors import AlreadyExists, InvalidInput, NotFound, Unavailable, UnknownAdapter, UnknownModel, WorkerLost
from smelt.models.aliases import DEFAULT
from smelt.storage import session_rows
from smelt.storage.futures import Ledger
from smelt.storage.records import SavedWeights, Session, TrainingModel
from smelt.transport.messages import Render
from smelt.transport.operations import OptimStep
from smelt.transport.tinker_wire import with_loss
from smelt.types import ChatExample

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,127}")
BASE = "base"  # what some call the default model
LABEL = "adapter"  # of a model's metadata: the name
RANK = 16
# What leaves weights as they are is not here.
CHANGING = ("create_model", "load_weights", "optim_step")
SAMPLING_TTL_S = 3600  # for which weights are kept that somebody has sampled from
MAX_LOST = 2  # workers that may die while they render
SAVE_SECONDS = 120.0  # to wait for these to be saved


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an adapter shall be that is not there yet."""

    base_model: str = DEFAULT
    rank: int = RANK
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class LossRequest:
    """A loss of conversations, and unless `forward_only` its gradient."""

    examples: tuple[ChatExample, ...]
    loss_name: str
    settings: dict[str, float]
    forward_only: bool = False


class AdaptersInTraining:
    """The named adapters of every owner."""

    def __init__(
        self, training: PostTraining, ledger: Ledger, database: Engine, catalogue: Catalogue, server: ModelServer
    ) -> None:
        self._training = training
        self._models = training.models
        self._ledger = ledger
        self._database = database
        self._catalogue = catalogue
        self._server = server

    async def find(self, owner: str, name: str) -> TrainingModel:
        """The owner's adapter of that name, or Tinker's model of that id. UnknownAdapter."""
        if not is_name(name):
            return await self._models.find(owner, name)
        model = await self._newest(owner, name)
        if model is None or not await self._is_there(model):
            raise UnknownAdapter(f"there is no adapter {name[:200]!r}; GET /adapters lists them")
        return model

    async def page(self, owner: str, limit: int) -> list[TrainingModel]:
        """The owner's named adapters that are there, newest first."""
        found, _ = await self._models.page(owner, limit, 0, NAMED)
        return [model for model in found if await self._is_there(model)]

    async def has_gradient(self, model: TrainingModel) -> bool:
        """Whether something was learned that no step has taken yet."""
        last = await self._newest_request(model, (*CHANGING, "forward_backward"))
        return last is not None and last.kind == "forward_backward"

    async def open(self, owner: str, name: str, wanted: Wanted) -> tuple[TrainingModel, str]:
        """A new adapter, and the promise that it will be there. AlreadyExists, InvalidInput, UnknownModel."""
        check_name(name)
        base = await self.base(wanted.base_model)
        before = await self._newest(owner, name)
        if before is not None and await self._is_there(before):
            raise AlreadyExists(f"there is an adapter {name!r} already; remove it first, or choose another name")
        session = _session(owner, name)
        with suppress(AlreadyExists):
            await self._training.sessions.create(session)
        number = 0 if before is None else before.number + 1
        meant = msgspec.json.encode([base.name, wanted.rank, wanted.seed])
        lora = Lora(wanted.rank, wanted.seed, train_unembed=False)
        model_id, promised = await self._models.create(
            Slot(owner, session.id, number, meant, {LABEL: name}), base.name, lora
        )
        return await self._models.find(owner, model_id), promised

    async def forward_backward(self, owner: str, name: str, wanted: Wanted, request: LossRequest) -> str:
        """Promise a loss. An adapter that is not there is opened, once all that can be wrong was looked at.

        InvalidInput, UnknownModel, and what `ModelServer` raises.
        """
        check_loss(request.loss_name)
        if not request.examples:
            raise InvalidInput("there are no data to train on", "data")
        model = None
        with suppress(UnknownAdapter):
            model = await self.find(owner, name)
        base = await self.base(wanted.base_model if model is None else model.served_model)
        data = await self._rendered(owner, base.name, request.examples)
        body = with_loss(data, name, request.loss_name, request.settings, request.forward_only)
        fault = await asyncio.to_thread(fault_of, body, base.config)
        if fault is not None:
            raise fault
        if model is None:
            model, _ = await self.open(owner, name, wanted)
        return await self._models.forward_backward(Place(model, None, body), body)

    async def optim_step(self, owner: str, name: str, step: OptimStep) -> str:
        """Promise a step. UnknownAdapter; InvalidInput where nothing was learned since the last one."""
        model = await self.find(owner, name)
        if not await self.has_gradient(model):
            raise InvalidInput(f"no gradients are accumulated for {name!r}: ask for a forward_backward first")
        return await self._models.optim_step(Place(model, None, b""), step)

    async def remove(self, owner: str, name: str) -> str:
        """Promise that an adapter is gone, after all that was asked of it before. UnknownAdapter."""
        return await self._models.unload(await self.find(owner, name))

    async def to_sample_from(self, model: TrainingModel) -> SavedWeights:
        """The weights as they are after all that was asked until now, saved for an hour. Unavailable."""
        last = await self._newest_request(model, CHANGING)
        name = f"as-of-{0 if last is None else last.seq:06d}"
        with suppress(NotFound):
            return (await self._saved(model, name)).weights
        keep = Keep(name, SAMPLING_TTL_S, overwrite=True)
        promised = await self._models.save(Place(model, None, name.encode()), "sampler_weights", keep)
        saved = await outcome(self._ledger, model.owner, promised, SAVE_SECONDS)
        if saved is None:
            raise Unavailable(f"the weights of {name_of(model)!r} are not there yet; try again", retry_after_s=5)
        if "error" in (answer := msgspec.json.decode(saved.body)):
            raise InvalidInput(str(answer["error"]), "model_id")
        return (await self._saved(model, name)).weights

    async def base(self, name: str) -> Served:
        """The base model of that name. UnknownModel."""
        try:
            return await self._catalogue.find(name)
        except UnknownModel:
            if name != BASE:
                raise
        return await self._catalogue.find(DEFAULT)

    async def _rendered(self, owner: str, model: str, examples: tuple[ChatExample, ...]) -> bytes:
        """Conversations as data. It changes nothing, so that another worker may where one dies meanwhile."""
        for _ in range(MAX_LOST):
            with suppress(WorkerLost):
                return await self._render(owner, model, examples)
        return await self._render(owner, model, examples)

    async def _render(self, owner: str, model: str, examples: tuple[ChatExample, ...]) -> bytes:
        return (await self._server.render(Render(f"rend-{uuid.uuid4().hex}", owner, model, examples))).data

    async def _saved(self, model: TrainingModel, name: str) -> Found:
        path = f"{SCHEME}{model.id}/sampler_weights/{name}"
        return await self._training.weights.find_saved(model.owner, path)

    async def _newest(self, owner: str, name: str) -> TrainingModel | None:
        models, _ = await self._training.sessions.parts(owner, _session(owner, name).id)
        return max(models, key=lambda model: model.number, default=None)

    async def _is_there(self, model: TrainingModel) -> bool:
        return model.unloaded is None and await self._models.was_opened(model)

    async def _newest_request(self, model: TrainingModel, kinds: tuple[str, ...]) -> Any:
        def run(connection: Connection) -> Any:
            return session_rows.newest_request(connection, model.id, kinds)

        return await asyncio.to_thread(ask, self._database, run)


def is_name(text: str) -> bool:
    """Whether it is not an id of Tinker's."""
    return ":train:" not in text


def name_of(model: TrainingModel) -> str:
    """What its owner calls it."""
    return str((model.user_metadata or {}).get(LABEL, model.id))


def check_name(name: str) -> None:
    """InvalidInput where an adapter cannot be called so."""
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"an adapter cannot be called {name[:200]!r}: use up to 128 letters, digits and . _ / + -", "model_id"
        )


def _session(owner: str, name: str) -> Session:
    session_id = hashlib.sha256(msgspec.json.encode([LABEL, owner, name])).hexdigest()[:32]
    return Session(owner=owner, id=session_id, display_name=name, project_id=NAMED)
