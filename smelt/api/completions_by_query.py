"""POST /completions, as an earlier server had it: parameters in the query or as JSON, the prompt before each answer.

Everything else is as in /v1/completions, bounds and refusals too; only the defaults are others.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from smelt.api.openai import MAX_BODY_BYTES, text_call
from smelt.api.openai_answers import TEXT
from smelt.api.openai_desk import Call, Desk, DirectRoute
from smelt.api.openai_parsing import object_of, parse
from smelt.api.openai_types import ALTERNATIVES, CompletionBody
from smelt.api.services import Services
from smelt.api.streaming import check_json, whole_body
from smelt.control.catalogue import Catalogue
from smelt.errors import InvalidInput

DEFAULTS = {
    "prompt": "\n",
    "max_tokens": 500,
    "n": 10,
    "temperature": 0.8,
    "top_k": 200,
    "seed": 1337,
    "echo": True,
}
TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _texts(text: str) -> list[str]:
    return text.split(",")


# parameter -> (how its text is read, what it should be)
QUERY: dict[str, tuple[Callable[[str], Any], str]] = {
    **dict.fromkeys(("model", "prompt", "suffix", "user"), (str, "a text")),
    **dict.fromkeys(("max_tokens", "n", "best_of", "logprobs", "top_k", "seed"), (int, "a whole number")),
    **dict.fromkeys(("temperature", "top_p", "min_p"), (_finite, "a number")),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), (_finite, "a number")),
    **dict.fromkeys(("echo", "stream", "background"), (TRUTHS.__getitem__, "true or false")),
    "stop": (_texts, "texts with commas between them"),
    "logit_bias": (msgspec.json.decode, 'JSON such as {"50256": -100}'),
}


def router(services: Services) -> APIRouter:
    """The one route."""
    routes = APIRouter(tags=["other shapes"])
    desk = Desk(services.completions, partial(_call, services.catalogue))

    async def create(request: Request) -> Response:
        return await desk.create(request)

    parameters = [
        {"name": name, "in": "query", "schema": {"type": "string"}, "description": QUERY[name][1]} for name in QUERY
    ]
    routes.add_api_route(
        "/completions",
        create,
        methods=["POST"],
        summary="Write texts, by parameters in the query or as JSON",
        responses={200: {"model": TEXT.whole}},
        openapi_extra={"parameters": parameters},
        route_class_override=DirectRoute,
    )
    return routes


async def _call(catalogue: Catalogue, request: Request) -> Call:
    raw = await whole_body(request.receive, MAX_BODY_BYTES)
    given: dict[str, Any] = {}
    if raw:
        check_json(request)
        given = object_of(raw)
    for name, value in _of_query(request).items():
        if name in given:
            raise InvalidInput(f"{name} is in the query and in the body; give it once", name)
        given[name] = value
    body = parse(CompletionBody, msgspec.json.encode({**DEFAULTS, **given}), ALTERNATIVES)
    return await text_call(catalogue, body, request.state.caller)


def _of_query(request: Request) -> dict[str, Any]:
    """The parameters of the query as the values that they stand for."""
    given: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        if name in given:
            raise InvalidInput(f"{name} is in the query twice; give it once", name)
        given[name] = _value(name, text)
    return given


def _value(name: str, text: str) -> Any:
    if name not in QUERY:
        raise InvalidInput(f"unknown parameter {name[:60]}; leave it out", name[:60])
    read, what = QUERY[name]
    try:
        return read(text)
    except (ValueError, KeyError, RecursionError):
        raise InvalidInput(f"{name} should be {what}", name) from None
