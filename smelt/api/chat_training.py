"""Training by plain HTTP, for those without Tinker's client: conversations in, JSON out; computes and renders nothing.

Adapters go by names that their owners choose. What takes time is promised at once, and `/retrieve_future` waits for it.
"""

import uuid
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from smelt.api import adapter_sampling
from smelt.api.chat_training_types import (
    AdapterBody,
    AddBody,
    ForwardBackwardBody,
    LoadNamedBody,
    MergeBody,
    SaveNamedBody,
    StepBody,
)
from smelt.api.services import Services
from smelt.api.streaming import ClientLeft, Presence, json_body
from smelt.api.tinker_answers import add_direct, aside, encoded, iso_time, owner_of, promise
from smelt.api.tinker_types import RetrieveBody, understand
from smelt.control.adapters_in_training import name_of
from smelt.control.loss_requests import LOSSES
from smelt.control.promises import Outcome, outcome
from smelt.control.training_models import Keep, Place, Saving
from smelt.models.footprint import adapter_values
from smelt.storage.records import TrainingModel
from smelt.transport.tinker_wire import decode_outputs

MAX_JSON_BYTES = 2**20
POLL_S = 60.0  # for which one question waits: after that it is "pending", and may be asked again

Limit = Annotated[int, Query(ge=1, le=10_000)]


class ChatTraining:
    """The handlers, on the services of a server."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._adapters = services.adapters
        self._models = services.post_training.models
        self._max_body_bytes = services.settings.max_body_mb * 2**20

    async def forward_backward(self, request: Request) -> Response:
        """A loss of conversations and its gradient; an adapter that is not there is made."""
        raw = await json_body(request, self._max_body_bytes)
        body = await aside(raw, understand, ForwardBackwardBody, raw)
        loss = await aside(raw, body.loss)
        async with Presence(request.receive):
            promised = await self._adapters.forward_backward(owner_of(request), body.model_id, body.wanted(), loss)
        return promise(promised, model_id=body.model_id)

    async def optim_step(self, request: Request) -> Response:
        """A step of the optimizer on the gradients since the last one."""
        return await self.step(owner_of(request), await json_body(request, MAX_JSON_BYTES))

    async def step(self, owner: str, raw: bytes) -> Response:
        """The same, of a body that is there."""
        body = understand(StepBody, raw)
        return promise(await self._adapters.optim_step(owner, body.model_id, body.step()), model_id=body.model_id)

    async def retrieve_future(self, request: Request) -> Response:
        """What became of a promise, when it is there; 202 where that takes longer than a minute."""
        body = understand(RetrieveBody, await json_body(request, MAX_JSON_BYTES))
        owner = owner_of(request)
        try:
            async with Presence(request.receive):
                found = await outcome(self._services.ledger, owner, body.request_id, POLL_S)
        except ClientLeft:  # also when the server goes down: then it hears to ask again
            found = None
        if found is None:
            return encoded({"status": "pending", "request_id": body.request_id}, 202)
        future = await self._services.ledger.read(owner, body.request_id)
        model = None if future.lane is None else await self._models.find(owner, future.lane)
        return told(found, future.kind, None if model is None else name_of(model))

    async def add_lora(self, request: Request) -> Response:
        """A new adapter."""
        body = understand(AddBody, await json_body(request, MAX_JSON_BYTES))
        wanted = body.wanted()
        name = body.model_id or f"{wanted.base_model}_lora_{uuid.uuid4().hex[:8]}"
        _, promised = await self._adapters.open(owner_of(request), name, wanted)
        return promise(promised, model_id=name)

    async def remove_lora(self, request: Request) -> Response:
        """An adapter is given up, after all that was asked of it."""
        body = understand(AdapterBody, await json_body(request, MAX_JSON_BYTES))
        promised = await self._adapters.remove(owner_of(request), body.name())
        return promise(promised, model_id=body.name())

    async def merge_lora(self, request: Request) -> Response:
        """A model that needs no adapter, of one and what it stands on."""
        raw = await json_body(request, MAX_JSON_BYTES)
        body = understand(MergeBody, raw)
        model = await self._adapters.find(owner_of(request), body.model_id)
        return promise(await self._models.merge(Place(model, None, raw), body.name), model_id=body.model_id)

    async def save_weights(self, request: Request) -> Response:
        """Save weights and optimizer under a name, to go on from."""
        return await self._save(request, "weights")

    async def save_weights_for_sampler(self, request: Request) -> Response:
        """Save weights under a name, to sample from."""
        return await self._save(request, "sampler_weights")

    async def load_weights(self, request: Request) -> Response:
        """Go on from saved weights."""
        raw = await json_body(request, MAX_JSON_BYTES)
        body = understand(LoadNamedBody, raw)
        model = await self._adapters.find(owner_of(request), body.model_id)
        promised = await self._models.load(Place(model, None, raw), body.path, with_optimizer=body.optimizer)
        return promise(promised, model_id=body.model_id)

    async def _save(self, request: Request, what: Saving) -> Response:
        raw = await json_body(request, MAX_JSON_BYTES)
        body = understand(SaveNamedBody, raw)
        model = await self._adapters.find(owner_of(request), body.model_id)
        name = body.name or f"step-{uuid.uuid4().hex[:8]}"
        keep = Keep(name, body.ttl_seconds, body.overwrite)
        return promise(await self._models.save(Place(model, None, raw), what, keep), model_id=body.model_id)


def router(services: Services) -> APIRouter:
    """The routes, and what can be asked without training anything."""
    routes = APIRouter(tags=["training by plain HTTP"])
    training = ChatTraining(services)
    add = partial(add_direct, routes, services.abuse_checker)
    add("/fwdbwd", training.forward_backward, ForwardBackwardBody)
    add("/optim_step", training.optim_step, StepBody)
    add("/retrieve_future", training.retrieve_future, RetrieveBody)
    add("/add_lora", training.add_lora, AddBody)
    add("/remove_lora", training.remove_lora, AdapterBody)
    add("/merge_lora", training.merge_lora, MergeBody)
    add("/save_weights", training.save_weights, SaveNamedBody)
    add("/save_weights_for_sampler", training.save_weights_for_sampler, SaveNamedBody)
    add("/load_weights", training.load_weights, LoadNamedBody)
    adapter_sampling.add_routes(routes, services)
    _add_lists(routes, services)
    return routes


def _add_lists(routes: APIRouter, services: Services) -> None:
    @routes.get("/adapters")
    async def adapters(request: Request, limit: Limit = 1000) -> dict[str, Any]:
        """The caller's adapters in training, newest first."""
        found = await services.adapters.page(owner_of(request), limit)
        return {"adapters": [await _described(services, model) for model in found]}

    @routes.delete("/adapters/{model_id:path}")
    async def remove_adapter(request: Request, model_id: str) -> dict[str, str]:
        """An adapter is given up, after all that was asked of it."""
        await services.adapters.remove(owner_of(request), model_id)
        return {"status": "deleted", "model_id": model_id}

    @routes.get("/loss_functions")
    async def loss_functions() -> dict[str, Any]:
        """The losses that there are."""
        return {"available_loss_functions": list(LOSSES), "descriptions": LOSSES}

    @routes.get("/get_server_capabilities")
    async def capabilities() -> dict[str, Any]:
        """The models that adapters can be trained on."""
        models = [
            {"model_id": each.name, "model_name": each.name, "arch": each.config.architecture if each.config else None}
            for each in await services.catalogue.all()
        ]
        return {"supported_models": models}


