"""How Tinker's API answers: promises, what became of them, plain JSON; knows no operation.

A result goes out as it is kept, so that it is the same bytes however often it is asked for.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from smelt.api.openai_desk import DirectRoute, json_response
from smelt.api.openai_parsing import schema_of
from smelt.api.streaming import ClientLeft, NoAnswer
from smelt.api.tinker_types import TinkerBody
from smelt.control.abuse_checker import AbuseChecker
from smelt.control.bans import NO_KEY, Subject
from smelt.control.promises import Outcome
from smelt.transport.addresses import is_loopback

PROTOBUF = "application/x-protobuf"

LARGE_BODY = 2**18  # bytes

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


def encoded(value: Any, status: int = 200) -> Response:
    """A value as JSON."""
    return json_response(msgspec.json.encode(value), status)


def promise(request_id: str, **more: Any) -> Response:
    """The id to ask with."""
    return encoded({"request_id": request_id, **more})


def result(found: Outcome) -> Response:
    """What became of a promise."""
    return Response(found.body, media_type=PROTOBUF) if found.is_protobuf else json_response(found.body)


def not_yet(request_id: str, has_workers: bool) -> Response:
    """Nothing so far. With this status a client asks again at once, and says nothing to its user."""
    answer = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
    if not has_workers:
        answer |= {"queue_state": "paused_capacity", "queue_state_reason": "no worker is connected"}
    return encoded(answer, 408)


def owner_of(request: Request) -> str:
    """Who asks."""
    return str(request.state.caller.owner)


def texts(metadata: dict[str, Any] | None) -> dict[str, str] | None:
    """A user's metadata as clients read it: texts, though they may send anything."""
    if metadata is None:
        return None
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}


def iso_time(seconds: float) -> str:
    """Seconds since 1970 as clients read them."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def is_near(request: Request) -> bool:
    """Whether the client is on this machine."""
    return request.client is not None and is_loopback(request.client.host)


def add_direct(
    routes: APIRouter, checker: AbuseChecker, path: str, handler: Handler, body_class: type[TinkerBody] | None
) -> None:
    """A POST whose handler reads the request itself: JSON of a class, or protobuf. Banned keys get no answer."""

    async def answer(request: Request) -> Response:
        caller = request.state.caller
        await checker.check_subject(Subject(caller.owner, caller.key_id or NO_KEY, ""))
        try:
            return await handler(request)
        except ClientLeft:
            return NoAnswer()

    if body_class is None:
        content: dict[str, Any] = {PROTOBUF: {"schema": {"type": "string", "format": "binary"}}}
    else:
        content = {"application/json": {"schema": schema_of(body_class)}}
    routes.add_api_route(
        path,
        answer,
        methods=["POST"],
        name=handler.__name__,
        summary=handler.__doc__,
        openapi_extra={"requestBody": {"required": True, "content": content}},
        route_class_override=DirectRoute,
    )


async def aside(body: bytes, understand: Callable[..., T], *arguments: object) -> T:
    """Understand a body here where it is small, on a thread where that would hold others up."""
    if len(body) <= LARGE_BODY:
        return understand(*arguments)
    return await asyncio.to_thread(understand, *arguments)
