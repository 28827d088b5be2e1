"""OpenAI's embeddings: texts as vectors, in numbers or in base64; computes nothing."""

import base64
import struct
import uuid
from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from smelt.api import telemetry
from smelt.api.openai_answers import encode
from smelt.api.openai_desk import DirectRoute, json_response
from smelt.api.openai_parsing import check_neutral, parse, schema_of
from smelt.api.openai_types import ALTERNATIVES, EmbeddingBody, check_prompts
from smelt.api.streaming import ClientLeft, NoAnswer, Presence, json_body
from smelt.control.abuse_checker import AbuseChecker
from smelt.control.bans import NO_KEY, Subject
from smelt.control.catalogue import Catalogue
from smelt.control.keys import Caller
from smelt.control.model_server import ModelServer
from smelt.errors import InvalidInput
from smelt.transport.messages import Embed, Embedded, Finish

MAX_BODY_BYTES = 2**23


@dataclass(frozen=True, slots=True)
class EmbeddingUsage:
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Embedding:
    """One input as a vector: numbers, or base64 of them as little-endian fp32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


@dataclass(frozen=True, slots=True)
class EmbeddingList:
    """A vector for each input."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


def add_embeddings(routes: APIRouter, catalogue: Catalogue, model_server: ModelServer, checker: AbuseChecker) -> None:
    """The route that embeds."""

    async def create(request: Request) -> Response:
        try:
            body = await json_body(request, MAX_BODY_BYTES)
            async with Presence(request.receive):
                return json_response(await embeddings_of(body, request.state.caller, catalogue, model_server, checker))
        except ClientLeft:
            return NoAnswer()

    routes.add_api_route(
        "/embeddings",
        create,
        methods=["POST"],
        summary="Turn texts into vectors",
        responses={200: {"model": EmbeddingList}},
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema_of(EmbeddingBody)}}}
        },
        route_class_override=DirectRoute,
    )


async def embeddings_of(
    raw: bytes,
    caller: Caller,
    catalogue: Catalogue,
    model_server: ModelServer,
    checker: AbuseChecker,
    *,
    is_live: bool = True,
) -> bytes:
    """The answer to a body. InvalidInput, UnknownModel, Banned, and what `ModelServer.embed` raises."""
    body = parse(EmbeddingBody, raw, ALTERNATIVES)
    asked = await _understood(body, catalogue, caller.owner, is_live)
    await checker.check_subject(Subject(caller.owner, caller.key_id or NO_KEY, body.user or ""))
    embedded, finish = await model_server.embed(asked)
    telemetry.count_answer(asked.model, "embedded", finish.num_prompt_tokens)
    return _answer(body, asked.model, embedded, finish)


async def _understood(body: EmbeddingBody, catalogue: Catalogue, owner: str, is_live: bool) -> Embed:
    check_neutral(body.model_extra, {})
    inputs = body.inputs()
    check_prompts(inputs, "input")
    if "" in inputs:
        raise InvalidInput("input has an empty text; there is nothing to embed", "input")
    served = await catalogue.find(body.model)
    return Embed(f"embd-{uuid.uuid4().hex}", owner, served.name, tuple(inputs), is_live)


def _answer(body: EmbeddingBody, model: str, embedded: Embedded, finish: Finish) -> bytes:
    """InvalidInput where other dimensions were asked for than the model has: only now are they known."""
    width = embedded.width
    if body.dimensions not in (None, width):
        raise InvalidInput(f"dimensions: this model's vectors have {width}; leave it out", "dimensions")
    size = 4 * width
    vectors = [embedded.vectors[start : start + size] for start in range(0, len(embedded.vectors), size)]
    data = [Embedding(index, _told(vector, body.encoding_format)) for index, vector in enumerate(vectors)]
    num_tokens = finish.num_prompt_tokens
    return encode(EmbeddingList(data, model, EmbeddingUsage(num_tokens, num_tokens)))


def _told(vector: bytes, encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector).decode()
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))
