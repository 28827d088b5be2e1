"""Whether the server lives, and what it is doing; knows no secret and computes nothing."""

from fastapi import APIRouter
from pydantic import BaseModel

from smelt.api.services import Services


class Alive(BaseModel):
    """The process answers."""

    status: str = "ok"


class Health(BaseModel):
    """What the server is doing."""

    status: str
    model_loaded: bool
    training_active: bool


def router(services: Services) -> APIRouter:
    """/healthz for whoever restarts processes, /health for people and dashboards."""
    routes = APIRouter(tags=["health"])

    @routes.get("/healthz")
    async def healthz() -> Alive:
        """Whether the process answers."""
        return Alive()

    @routes.get("/health")
    async def health() -> Health:
        """Whether a worker has a model ready, and whether a run is going on."""
        workers = services.model_server.workers
        loaded = any(worker.models for worker in workers)
        return Health(status="ok" if workers else "no worker", model_loaded=loaded, training_active=False)

    return routes
