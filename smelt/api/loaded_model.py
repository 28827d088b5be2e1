"""/api/model/load, info and config, as an earlier server had them: one model at a time, which is the default here.

What is loaded is a registered model, or one of the hub or of the home folder, which is imported first; never a URL,
and never another one in its place.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from smelt.api.models import holders
from smelt.api.openai_parsing import Body, check_neutral, parse, schema_of
from smelt.api.services import Services
from smelt.api.streaming import ClientLeft, NoAnswer, json_body
from smelt.control.catalogue import Served
from smelt.control.imports import HUB, Imports
from smelt.errors import InvalidInput, NotFound, Unavailable, UnknownModel, UnsupportedEncoding
from smelt.models.aliases import DEFAULT
from smelt.models.registry import HUB_NAMES, NANOGPT_FILE, RUN_LINKS
from smelt.transport.failures import error_of
from smelt.transport.messages import Failure

MAX_BODY_BYTES = 2**16
IMPORT_SECONDS = 600.0  # that an answer waits for a model to be fetched; the import goes on without it
# Fields of a config that say what is so anyway.
NOTHING: dict[str, tuple[Any, ...]] = {"config_path": ("",), "config": ({}, "")}


class LoadBody(Body):
    """Which model: its name, or a path below the server's home folder."""

    model_type: str | None = None
    checkpoint_path: str | None = None
    config_path: Any = None
    config: Any = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that is loaded. `dtype` is the server's setting."""

    model_type: str
    checkpoint_path: str | None
    config: dict[str, Any] | None
    num_parameters: int | None
    num_parameters_millions: float | None
    architecture: dict[str, Any] | None
    device: str | None
    dtype: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """It is."""

    model_info: ModelInfo
    success: bool = True


def router(services: Services, imports: Imports) -> APIRouter:
    """The three routes."""
    routes = APIRouter(prefix="/api/model", tags=["other shapes"])
    catalogue = services.catalogue
    takes = {"required": True, "content": {"application/json": {"schema": schema_of(LoadBody)}}}

    @routes.post("/load", response_model=Loaded, openapi_extra={"requestBody": takes})
    async def load(request: Request) -> Any:
        """Have a model ready, and let `gpt` and `default` mean it for as long as this server runs."""
        try:
            body = await _body(request)
        except ClientLeft:
            return NoAnswer()
        wanted = body.checkpoint_path or body.model_type or ""
        served = await _served(wanted, services, imports)
        await services.model_server.load_model(served.name)
        await catalogue.choose(served.name)
        return Loaded(_info(served, services, body.checkpoint_path))

    @routes.get("/info")
    async def info() -> dict[str, Any]:
        """The default model, if some worker has loaded it."""
        try:
            served = await catalogue.find(DEFAULT)
        except UnknownModel:
            return {"loaded": False}
        if not holders(served.name, services.model_server):
            return {"loaded": False}
        return {"loaded": True, **asdict(_info(served, services))}

    @routes.get("/config")
    async def config(download: bool = False) -> Response:
        """The shape of the default model; `download`: as a file."""
        served = await catalogue.find(DEFAULT)
        if served.config is None:
            raise NotFound(f"the shape of {served.name} is not known before it is imported")
        headers = {"Content-Disposition": "attachment; filename=model_config.json"} if download else None
        return JSONResponse({"model": _architecture(served)}, headers=headers)

    return routes


async def _body(request: Request) -> LoadBody:
    try:
        raw = await json_body(request, MAX_BODY_BYTES)
    except UnsupportedEncoding:
        raise UnsupportedEncoding(
            "files cannot be sent: a checkpoint is a pickle, which can run code. Import it on the server itself, "
            'smelt models import out/ckpt.pt NAME, and load it by a JSON body: {"model_type": "NAME"}'
        ) from None
    body = parse(LoadBody, raw, {})
    check_neutral(body.model_extra, {})
    for name, neutral in NOTHING.items():
        if getattr(body, name) not in (None, *neutral):
            raise InvalidInput(f"{name} is not supported: a model's folder has its own config; leave it out", name)
    if not (body.checkpoint_path or body.model_type):
        raise InvalidInput("which model? give model_type, a name, or checkpoint_path, a path", "model_type")
    return body


async def _served(wanted: str, services: Services, imports: Imports) -> Served:
    """The model that is meant, which is imported first where it is not registered."""
    source = _below(services.settings.home, wanted)
    try:
        return await services.catalogue.find(source.removeprefix("models/"))
    except UnknownModel:
        if not (source in HUB_NAMES or source.startswith(HUB) or "/" in source):
            raise
    job = await imports.create(source, _name_of(source))
    job = await imports.read(job.id, IMPORT_SECONDS)
    if job.error is not None:
        raise error_of(Failure(job.error_type or "", job.error))
    if job.status != "completed":
        raise Unavailable(f"{source} is still being imported; ask again", retry_after_s=30)
    await services.catalogue.refresh()
    return await services.catalogue.find(job.name)


def _below(home: Path, wanted: str) -> str:
    """A path from the home folder on, where it lies there; else as it was given."""
    path = Path(wanted)
    return str(path.relative_to(home)) if path.is_absolute() and path.is_relative_to(home) else wanted


def _name_of(source: str) -> str:
    """What a model is called that was asked for by its place: the run's folder, or the repository."""
    parts = [part for part in source.removeprefix(HUB).split("/") if part not in (*RUN_LINKS, NANOGPT_FILE, "")]
    return parts[-1] if parts else source


def _info(served: Served, services: Services, checkpoint_path: str | None = None) -> ModelInfo:
    config = served.config
    workers = services.model_server.workers
    architecture = _architecture(served) if config else None
    return ModelInfo(
        model_type=served.name,
        checkpoint_path=checkpoint_path,
        config=None if architecture is None else {"model": architecture},
        num_parameters=config.num_parameters if config else None,
        num_parameters_millions=round(config.num_parameters / 1e6, 2) if config else None,
        architecture=architecture,
        device=next((worker.device for worker in workers if served.name in worker.models), None),
        dtype=services.settings.dtype,
    )


def _architecture(served: Served) -> dict[str, Any]:
    assert served.config is not None, "whoever asks has looked"
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
    return {**{name: getattr(served.config, name) for name in names}, "dropout": 0.0}
