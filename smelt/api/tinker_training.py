"""Tinker's operations on models: opened, trained, saved, and the long poll for what became of them; computes nothing.

Each of them answers with a promise as soon as it is on the disk. The handlers read their requests themselves: a step
of training waits for these routes and no others.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from smelt.api.chat_training import ChatTraining
from smelt.api.openai_parsing import object_of
from smelt.api.services import Services
from smelt.api.streaming import ClientLeft, Presence, json_body, whole_body
from smelt.api.tinker_answers import PROTOBUF, add_direct, aside, encoded, is_near, not_yet, owner_of, promise, result
from smelt.api.tinker_types import (
    CreateModelBody,
    LoadBody,
    ModelBody,
    OptimStepBody,
    RetrieveBody,
    SaveBody,
    TinkerBody,
    check_optimizer,
    optim_step,
    understand,
    understand_operation,
)
from smelt.control.adapters_in_training import is_name
from smelt.control.loss_requests import fault_of, place_of
from smelt.control.promises import outcome
from smelt.control.training_models import KINDS, Keep, Lora, Place, Saving, Slot
from smelt.errors import InvalidInput, UnsupportedEncoding

JSON = "application/json"
MAX_JSON_BYTES = 2**20
# A client gives up after 45, and asks again at once when it has an answer.
POLL_S = 30.0

B = TypeVar("B", bound=TinkerBody)
# Promises what a body asks for, at its place.
Take = Callable[[Place, B], Awaitable[str]]


class TrainingRoutes:
    """The handlers, on the services of a server."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._models = services.post_training.models
        self._chats = ChatTraining(services)
        self._max_body_bytes = services.settings.max_body_mb * 2**20

    async def retrieve_future(self, request: Request) -> Response:
        """What became of a promise; waits for it."""
        body = understand(RetrieveBody, await json_body(request, MAX_JSON_BYTES))
        try:
            async with Presence(request.receive):
                found = await outcome(self._services.ledger, owner_of(request), body.request_id, POLL_S)
        except ClientLeft:  # also when the server goes down: then it hears to ask again
            found = None
        if found is None:
            return not_yet(body.request_id, has_workers=bool(self._services.model_server.workers))
        return result(found)

    async def forward_backward(self, request: Request) -> Response:
        """A loss and its gradient, or with forward_only the log-probabilities alone."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type == JSON:  # conversations, of somebody without Tinker's client
            return await self._chats.forward_backward(request)
        if content_type != PROTOBUF:
            raise UnsupportedEncoding(f"send a ForwardBackwardRequest with the header `Content-Type: {PROTOBUF}`")
        body = await whole_body(request.receive, self._max_body_bytes)
        where = await aside(body, place_of, body)
        model = await self._models.find(owner_of(request), where.model_id)
        served = await self._models.served(model)
        fault = await aside(body, fault_of, body, None if served is None else served.config)
        place = Place(model, where.seq, where.meant)
        return promise(await self._models.forward_backward(place, body, fault), model_id=model.id)

    async def optim_step(self, request: Request) -> Response:
        """A step of the optimizer on the gradients since the last one."""

        raw, owner = await json_body(request, MAX_JSON_BYTES), owner_of(request)
        model_id = object_of(raw).get("model_id")
        if isinstance(model_id, str) and is_name(model_id):
            return await self._chats.step(owner, raw)

        async def take(place: Place, body: OptimStepBody) -> str:
            return await self._models.optim_step(place, optim_step(body))

        return await self._taken(owner, "optim_step", OptimStepBody, raw, take)

    async def save_weights(self, request: Request) -> Response:
        """Save weights and optimizer under a name."""
        return await self._save(request, "weights")

    async def save_weights_for_sampler(self, request: Request) -> Response:
        """Save weights to sample from, under a name or for as long as the session lives."""
        return await self._save(request, "sampler_weights")

    async def save_weights_external(self, request: Request) -> Response:
        """Save an adapter as other programs read it."""
        return await self._save(request, "external_weights")

    async def load_weights(self, request: Request) -> Response:
        """Go on from saved weights, in a model that is there or in a new one."""
        raw = await json_body(request, MAX_JSON_BYTES)
        if "session_id" in object_of(raw):
            return await self._open_from(owner_of(request), understand(LoadBody, raw))

        async def take(place: Place, body: LoadBody) -> str:
            return await self._models.load(place, body.path, with_optimizer=body.optimizer)

        return await self._taken(owner_of(request), "load_weights", LoadBody, raw, take)

    async def create_model(self, request: Request) -> Response:
        """Open a model with fresh adapters, or all of it."""
        body = understand(CreateModelBody, await json_body(request, MAX_JSON_BYTES))
        check_optimizer(body.optimizer_config)
        slot = Slot(owner_of(request), body.session_id, body.model_seq_id, body.meant(), body.user_metadata)
        model_id, promised = await self._models.create(slot, body.base_model, _lora(body))
        return promise(promised, model_id=model_id)

    async def unload_model(self, request: Request) -> Response:
        """Give a model up, after all that was asked of it before."""
        body = understand(ModelBody, await json_body(request, MAX_JSON_BYTES))
        model = await self._models.find(owner_of(request), body.model_id)
        return promise(await self._models.unload(model), model_id=model.id)

    async def get_info(self, request: Request) -> Response:
        """What a model is; clients on this machine also hear where its tokenizer lies."""
        body = understand(ModelBody, await json_body(request, MAX_JSON_BYTES))
        model = await self._models.find(owner_of(request), body.model_id)
        served = await self._models.served(model)
        data = {"model_name": model.base_model}
        if served is not None and served.config is not None:
            data["arch"] = served.config.architecture
        if served is not None and served.folder is not None and is_near(request):
            data["tokenizer_id"] = str(served.folder)
        return encoded(
            {
                "type": "get_info",
                "model_id": model.id,
                "model_data": data,
                "model_name": model.base_model,
                "is_lora": model.rank > 0,
                "lora_rank": model.rank or None,
            }
        )

    async def _save(self, request: Request, what: Saving) -> Response:
        async def take(place: Place, body: SaveBody) -> str:
            if body.age_encryption_recipients:
                lacking = InvalidInput("encrypted weights are not supported; leave age_encryption_recipients out")
                return await self._models.refuse(place, KINDS[what], lacking)
            if what == "sampler_weights" and body.path is None and body.sampling_session_seq_id is not None:
                return await self._models.save_ephemeral(place, body.sampling_session_seq_id)
            keep = Keep(body.path, body.ttl_seconds, body.overwrite, body.user_metadata)
            return await self._models.save(place, what, keep)

        # A client that tries again gives a sampler without a name another number.
        return await self._operation(request, KINDS[what], SaveBody, take, "sampling_session_seq_id")

    async def _operation(
        self, request: Request, kind: str, body_class: type[B], take: Take[B], *volatile: str
    ) -> Response:
        raw = await json_body(request, MAX_JSON_BYTES)
        return await self._taken(owner_of(request), kind, body_class, raw, take, *volatile)

    async def _taken(
        self, owner: str, kind: str, body_class: type[B], raw: bytes, take: Take[B], *volatile: str
    ) -> Response:
        """The promise of an operation; one that is wrong takes its place, and fails there."""
        where, body = understand_operation(body_class, raw)
        model = await self._models.find(owner, where.model_id)
        if isinstance(body, InvalidInput):
            promised = await self._models.refuse(Place(model, where.seq_id, raw), kind, body)
        else:
            promised = await take(Place(model, where.seq_id, body.meant(*volatile)), body)
        return promise(promised, model_id=model.id)

    async def _open_from(self, owner: str, body: LoadBody) -> Response:
        check_optimizer(body.optimizer_config)
        if body.session_id is None or body.model_seq_id is None:
            raise InvalidInput("a new model needs a session_id and a model_seq_id", "model_seq_id")
        slot = Slot(owner, body.session_id, body.model_seq_id, body.meant(), body.user_metadata)
        model_id, promised = await self._models.create_from(
            slot, body.path, with_optimizer=body.optimizer, base_model=body.base_model
        )
        return promise(promised, model_id=model_id)


def add_routes(routes: APIRouter, services: Services) -> None:
    """What is asked most comes first: routes are tried one after the other."""
    training = TrainingRoutes(services)
    add = partial(add_direct, routes, services.abuse_checker)
    add("/retrieve_future", training.retrieve_future, RetrieveBody)
    add("/forward_backward", training.forward_backward, None)
    add("/optim_step", training.optim_step, OptimStepBody)
    add("/save_weights_for_sampler", training.save_weights_for_sampler, SaveBody)
    add("/save_weights", training.save_weights, SaveBody)
    add("/save_weights_external", training.save_weights_external, SaveBody)
    add("/load_weights", training.load_weights, LoadBody)
    add("/create_model", training.create_model, CreateModelBody)
    add("/unload_model", training.unload_model, ModelBody)
    add("/get_info", training.get_info, ModelBody)


def _lora(body: CreateModelBody) -> Lora:
    lora = body.lora_config
    if lora is None:
        return Lora(0)
    if lora.rank < 1:
        raise InvalidInput(f"lora_config.rank must be at least 1, not {lora.rank}", "lora_config")
    return Lora(lora.rank, lora.seed, lora.train_attn, lora.train_mlp, lora.train_unembed)
