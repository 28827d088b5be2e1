"""OpenAI's batches: asked for, followed, cancelled; and how a request of one is answered: as its endpoint would."""

import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request
from pydantic import Field

from smelt.api.failures import openai_error, status_of
from smelt.api.metering import metered
from smelt.api.openai import MAX_BODY_BYTES, chat_call, text_call
from smelt.api.openai_answers import encode, whole
from smelt.api.openai_chat_types import ChatBody
from smelt.api.openai_desk import IDEMPOTENCY_KEY, Call
from smelt.api.openai_embeddings import embeddings_of
from smelt.api.openai_files import Expiry
from smelt.api.openai_lists import Listing, Metadata, listing
from smelt.api.openai_parsing import Body, check_neutral, parse, schema_of
from smelt.api.openai_types import ALTERNATIVES, CompletionBody
from smelt.api.services import Services
from smelt.api.streaming import ClientLeft, NoAnswer, json_body
from smelt.control.batch_files import Outcome
from smelt.control.batch_lines import Answering, Line
from smelt.control.batches import BatchRequest
from smelt.control.completions import gathered
from smelt.control.keys import Caller
from smelt.errors import InvalidInput, SmeltError, Unavailable
from smelt.storage.records import BatchJob

DEFAULT_LISTED, MAX_LISTED = 20, 100
MAX_WINDOW_HOURS = 168

log = logging.getLogger(__name__)

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]


class BatchBody(Body):
    """A batch of requests, one in each line of a file."""

    input_file_id: str = Field(max_length=64, description="a file that was uploaded with the purpose `batch`")
    endpoint: Endpoint = Field(description="what all its requests ask")
    completion_window: str = Field(
        pattern=r"^[1-9][0-9]{0,2}h$", description=f"hours for all of it, such as 24h; {MAX_WINDOW_HOURS}h at most"
    )
    metadata: Metadata = Field(None, description="up to 16 texts of yours")
    output_expires_after: Expiry | None = Field(None, description="when its files are removed (after 30 days)")

    def asked(self) -> BatchRequest:
        """What is asked for. InvalidInput where its completion window is too long."""
        hours = int(self.completion_window[:-1])
        if hours > MAX_WINDOW_HOURS:
            raise InvalidInput(f"completion_window may be {MAX_WINDOW_HOURS}h at most", "completion_window")
        seconds = None if self.output_expires_after is None else float(self.output_expires_after.seconds)
        return BatchRequest(self.endpoint, self.input_file_id, hours * 3600.0, seconds, self.metadata)


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """How many requests a batch has, and how many of them have an answer."""

    total: int
    completed: int
    failed: int


@dataclass(frozen=True, slots=True)
class ErrorList:
    """What is wrong with a batch's file, line by line."""

    data: list[dict[str, Any]]
    object: Literal["list"] = "list"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchObject:
    """A batch, as OpenAI's clients know it. Times are seconds since 1970."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: ErrorList | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: dict[str, Any] | None
    metadata: dict[str, Any] | None


def router(services: Services) -> APIRouter:
    """The routes of batches."""
    routes = APIRouter(prefix="/v1", tags=["openai"])
    batches = services.batches
    takes = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema_of(BatchBody)}}}}

    @routes.post("/batches", response_model=BatchObject, openapi_extra=takes)
    async def create_batch(request: Request) -> BatchObject | NoAnswer:
        """Have the requests of a file answered. It is on the disk when this answers, and goes on over restarts."""
        try:
            body = parse(BatchBody, await json_body(request, MAX_BODY_BYTES), {})
        except ClientLeft:
            return NoAnswer()
        check_neutral(body.model_extra, {})
        caller, key = request.state.caller, request.headers.get(IDEMPOTENCY_KEY)
        return shown_batch(await batches.create(caller.owner, caller.key_id, body.asked(), key))

    @routes.get("/batches")
    async def list_batches(
        request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = DEFAULT_LISTED
    ) -> Listing[BatchObject]:
        """Your batches, newest first."""
        found = await batches.page(request.state.caller.owner, limit + 1, after)
        return listing(found, limit, shown_batch, lambda batch: batch.id)

    @routes.get("/batches/{batch_id}")
    async def show_batch(request: Request, batch_id: str) -> BatchObject:
        """One of them, and how many of its requests have an answer."""
        return shown_batch(await batches.read(request.state.caller.owner, batch_id))

    @routes.post("/batches/{batch_id}/cancel")
    async def cancel_batch(request: Request, batch_id: str) -> BatchObject:
        """Give up what has no answer yet. What has one is in the output file, once the status is `cancelled`."""
        return shown_batch(await batches.cancel(request.state.caller.owner, batch_id))

    return routes


def answering(services: Services) -> Answering:
    """How the requests of batches are answered."""
    endpoints: dict[str, Callable[[Line, Caller], Awaitable[bytes]]] = {
        "/v1/chat/completions": partial(_chat, services),
        "/v1/completions": partial(_text, services),
        "/v1/embeddings": partial(_embeddings, services),
    }

    async def answer(owner: str, line: Line) -> Outcome:
        caller = Caller(owner, line.key_id, frozenset({"inference"}))
        try:
            return Outcome(200, await endpoints[line.endpoint](line, caller))
        except Unavailable:
            raise
        except SmeltError as error:
            return refuse(error)
        except Exception as bug:
            log.exception("a request of a batch failed")
            return refuse(bug)

    return Answering(answer, refuse)


def refuse(error: Exception) -> Outcome:
    """An error as the answer to a request."""
    return Outcome(status_of(error), encode(openai_error(error)))


async def _text(services: Services, line: Line, caller: Caller) -> bytes:
    body = parse(CompletionBody, line.body, ALTERNATIVES)
    return await _written(services, await text_call(services.catalogue, body, caller))


async def _chat(services: Services, line: Line, caller: Caller) -> bytes:
    body = parse(ChatBody, line.body, ALTERNATIVES)
    return await _written(services, await chat_call(services.catalogue, body, caller))


async def _written(services: Services, call: Call) -> bytes:
    for name in ("stream", "background"):
        if getattr(call.body, name):
            raise InvalidInput(f"{name} is not for requests of a batch; leave it out", name)
    completions = services.completions
    requests = [msgspec.structs.replace(request, is_live=False) for request in call.requests]
    await completions.check(requests)
    async with aclosing(metered(call.head.model, completions.answers(requests))) as pieces:
        return whole(call.head, await gathered(pieces, call.num_choices))


async def _embeddings(services: Services, line: Line, caller: Caller) -> bytes:
    catalogue, model_server, checker = services.catalogue, services.model_server, services.abuse_checker
    return await embeddings_of(line.body, caller, catalogue, model_server, checker, is_live=False)


def shown_batch(batch: BatchJob) -> BatchObject:
    """A batch in OpenAI's words."""

    def time_of(status: str) -> int | None:
        return int(batch.times[status]) if status in batch.times else None

    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model,
        errors=ErrorList(batch.errors) if batch.errors else None,
        input_file_id=batch.input_file_id,
        completion_window=f"{round((batch.deadline - batch.created) / 3600)}h",
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=int(batch.created),
        in_progress_at=time_of("in_progress"),
        expires_at=int(batch.deadline),
        finalizing_at=time_of("finalizing"),
        completed_at=time_of("completed"),
        failed_at=time_of("failed"),
        expired_at=time_of("expired"),
        cancelling_at=time_of("cancelling"),
        cancelled_at=time_of("cancelled"),
        request_counts=RequestCounts(batch.num_requests, batch.num_completed, batch.num_failed),
        usage=batch.usage,
        metadata=batch.user_metadata,
    )