async def _described(services: Services, model: TrainingModel) -> dict[str, Any]:
    served = await services.post_training.models.served(model)
    config = None if served is None else served.config
    return {
        "model_id": name_of(model),
        "base_model": model.served_model,
        "rank": model.rank,
        "trainable_params": None if config is None else adapter_values(config, model.rank),
        "has_gradients": await services.adapters.has_gradient(model),
        "created_at": iso_time(model.created),
        "tinker_id": model.id,
    }


def told(found: Outcome, kind: str, name: str | None) -> Response:
    """What became of an operation, as JSON: what has failed is an error."""
    if found.is_protobuf:
        return encoded(_loss(found.body, name) if kind == "forward_backward" else {"model_id": name})
    answer = msgspec.json.decode(found.body)
    if "error" in answer:
        return encoded({"detail": answer["error"]}, 400 if answer["category"] == "user" else 500)
    del answer["type"]
    if kind == "optim_step":
        answer["metrics"]["step_completed"] = 1.0
    if kind == "unload_model":
        answer["status"] = "deleted"
    return encoded({**answer, "model_id": name})


def _loss(body: bytes, name: str | None) -> dict[str, Any]:
    """The mean over data of losses that are sums over tokens, and each token's log-probability."""
    logprobs, metrics = decode_outputs(body)
    return {
        "loss": metrics["loss:sum"] / len(logprobs),
        "num_samples": len(logprobs),
        "model_id": name,
        "metrics": metrics | {"num_tokens": sum(each.size for each in logprobs)},
        "loss_fn_outputs": [{"logprobs": each.tolist()} for each in logprobs],
    }
