"""Tinker's sessions: begun, kept alive, ended, listed, searched and shown as a trace; knows no model's operations."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from smelt.api.openai_desk import json_response
from smelt.api.services import Services
from smelt.api.tinker_answers import encoded, iso_time, owner_of, texts
from smelt.api.tinker_types import (
    FinishBody,
    HeartbeatBody,
    ProjectBody,
    SearchBody,
    SessionBody,
    StatusQueryBody,
)
from smelt.control.download_links import DownloadLinks
from smelt.control.post_training import PostTraining
from smelt.control.sessions import Standing
from smelt.storage.records import Session

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=2**62)]

MAX_SEARCHED = 100_000
TRACES = "traces"  # where addresses of weights have an id


def add_routes(routes: APIRouter, services: Services) -> None:
    """The routes of sessions."""
    training = services.post_training
    _add_lives(routes, training)
    _add_lists(routes, training)
    _add_traces(routes, services)


def _add_lives(routes: APIRouter, training: PostTraining) -> None:
    sessions = training.sessions

    @routes.post("/create_session")
    async def create_session(request: Request, body: SessionBody) -> dict[str, Any]:
        """Begin a session, to which models and samplers belong."""
        session = Session(owner=owner_of(request), **body.model_dump())
        return {"type": "create_session", "session_id": await sessions.create(session)}

    @routes.post("/session_heartbeat")
    async def heartbeat(request: Request, body: HeartbeatBody) -> Response:
        """Say that the client lives; 410 where the session had been finished."""
        if await sessions.beat(owner_of(request), body.session_id):
            return json_response(b'{"type":"session_heartbeat"}')
        return json_response(b'{"detail":"the session was finished"}', 410)

    @routes.post("/sessions/{session_id}/finish", status_code=204)
    async def finish(request: Request, session_id: str, body: FinishBody) -> None:
        """Say that the client is done, and how it went."""
        await sessions.finish(owner_of(request), session_id, body.model_dump())

    @routes.put("/sessions/{session_id}/project", status_code=204)
    async def assign_project(request: Request, session_id: str, body: ProjectBody) -> None:
        """Say which project a session is of."""
        await sessions.assign_project(owner_of(request), session_id, body.project_id)


def _add_lists(routes: APIRouter, training: PostTraining) -> None:
    sessions = training.sessions

    @routes.get("/sessions")
    async def list_sessions(request: Request, limit: Limit = 20, offset: Offset = 0) -> dict[str, list[str]]:
        """The caller's sessions, newest first."""
        return {"sessions": [each.id for each in await sessions.page(owner_of(request), limit, offset)]}

    @routes.get("/sessions/{session_id}")
    async def show_session(request: Request, session_id: str) -> dict[str, Any]:
        """A session, its models and its samplers."""
        owner = owner_of(request)
        session = await sessions.read(owner, session_id)
        models, samplers = await sessions.parts(owner, session_id)
        return {
            "training_run_ids": [model.id for model in models],
            "sampler_ids": [sampler.id for sampler in samplers],
            "user_metadata": texts(session.user_metadata),
            "display_name": session.display_name,
        }

    @routes.post("/sessions/search")
    async def search(request: Request, body: SearchBody) -> dict[str, Any]:
        """The caller's sessions that match, newest first."""
        known = await sessions.page(owner_of(request), MAX_SEARCHED, 0)
        found = [each for each in known if _matches(each, body, training) and _is_behind(each, body)]
        page = found[: body.limit]
        cursor = None
        if len(found) > len(page):
            cursor = {"last_created_at": iso_time(page[-1].created), "last_session_id": page[-1].id}
        return {"sessions": [await _summary(each, training) for each in page], "next_cursor": cursor}


def _add_traces(routes: APIRouter, services: Services) -> None:
    training, links = services.post_training, DownloadLinks(services.settings.home)

    @routes.get("/sessions/{session_id}/trace_export")
    async def export_trace(request: Request, session_id: str) -> dict[str, str]:
        """An address from which the session's requests can be fetched, as Perfetto shows them."""
        session = await training.sessions.read(owner_of(request), session_id)
        file = f"{session.id}.json"
        token, _ = links.make(TRACES, file)
        return {"status": "ready", "url": str(request.url_for("download_trace", token=token, session_id=session.id))}

    @routes.get(f"/downloads/{{token}}/{TRACES}/{{session_id}}.json")
    async def download_trace(token: str, session_id: str) -> Response:
        """When each request of a session was accepted, and when it was done."""
        links.check(token, TRACES, f"{session_id}.json")
        events = [
            {
                "name": kind,
                "cat": state,
                "ph": "X",
                "pid": 1,
                "tid": lane,
                "ts": begin * 1e6,
                "dur": (end - begin) * 1e6,
            }
            for lane, kind, state, begin, end in await training.sessions.trace(session_id)
        ]
        return encoded({"traceEvents": events})


def _matches(session: Session, query: SearchBody, training: PostTraining) -> bool:
    metadata = texts(session.user_metadata) or {}
    return (
        _is_named(session, query)
        and (query.project_ids is None or session.project_id in query.project_ids)
        and all(metadata.get(name) == value for name, value in query.user_metadata.items())
        and (query.statuses is None or _has_status(session, query.statuses, training.sessions.standing(session)))
    )


def _is_named(session: Session, query: SearchBody) -> bool:
    """Whether the id or the name is one that is looked for, if any is."""
    if query.session_id is None and query.display_name is None:
        return True
    if query.session_id == session.id:
        return True
    name = (session.display_name or "").casefold()
    return query.display_name is not None and all(word in name for word in query.display_name.casefold().split())


def _has_status(session: Session, statuses: Sequence[StatusQueryBody], standing: Standing) -> bool:
    reason = ((session.ending or {}).get("reason") or {}).get("type")
    for status in statuses:
        if status.type == "active" and standing == "active":
            return True
        if status.type == "client_finished" and standing == "finished":
            return status.reasons is None or reason in status.reasons
    return False


def _is_behind(session: Session, query: SearchBody) -> bool:
    """Whether a session comes after the last one of the page before."""
    if query.cursor is None:
        return True
    last = (query.cursor.last_created_at, query.cursor.last_session_id)
    return (datetime.fromisoformat(iso_time(session.created)), session.id) < last


async def _summary(session: Session, training: PostTraining) -> dict[str, Any]:
    models, _ = await training.sessions.parts(session.owner, session.id)
    num_checkpoints, num_bytes = 0, 0
    for model in models:
        found, _ = await training.weights.page(10_000, 0, model_id=model.id)
        num_checkpoints += len(found)
        num_bytes += sum([await training.weights.size(weights) or 0 for weights in found])
    return {
        "session_id": session.id,
        "created_at": iso_time(session.created),
        "owner": session.owner,
        "project_id": session.project_id or "",
        "status": _status(session, training),
        "checkpoints_count": num_checkpoints,
        "display_name": session.display_name,
        "user_metadata": texts(session.user_metadata),
        "checkpoint_storage_bytes": num_bytes,
    }


def _status(session: Session, training: PostTraining) -> dict[str, Any] | None:
    match training.sessions.standing(session):
        case "finished":
            return {"type": "client_finished", **(session.ending or {"reason": {"type": "success"}})}
        case "active":
            return {"type": "active"}
        case "gone":
            return None
