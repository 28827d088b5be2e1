"""Whether the server lives, and what it is doing; knows no secret and computes nothing."""

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import Response

from smelt.api import telemetry
from smelt.api.services import Services
from smelt.control.run_folders import find_runs, is_training


class Alive(BaseModel):
    """The process answers."""

    status: str = "ok"


class Health(BaseModel):
    """What the server is doing."""

    status: str = "healthy"  # the word that earlier servers of this kind had
    model_loaded: bool
    training_active: bool


def router(services: Services) -> APIRouter:
    """/healthz for whoever restarts processes, /health for people and dashboards, /metrics for Prometheus."""
    routes = APIRouter(tags=["health"])

    @routes.get("/healthz")
    async def healthz() -> Alive:
        """Whether the process answers."""
        return Alive()

    @routes.get("/health")
    def health() -> Health:
        """Whether a worker has a model ready, and whether a run is going on."""
        loaded = any(worker.models for worker in services.model_server.workers)
        training = any(is_training(folder) for _, folder in find_runs(services.settings.runs))
        return Health(model_loaded=loaded, training_active=training)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """What the server has counted, in Prometheus's text format."""
        return Response(telemetry.exposition(services.model_server.workers), media_type=CONTENT_TYPE_LATEST)

    return routes
