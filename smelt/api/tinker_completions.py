"""OpenAI's completions and chats where Tinker's users look for them, also of weights that sessions have saved.

A model is a base model's name, tinker://MODEL_ID/sampler_weights/NAME, or NAME;tinker://... Computes nothing.
"""

from functools import partial

import msgspec
from fastapi import APIRouter
from starlette.requests import Request

from smelt.api.openai import MAX_BODY_BYTES, add_writing, chat_call, text_call
from smelt.api.openai_answers import CHAT, TEXT
from smelt.api.openai_chat_types import ChatBody
from smelt.api.openai_desk import Call, Desk
from smelt.api.openai_parsing import parse
from smelt.api.openai_types import ALTERNATIVES, CompletionBody
from smelt.api.services import Services
from smelt.api.streaming import json_body
from smelt.control.saved_weights import SCHEME, Found
from smelt.errors import InvalidInput

PREFIX = "/oai/api/v1"


def router(services: Services) -> APIRouter:
    """The two APIs."""
    routes = APIRouter(prefix=PREFIX, tags=["tinker"])
    texts, chats = (Desk(services.completions, partial(call, services)) for call in (_text_call, _chat_call))
    add_writing(routes, "/completions", TEXT, CompletionBody, texts)
    add_writing(routes, "/chat/completions", CHAT, ChatBody, chats)
    return routes


async def _text_call(services: Services, request: Request) -> Call:
    body = parse(CompletionBody, await json_body(request, MAX_BODY_BYTES), ALTERNATIVES)
    caller, found = request.state.caller, await _weights(services, body.model, request)
    named = body.model_copy(update={"model": _base_model(body.model, found)})
    return _with_weights(await text_call(services.catalogue, named, caller), found)


async def _chat_call(services: Services, request: Request) -> Call:
    body = parse(ChatBody, await json_body(request, MAX_BODY_BYTES), ALTERNATIVES)
    caller, found = request.state.caller, await _weights(services, body.model, request)
    named = body.model_copy(update={"model": _base_model(body.model, found)})
    return _with_weights(await chat_call(services.catalogue, named, caller), found)


async def _weights(services: Services, model: str, request: Request) -> Found | None:
    """The weights that a model's name means, if any. NotFound, InvalidInput."""
    base, _, path = model.rpartition(";")
    if not path.startswith(SCHEME):
        return None
    found = await services.post_training.weights.find_saved(request.state.caller.owner, path)
    if found.weights.type == "weights":
        raise InvalidInput(f"{path} is for training; sample from what save_weights_for_sampler saved", "model")
    if base and (await services.catalogue.find(base)).name != found.model.served_model:
        raise InvalidInput(f"{path} was trained on {found.model.base_model}, not on {base}", "model")
    return found


def _base_model(name: str, found: Found | None) -> str:
    return name if found is None else found.model.served_model


def _with_weights(call: Call, found: Found | None) -> Call:
    if found is None:
        return call
    # Where all weights were trained they are a model of their own, else an adapter of the base model.
    own = {"adapter" if found.model.rank else "model": found.weights.folder}
    requests = [msgspec.structs.replace(each, **own) for each in call.requests]
    return Call(call.head, call.body, requests)
