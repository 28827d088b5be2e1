"""Sessions of training by request as people look at them, as JSON and as streams of events; knows no operation.

What Tinker's client asks of sessions is elsewhere: this is smelt's own, and the dashboard's.
"""

import asyncio
import math
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Body, Request, status
from fastapi.responses import StreamingResponse

from smelt.api.resources import event_stream
from smelt.api.services import Services
from smelt.control.session_figures import Step
from smelt.control.session_views import SessionView, SessionViews
from smelt.errors import InvalidInput

MAX_TOLD = 32  # figures that a client may tell of at once
MAX_NAME = 64

Figures = Annotated[dict[str, float], Body(embed=True, json_schema_extra={"example": {"reward": 0.75}})]


@dataclass(frozen=True, slots=True)
class SessionList:
    """Sessions, newest first."""

    data: list[SessionView]


@dataclass(frozen=True, slots=True)
class SessionCurves:
    """The steps of each model of a session, thinned to what a screen can show."""

    data: dict[str, list[Step]]


def router(services: Services) -> APIRouter:
    """The routes of sessions."""
    routes = APIRouter(prefix="/v1", tags=["sessions"])
    views = SessionViews(services.post_training, services.database)
    _add_streams(routes, views)
    _add_views(routes, views)
    _add_figures(routes, services)
    return routes


def owner_of(request: Request) -> str:
    """Whose sessions these are: everybody sees their own."""
    return str(request.state.caller.owner)


def _add_streams(routes: APIRouter, views: SessionViews) -> None:
    @routes.get("/sessions/events", response_class=StreamingResponse)
    async def follow_sessions(request: Request) -> StreamingResponse:
        """All sessions, then changes: events `sessions`, a list of those that are new or other."""
        return event_stream(views.follow_all(owner_of(request)))

    @routes.get("/sessions/{session_id}/events", response_class=StreamingResponse)
    async def follow_session(request: Request, session_id: str) -> StreamingResponse:
        """Events `session`, `curves` (all steps by model, which void those before) and `steps` (those added)."""
        await views.one(owner_of(request), session_id)  # a 404 must come before the stream
        return event_stream(views.follow(owner_of(request), session_id))


def _add_views(routes: APIRouter, views: SessionViews) -> None:
    @routes.get("/sessions")
    async def list_sessions(request: Request) -> SessionList:
        """The caller's sessions, their models in training, and how far those are."""
        return SessionList(await views.all(owner_of(request)))

    @routes.get("/sessions/{session_id}")
    async def show_session(request: Request, session_id: str) -> SessionView:
        """One of them."""
        return await views.one(owner_of(request), session_id)

    @routes.get("/sessions/{session_id}/figures")
    async def show_figures(request: Request, session_id: str) -> SessionCurves:
        """What each model has come to, step by step."""
        return SessionCurves(await views.curves(owner_of(request), session_id))


def _add_figures(routes: APIRouter, services: Services) -> None:
    training = services.post_training

    @routes.post("/sessions/{session_id}/models/{model_id}/figures", status_code=status.HTTP_202_ACCEPTED)
    async def tell_figures(request: Request, session_id: str, model_id: str, figures: Figures) -> dict[str, int]:
        """Take down what only the client knows of the step that it is about to take, such as its mean reward."""
        model = await training.models.find(owner_of(request), model_id)
        if model.session_id != session_id:
            raise InvalidInput(f"{model_id} is no model of the session {session_id}", "model_id")
        if len(figures) > MAX_TOLD or not all(map(_is_sound, figures.items())):
            raise InvalidInput(f"figures are up to {MAX_TOLD} finite numbers with names of up to {MAX_NAME} letters")
        await asyncio.wrap_future(training.figures.tell(model.id, figures))
        return {"num_taken": len(figures)}


def _is_sound(figure: tuple[str, float]) -> bool:
    name, value = figure
    return len(name) <= MAX_NAME and math.isfinite(value)
