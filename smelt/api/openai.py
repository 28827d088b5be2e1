"""OpenAI's API: completions, chats and embeddings; computes nothing, renders no template."""

import time
import uuid
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from smelt.api.openai_answers import CHAT, TEXT, Head, Shapes
from smelt.api.openai_chat_types import ChatBody
from smelt.api.openai_desk import Call, Desk, DirectRoute
from smelt.api.openai_embeddings import add_embeddings
from smelt.api.openai_parsing import parse, schema_of
from smelt.api.openai_types import ALTERNATIVES, CompletionBody, SamplingBody, check_supported
from smelt.api.services import Services
from smelt.api.streaming import json_body
from smelt.control.catalogue import Catalogue, Served
from smelt.control.keys import Caller
from smelt.transport.messages import Generate

MAX_BODY_BYTES = 2**23  # the longest prompt, with every character escaped
MAX_WAIT_S = 60.0

Wait = Annotated[float, Query(ge=0, le=MAX_WAIT_S, allow_inf_nan=False, description="seconds to wait for its end")]


def router(services: Services) -> APIRouter:
    """The routes below /v1 that OpenAI's clients know, and those that fetch an answer later."""
    routes = APIRouter(prefix="/v1", tags=["openai"])
    catalogue = services.catalogue
    completions = services.completions
    # Routes are tried one after the other, so what is asked most comes first.
    add_writing(routes, "/completions", TEXT, CompletionBody, Desk(completions, partial(_text_call, catalogue)))
    add_writing(routes, "/chat/completions", CHAT, ChatBody, Desk(completions, partial(_chat_call, catalogue)))
    add_embeddings(routes, catalogue, services.model_server, services.abuse_checker)
    return routes


def add_writing(routes: APIRouter, path: str, shapes: Shapes, body_class: type[SamplingBody], desk: Desk) -> None:
    """The routes that write, fetch and cancel, for one of the two APIs."""
    what = "text" if shapes is TEXT else "turn of a chat"

    async def create(request: Request) -> Response:
        return await desk.create(request)

    async def fetch(request: Request, answer_id: str, wait: Wait = 0.0) -> Response:
        return await desk.fetch(request, shapes, answer_id, wait)

    async def cancel(request: Request, answer_id: str) -> Response:
        return await desk.cancel(request, shapes, answer_id)

    key = {"name": "Idempotency-Key", "in": "header", "required": False, "schema": {"type": "string"}}
    takes = {"required": True, "content": {"application/json": {"schema": schema_of(body_class)}}}
    routes.add_api_route(
        path,
        create,
        methods=["POST"],
        summary=f"Write a {what}; in the background where the body says so",
        responses={200: {"model": shapes.whole}, 202: {"model": shapes.promised}},
        openapi_extra={"parameters": [key], "requestBody": takes},
        route_class_override=DirectRoute,
    )
    for method, answer, verb in (("GET", fetch, "Fetch"), ("DELETE", cancel, "Cancel")):
        routes.add_api_route(
            f"{path}/{{answer_id}}",
            answer,
            methods=[method],
            summary=f"{verb} a {what} in the background",
            responses={200: {"model": shapes.promised}},
        )


async def _text_call(catalogue: Catalogue, request: Request) -> Call:
    body = parse(CompletionBody, await json_body(request, MAX_BODY_BYTES), ALTERNATIVES)
    return await text_call(catalogue, body, request.state.caller)


async def _chat_call(catalogue: Catalogue, request: Request) -> Call:
    body = parse(ChatBody, await json_body(request, MAX_BODY_BYTES), ALTERNATIVES)
    return await chat_call(catalogue, body, request.state.caller)


async def text_call(catalogue: Catalogue, body: CompletionBody, caller: Caller) -> Call:
    """Understand a request to go on from texts. InvalidInput, UnknownModel."""
    check_supported(body)
    params = body.params()
    served = await catalogue.find(body.model)
    head = _head(TEXT, served, body)
    requests = [
        Generate(
            f"{head.id}-{index}",
            caller.owner,
            served.loaded,
            prompt=prompt,
            params=params,
            num_samples=body.num_samples,
            best_of=body.num_written,
            echo=bool(body.echo),
            adapter=served.adapter,
            key_id=caller.key_id or "",
            user=body.user or "",
        )
        for index, prompt in enumerate(body.prompts())
    ]
    return Call(head, body, requests)


async def chat_call(catalogue: Catalogue, body: ChatBody, caller: Caller) -> Call:
    """Understand a request to write the next turn. InvalidInput, UnknownModel."""
    check_supported(body)
    turns, tools = body.turns(), body.definitions()
    served = await catalogue.find(body.model)
    head, params = _head(CHAT, served, body), body.params(served.context)
    request = Generate(
        head.id,
        caller.owner,
        served.loaded,
        messages=turns,
        params=params,
        tools=tools,
        must_call=body.must_call,
        num_samples=body.num_samples,
        best_of=body.num_samples,
        adapter=served.adapter,
        key_id=caller.key_id or "",
        user=body.user or "",
    )
    return Call(head, body, [request])


def _head(shapes: Shapes, served: Served, body: SamplingBody) -> Head:
    answer_id = shapes.prefix + uuid.uuid4().hex
    has_logprobs = body.num_logprobs is not None
    return Head(shapes, answer_id, int(time.time()), served.name, body.num_samples, has_logprobs)
