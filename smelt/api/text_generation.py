"""POST /api/generate, as an earlier server had it: one text, which begins with its prompt; `success` in each answer."""

from dataclasses import dataclass
from functools import partial

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from smelt.api.openai import MAX_BODY_BYTES, text_call
from smelt.api.openai_answers import encode
from smelt.api.openai_desk import Call, Desk, DirectRoute, json_response
from smelt.api.openai_parsing import object_of, parse, schema_of, unsupported
from smelt.api.openai_types import ALTERNATIVES, CompletionBody
from smelt.api.services import Services
from smelt.api.streaming import ClientLeft, NoAnswer, json_body
from smelt.control.catalogue import Catalogue
from smelt.errors import InvalidInput
from smelt.models.aliases import DEFAULT

DEFAULTS = {"model": DEFAULT, "prompt": "", "max_tokens": 100, "temperature": 0.8, "top_k": 200}
# Of /v1/completions: what has no place in an answer that is one text.
REFUSED = ("n", "best_of", "echo", "logprobs", "stream", "stream_options", "background")


@dataclass(frozen=True, slots=True)
class Generated:
    """The prompt and what the model wrote after it."""

    text: str
    success: bool = True


def router(services: Services) -> APIRouter:
    """The one route."""
    routes = APIRouter(prefix="/api", tags=["other shapes"])
    desk = Desk(services.completions, partial(_call, services.catalogue))

    async def generate(request: Request) -> Response:
        try:
            (completion,) = await desk.write(request)
        except ClientLeft:
            return NoAnswer()
        return json_response(encode(Generated(completion.text)))

    routes.add_api_route(
        "/generate",
        generate,
        methods=["POST"],
        summary="Go on from a prompt",
        responses={200: {"model": Generated}},
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema_of(CompletionBody)}}}
        },
        route_class_override=DirectRoute,
    )
    return routes


async def _call(catalogue: Catalogue, request: Request) -> Call:
    given = object_of(await json_body(request, MAX_BODY_BYTES))
    for name in REFUSED:
        if name in given:
            raise unsupported(name)
    if not isinstance(given.get("prompt", ""), str):
        raise InvalidInput("prompt should be a text", "prompt")
    body = parse(CompletionBody, msgspec.json.encode({**DEFAULTS, **given, "echo": True}), ALTERNATIVES)
    return await text_call(catalogue, body, request.state.caller)
