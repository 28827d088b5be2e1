"""The desk of an API that writes: takes requests, writes now or promises to, fetches and cancels; knows no field.

A live answer ends when its client leaves. One that breaks off half-way says so: a stream then ends with an error and
without [DONE].
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from smelt.api.metering import metered
from smelt.api.openai_answers import CHAT, Head, Shapes, Story, error_event, promised, whole
from smelt.api.openai_types import SamplingBody
from smelt.api.streaming import ClientLeft, EventStream, NoAnswer, Presence
from smelt.control.completions import Completions, Pieces, Promise, gathered
from smelt.errors import NotFound
from smelt.transport.messages import Completion, Generate, TextChunk

IDEMPOTENCY_KEY = "idempotency-key"


@dataclass(frozen=True, slots=True)
class Call:
    """A request to write something, understood and checked."""

    head: Head
    body: SamplingBody
    requests: list[Generate]

    @property
    def num_choices(self) -> int:
        """Answers to all its prompts."""
        return len(self.requests) * self.head.num_samples


class DirectRoute(APIRoute):
    """A route whose handler reads its request itself: FastAPI's ways to do that cost as much as all the rest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler as it is."""
        return self.endpoint


class Desk:
    """Takes requests of one API, and answers them. `understand` makes a Call of a request."""

    def __init__(self, completions: Completions, understand: Callable[[Request], Awaitable[Call]]) -> None:
        self._completions = completions
        self._understand = understand

    async def create(self, request: Request) -> Response:
        """Write now, or promise to."""
        try:
            call = await self._understood(request)
            if call.body.background:
                return await self._promise(call, request.headers.get(IDEMPOTENCY_KEY))
            if call.body.stream:
                words = partial(error_event, request_id=_request_id(request))
                return EventStream(events(call, self._pieces(call)), words)
            completions = await self._written(call, request)
        except ClientLeft:
            return NoAnswer()
        return json_response(whole(call.head, completions))

    async def write(self, request: Request) -> list[Completion]:
        """The answers, for whoever has shapes of his own. ClientLeft."""
        return await self._written(await self._understood(request), request)

    async def _understood(self, request: Request) -> Call:
        """What is asked for, by somebody who may. Banned, BannedPrompt."""
        call = await self._understand(request)
        await self._completions.check(call.requests)
        return call

    async def _written(self, call: Call, request: Request) -> list[Completion]:
        pieces = self._pieces(call)
        async with aclosing(pieces), Presence(request.receive):
            return await gathered(pieces, call.num_choices)

    def _pieces(self, call: Call) -> Pieces:
        return metered(call.head.model, self._completions.answers(call.requests))

    async def _promise(self, call: Call, key: str | None) -> Response:
        request, head = call.requests[0], call.head
        meant = head.shapes.prefix + call.body.model_dump_json()
        fingerprint = sha256(meant.encode()).hexdigest()
        future_id = await self._completions.promise(request, fingerprint, key)
        promise = Promise(future_id, head.created, "queued", head.model)
        if key is not None:  # it may be an old acquaintance
            promise = await self._completions.read(request.owner, future_id)
        return json_response(promised(head.shapes, promise), 202)

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
        return json_response(promised(shapes, promise))

    async def cancel(self, request: Request, shapes: Shapes, answer_id: str) -> Response:
        """Give a promised answer up."""
        owner, future_id = request.state.caller.owner, _future_id(shapes, answer_id)
        _check_shapes(shapes, await self._completions.read(owner, future_id), answer_id)
        return json_response(promised(shapes, await self._completions.cancel(owner, future_id)))


async def events(call: Call, pieces: Pieces) -> AsyncGenerator[bytes, None]:
    """An answer as server-sent events; those that come together are one."""
    story = Story(call.head, call.body.include_usage)
    num_left = call.num_choices
    async with aclosing(pieces):
        async for index, piece in pieces:
            if isinstance(piece, TextChunk):
                event = story.piece(index, piece)
            else:
                event = story.ending(index, piece)
                num_left -= 1
                if num_left == 0:
                    event += story.end()
            if event:
                yield event


def json_response(body: bytes, status: int = 200) -> Response:
    """JSON that is written already."""
    return Response(body, status, media_type="application/json")


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


def _request_id(request: Request) -> str:
    return str(request.scope["state"].get("request_id", ""))
