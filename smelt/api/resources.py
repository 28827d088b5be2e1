"""The REST resources of smelt's own: runs and workers, as JSON and as streams of events; knows no files.

Streams are server-sent events. `id` is a cursor: a client that comes back with it (`Last-Event-ID`, or `?after=`)
gets what it missed.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import msgspec
import yaml
from fastapi import APIRouter, Body, Header, Query, Request, status
from fastapi.responses import StreamingResponse

from smelt.api.openai_parsing import object_of, schema_of
from smelt.api.services import Services
from smelt.api.streaming import ClientLeft, NoAnswer, json_body, whole_body
from smelt.control.model_server import WorkerInfo
from smelt.control.run_changes import RunFollowers
from smelt.control.run_metrics import Curves
from smelt.control.run_requests import NOT_ASKED, RunRequests
from smelt.control.runs import MAX_LOG_LINES, Checkpoint, Log, RunDetails, RunStatus
from smelt.errors import InvalidInput
from smelt.run_configs import RECIPE_CONFIGS, RECIPE_SECTIONS

# Proxies must hand events on as they come.
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

MAX_BODY_BYTES = 2**20
YAML = "application/yaml"
EXAMPLE = {"dataset": "shakespeare", "preset": "nano", "max_iters": 2000}
# What a run is asked for by. Its keys are checked by the recipe's own class, whose messages are the command line's too.
TAKES = {
    "required": True,
    "content": {
        "application/json": {"schema": {"type": "object", "example": EXAMPLE}},
        YAML: {"schema": {"type": "string"}},
    },
}
MaxIters = Annotated[int | None, Body(embed=True, ge=1, description="optimizer steps in all, in place of the config's")]


@dataclass(frozen=True, slots=True)
class RunList:
    """Runs, newest first."""

    data: list[RunStatus]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a config of `POST /v1/runs` may say, with its fields' names under their headings."""

    name: str
    sections: dict[str, list[str]]
    json_schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RecipeList:
    """All of them."""

    data: list[Recipe]


@dataclass(frozen=True, slots=True)
class CheckpointList:
    """Checkpoints, newest first."""

    data: list[Checkpoint]


@dataclass(frozen=True, slots=True)
class WorkerList:
    """The workers that are connected."""

    data: list[WorkerInfo]


def router(services: Services) -> APIRouter:
    """The routes of runs and workers."""
    requests = services.run_requests
    routes = APIRouter(prefix="/v1", tags=["runs"])
    _add_streams(routes, requests)
    _add_runs(routes, requests)
    _add_changes(routes, requests)

    @routes.get("/recipes")
    async def list_recipes() -> RecipeList:
        """What can be trained: the fields of each recipe's config, as JSON schema, under their headings."""
        return RecipeList([_recipe(name) for name in RECIPE_CONFIGS])

    @routes.get("/workers", tags=["workers"])
    async def list_workers() -> WorkerList:
        """Who computes answers now."""
        return WorkerList(services.model_server.workers)

    return routes


def _add_runs(routes: APIRouter, requests: RunRequests) -> None:
    @routes.get("/runs")
    async def list_runs(request: Request) -> RunList:
        """Every run, newest first."""
        return RunList(await requests.all(visible_to(request)))

    @routes.get("/runs/{run_id}")
    async def show_run(request: Request, run_id: str) -> RunDetails:
        """One run, its config, and the command that trains the same."""
        return await requests.show(run_id, visible_to(request))

    @routes.get("/runs/{run_id}/metrics")
    def read_metrics(request: Request, run_id: str) -> Curves:
        """The curves of train and validation loss, thinned to 2,000 points with every dip and peak kept."""
        return requests.runs.curves(run_id, visible_to(request))

    @routes.get("/runs/{run_id}/log")
    def read_log(request: Request, run_id: str, lines: Annotated[int, Query(ge=1, le=MAX_LOG_LINES)] = 200) -> Log:
        """The last lines of the run's log."""
        return requests.runs.log(run_id, lines, visible_to(request))

    @routes.get("/runs/{run_id}/checkpoints")
    def list_checkpoints(request: Request, run_id: str) -> CheckpointList:
        """What is kept of the run, newest first: each can be a model (`POST /v1/imports`) or be gone on from."""
        return CheckpointList(requests.runs.checkpoints(run_id, visible_to(request)))


