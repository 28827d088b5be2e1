"""Tinker's API: all its routes together, and what clients ask before anything else; computes nothing.

Errors are {"detail"},
and never 409 or 402, which Tinker's client takes for a reason to wait and try again.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body
from starlette.requests import Request

from smelt.api import telemetry, tinker_account, tinker_rest, tinker_sampling, tinker_sessions, tinker_training
from smelt.api.services import Services
from smelt.api.tinker_answers import is_near
from smelt.transport.frames import MAX_FRAME_BYTES

MAX_CHUNK_DATA = 65536  # data that a client sends at once
MAX_SAMPLES_AT_ONCE = 2000
REFRESH_S = 300


def router(services: Services) -> APIRouter:
    """All routes of Tinker's API."""
    routes = APIRouter(prefix="/api/v1", tags=["tinker"])
    # Routes are tried one after the other, so what is asked most comes first.
    tinker_training.add_routes(routes, services)
    tinker_sampling.add_routes(routes, services)
    tinker_sessions.add_routes(routes, services)
    _add_client(routes, services)
    tinker_rest.add_routes(routes, services)
    tinker_account.add_routes(routes, services)
    return routes


def _add_client(routes: APIRouter, services: Services) -> None:
    @routes.post("/client/config")
    async def client_config(request: Request) -> dict[str, Any]:
        """How clients shall behave."""
        return config_for(request, services.settings.max_body_mb * 2**20)

    @routes.post("/client/dynamic_config")
    async def dynamic_config() -> dict[str, Any]:
        """The same, of what may change while they run."""
        return {"refresh_interval_sec": REFRESH_S, "sample_cancel_enabled": False}

    @routes.get("/get_server_capabilities")
    async def capabilities() -> dict[str, Any]:
        """The models that can be trained and sampled from, by all their names."""
        served = {each.name: each for each in await services.catalogue.all()}
        served |= await services.catalogue.aliases()
        models = [
            {"model_name": name, "max_context_length": each.context, "trainable": True, "sampleable": True}
            for name, each in served.items()
        ]
        return {"supported_models": models}

    @routes.post("/telemetry")
    async def take_telemetry(body: Annotated[dict[str, Any], Body()]) -> dict[str, str]:
        """Count what clients tell of themselves; nothing of it is kept."""
        events = body.get("events")
        for event in events if isinstance(events, list) else ():
            telemetry.count_client_event(event if isinstance(event, dict) else {})
        return {"status": "accepted"}

    @routes.get("/healthz")
    async def healthz() -> dict[Literal["status"], str]:
        """Say that this is here."""
        return {"status": "ok"}


def config_for(request: Request, max_body_bytes: int) -> dict[str, Any]:
    """Few and large requests in their order; packed where a network lies between."""
    chunk_bytes = min(max_body_bytes, MAX_FRAME_BYTES) // 2
    return {
        "pjwt_auth_enabled": False,
        "credential_default_source": "api_key",
        "parallel_fwdbwd_chunks": False,
        "proto_compress_fwdbwd": not is_near(request),
        "fwdbwd_max_chunk_len": MAX_CHUNK_DATA,
        "fwdbwd_max_chunk_bytes_count": chunk_bytes,
        "fwdbwd_dispatch_bytes_semaphore_size": 4 * chunk_bytes,
        "sample_max_concurrent_requests": MAX_SAMPLES_AT_ONCE,
        "sample_use_retrieve_futures": False,
        "custom_loss_server_side": False,
    }
