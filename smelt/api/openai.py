"""OpenAI's API: models, completions and chats, live, streamed or promised for later; computes nothing.

A live answer ends when its client leaves. One that breaks off half-way says so: a stream then ends with an error and
without [DONE].
"""

import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from smelt.api.metering import metered
from smelt.api.openai_answers import (
    CHAT,
    TEXT,
    ModelCard,
    ModelList,
    Shapes,
    Story,
    error_event,
    promised,
    usage_of,
    whole,
)
from smelt.api.openai_types import (
    ChatBody,
    CompletionBody,
    SamplingBody,
    chat_tokens,
    check_messages,
    check_prompts,
    check_supported,
    completion_tokens,
    parse,
    schema_of,
)
from smelt.api.services import Services
from smelt.api.streaming import ClientLeft, EventStream, NoAnswer, Presence, json_body
from smelt.control.catalogue import Catalogue, Served
from smelt.control.completions import Completions, Pieces, Promise, gathered
from smelt.errors import NotFound
from smelt.transport.messages import Completion, Generate, TextChunk

MAX_BODY_BYTES = 2**23  # the longest prompt, with every character escaped
MAX_WAIT_S = 60.0
IDEMPOTENCY_KEY = "idempotency-key"

Wait = Annotated[float, Query(ge=0, le=MAX_WAIT_S, allow_inf_nan=False, description="seconds to wait for its end")]


@dataclass(frozen=True, slots=True)
class Call:
    """A request to write something, understood and checked."""

    shapes: Shapes
    id: str
    created: int
    model: str
    body: SamplingBody
    requests: list[Generate]


def router(services: Services) -> APIRouter:
    """The routes below /v1 that OpenAI's clients know, and those that fetch an answer later."""
    routes = APIRouter(prefix="/v1", tags=["openai"])
    catalogue = Catalogue(services.settings.models, services.default_model)
    completions = Completions(services.model_server, services.ledger)
    # Routes are tried one after the other, so what is asked most comes first.
    _add_writing(routes, "/completions", TEXT, CompletionBody, Desk(completions, partial(text_call, catalogue)))
    _add_writing(routes, "/chat/completions", CHAT, ChatBody, Desk(completions, partial(chat_call, catalogue)))
    _add_models(routes, catalogue)
    return routes


class DirectRoute(APIRoute):
    """A route whose handler reads its request itself: FastAPI's ways to do that cost as much as all the rest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler as it is."""
        return self.endpoint


def _add_models(routes: APIRouter, catalogue: Catalogue) -> None:
    @routes.get("/models")
    async def list_models() -> ModelList:
        """The models that may be asked."""
        return ModelList([_card(served) for served in await catalogue.all()])

    @routes.get("/models/{model}")
    async def show_model(model: str) -> ModelCard:
        """One of them."""
        return _card(await catalogue.find(model))


def _add_writing(routes: APIRouter, path: str, shapes: Shapes, body_class: type[SamplingBody], desk: "Desk") -> None:
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


class Desk:
    """Takes requests of one API, and answers them. `understand` makes a Call of a body."""

    def __init__(self, completions: Completions, understand: Callable[[bytes, str], Awaitable[Call]]) -> None:
        self._completions = completions
        self._understand = understand

    async def create(self, request: Request) -> Response:
        """Write now, or promise to."""
        try:
            raw = await json_body(request.receive, _content_type(request), MAX_BODY_BYTES)
            call = await self._understand(raw, request.state.caller.owner)
            if call.body.background:
                return await self._promise(call, request.headers.get(IDEMPOTENCY_KEY))
            pieces = metered(call.model, self._completions.answers(call.requests))
            if call.body.stream:
                return EventStream(events(call, pieces), partial(error_event, request_id=_request_id(request)))
            async with aclosing(pieces), Presence(request.receive):
                written = await gathered(pieces, len(call.requests))
        except ClientLeft:
            return NoAnswer()
        return _json(whole(call.shapes, call.id, call.created, call.model, written))

    async def _promise(self, call: Call, key: str | None) -> Response:
        request = call.requests[0]
        meant = call.shapes.prefix + call.body.model_dump_json()
        fingerprint = sha256(meant.encode()).hexdigest()
        future_id = await self._completions.promise(request, fingerprint, key)
        promise = Promise(future_id, call.created, "queued", call.model)
        if key is not None:  # it may be an old acquaintance
            promise = await self._completions.read(request.owner, future_id)
        return _json(promised(call.shapes, promise), 202)

    async def fetch(self, request: Request, shapes: Shapes, answer_id: str, wait_s: float) -> Response:
        """How a promised answer stands, after so long a wait at most. Whoever hangs up waits no longer."""
        owner, future_id = request.state.caller.owner, _future_id(shapes, answer_id)
        promise = await self._completions.read(owner, future_id)
        _check_shapes(shapes, promise, answer_id)
        if wait_s > 0 and promise.status in ("queued", "in_progress"):
            try:
                async with Presence(request.receive):
                    promise = await self._completions.read(owner, future_id, wait_s)
            except ClientLeft:
                pass  # also when the server goes down: then it still hears how things stand
        return _json(promised(shapes, promise))

    async def cancel(self, request: Request, shapes: Shapes, answer_id: str) -> Response:
        """Give a promised answer up."""
        owner, future_id = request.state.caller.owner, _future_id(shapes, answer_id)
        _check_shapes(shapes, await self._completions.read(owner, future_id), answer_id)
        return _json(promised(shapes, await self._completions.cancel(owner, future_id)))