def _add_changes(routes: APIRouter, requests: RunRequests) -> None:
    @routes.post(
        "/runs",
        status_code=status.HTTP_201_CREATED,
        response_model=RunDetails,
        openapi_extra={"requestBody": TAKES},
    )
    async def create_run(request: Request) -> Any:
        """Train by a config, as JSON or YAML: the keys of `smelt train --config`. It is queued, on the disk, then."""
        try:
            config = await _config(request)
        except ClientLeft:
            return NoAnswer()
        return await requests.create(config, request.state.caller.owner)

    @routes.post("/runs/{run_id}/resume")
    async def resume_run(request: Request, run_id: str, max_iters: MaxIters = None) -> RunStatus:
        """Have a run that was cancelled, has failed or was lost go on from its last checkpoint.

        With more `max_iters` one that has succeeded goes on too.
        """
        return await requests.resume(run_id, visible_to(request), max_iters)

    @routes.post("/runs/{run_id}/cancel")
    async def cancel_run(request: Request, run_id: str) -> RunStatus:
        """Take a queued run back, or have a running one stop after its step, with a checkpoint."""
        return await requests.cancel(run_id, visible_to(request))


async def _config(request: Request) -> dict[str, Any]:
    """The mapping in the body. InvalidInput where it is none, UnsupportedEncoding, TooLarge, ClientLeft."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != YAML:
        return object_of(await json_body(request, MAX_BODY_BYTES))
    try:
        values = yaml.safe_load(await whole_body(request.receive, MAX_BODY_BYTES))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the body is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise InvalidInput("the body must be a mapping of keys to values")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _add_streams(routes: APIRouter, requests: RunRequests) -> None:
    followers = RunFollowers(requests)

    @routes.get("/runs/events", response_class=StreamingResponse)
    async def follow_runs(request: Request) -> StreamingResponse:
        """All runs, then changes: events `runs` (a list of those that are new or other) and `removed`."""
        return event_stream(followers.follow_all(visible_to(request)))

    @routes.get("/runs/{run_id}/events", response_class=StreamingResponse)
    async def follow_run(
        request: Request,
        run_id: str,
        after: str | None = None,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> StreamingResponse:
        """Events `state`, `metrics`, `log`, `reset` and `removed`, from now on, or after a cursor.

        A cursor is an event's id, or the cursors of `/metrics` and `/log` with a slash between them.
        """
        await requests.status(run_id, visible_to(request))  # a 404 must come before the stream
        return event_stream(followers.follow(run_id, visible_to(request), last_event_id or after))


def _recipe(name: str) -> Recipe:
    sections = {
        heading: [field for field in fields if field not in NOT_ASKED]
        for heading, fields in RECIPE_SECTIONS[name].items()
    }
    return Recipe(name, sections, schema_of(RECIPE_CONFIGS[name]))


def visible_to(request: Request) -> str | None:
    """Whose runs the caller may see: their own; an administrator those of all, also of this machine's terminals."""
    caller = request.state.caller
    return None if "admin" in caller.scopes else str(caller.owner)


class Change(Protocol):
    """Something new for those who follow; they may come back with its cursor, if it has one."""

    @property
    def kind(self) -> str: ...
    @property
    def data(self) -> Any: ...
    @property
    def cursor(self) -> str: ...


def event_stream(events: AsyncGenerator[Change | None, None]) -> StreamingResponse:
    """The events as an answer that ends when the client leaves."""
    return StreamingResponse(frames(events), media_type="text/event-stream", headers=STREAM_HEADERS)


async def frames(events: AsyncGenerator[Change | None, None]) -> AsyncIterator[bytes]:
    """Events as they go over the wire; a comment in a long silence, so that proxies and we notice who has left."""
    async with aclosing(events):
        async for event in events:
            if event is None:
                yield b": still here\n\n"
            else:
                cursor = f"id: {event.cursor}\n" if event.cursor else ""
                # msgspec writes no line breaks, and null for NaN.
                yield f"event: {event.kind}\n{cursor}data: ".encode() + msgspec.json.encode(event.data) + b"\n\n"