async def text_call(catalogue: Catalogue, raw: bytes, owner: str) -> Call:
    """Understand a request to go on from texts."""
    body = parse(CompletionBody, raw)
    check_supported(body)
    prompts = body.prompts()
    check_prompts(prompts, bool(body.background))
    served = await catalogue.find(body.model)
    params = body.sampling(completion_tokens(body))
    answer_id = _new_id(TEXT)
    requests = [
        Generate(f"{answer_id}-{index}", owner, served.name, prompt=prompt, params=params)
        for index, prompt in enumerate(prompts)
    ]
    return Call(TEXT, answer_id, int(time.time()), served.name, body, requests)


async def chat_call(catalogue: Catalogue, raw: bytes, owner: str) -> Call:
    """Understand a request to write the next turn."""
    body = parse(ChatBody, raw)
    check_supported(body)
    check_messages(body.messages)
    served = await catalogue.find(body.model)
    params = body.sampling(chat_tokens(body, served.context))
    turns = tuple(message.turn() for message in body.messages)
    answer_id = _new_id(CHAT)
    request = Generate(answer_id, owner, served.name, messages=turns, params=params)
    return Call(CHAT, answer_id, int(time.time()), served.name, body, [request])


async def events(call: Call, pieces: Pieces) -> AsyncGenerator[bytes, None]:
    """An answer as server-sent events; those that come together are one."""
    story = Story(call.shapes, call.id, call.created, call.model, call.body.include_usage)
    ended: list[Completion] = []
    async with aclosing(pieces):
        async for index, piece in pieces:
            if isinstance(piece, TextChunk):
                event = story.piece(index, piece.text)
            else:
                event = story.ending(index, piece.reason)
                ended.append(Completion("", piece.reason, piece.num_prompt_tokens, piece.num_output_tokens))
                if len(ended) == len(call.requests):
                    event += story.end(usage_of(ended))
            if event:
                yield event


def _card(served: Served) -> ModelCard:
    return ModelCard(served.name, served.created)


def _new_id(shapes: Shapes) -> str:
    return shapes.prefix + uuid.uuid4().hex


def _future_id(shapes: Shapes, answer_id: str) -> str:
    """The ledger's id behind ours."""
    if not answer_id.startswith(shapes.prefix):
        raise _no_answer(answer_id)
    return answer_id.removeprefix(shapes.prefix)


def _check_shapes(shapes: Shapes, promise: Promise, answer_id: str) -> None:
    """NotFound where the answer is one of the other API's."""
    if promise.is_chat not in (None, shapes is CHAT):
        raise _no_answer(answer_id)


def _no_answer(answer_id: str) -> NotFound:
    return NotFound(f"there is no answer {answer_id[:80]!r} in the background")


def _content_type(request: Request) -> bytes:
    return next((value for name, value in request.scope["headers"] if name == b"content-type"), b"")


def _request_id(request: Request) -> str:
    return str(request.scope["state"].get("request_id", ""))


def _json(body: bytes, status: int = 200) -> Response:
    return Response(body, status, media_type="application/json")
