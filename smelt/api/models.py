"""Models over HTTP: listed as OpenAI's clients expect, loaded, unloaded, removed, imported, named; opens no weights.

To look takes any scope, to change something takes `admin`; `families` says so.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Body, Query, status

from smelt.api.services import Services
from smelt.control.catalogue import Served
from smelt.control.imports import ImportJob, Imports
from smelt.control.model_server import ModelServer
from smelt.control.models import remove_alias, remove_model, set_alias
from smelt.errors import InvalidInput, Unavailable

MAX_WAIT_S = 60.0

Wait = Annotated[float, Query(ge=0, le=MAX_WAIT_S, allow_inf_nan=False, description="seconds to wait for its end")]
Text = Annotated[str, Body(embed=True, max_length=1000)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model that may be asked, or an alias of one. What is null is not known before the model is loaded."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "smelt"
    alias_of: str | None  # the model's own id, which answers carry too
    architecture: str | None
    num_parameters: int | None
    context: int | None  # tokens
    labels: list[str] | None  # of a classifier; null where it writes text
    num_bytes: int | None  # on the disk
    loaded_by: list[str]  # names of workers


@dataclass(frozen=True, slots=True)
class ModelList:
    """All of them: the models, then the aliases."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


@dataclass(frozen=True, slots=True)
class RemovedModel:
    """A model is gone."""

    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of a model."""

    alias: str
    target: str


@dataclass(frozen=True, slots=True)
class AliasList:
    """All of them, `gpt` and `default` among them where there is a default model."""

    data: list[Alias]


@dataclass(frozen=True, slots=True)
class ImportList:
    """Imports, newest first."""

    data: list[ImportJob]


def router(services: Services, imports: Imports) -> APIRouter:
    """The routes of models, their aliases, and imports."""
    routes = APIRouter(prefix="/v1", tags=["models"])
    _add_models(routes, services)
    _add_aliases(routes, services)
    _add_imports(routes, imports)
    return routes


def _add_models(routes: APIRouter, services: Services) -> None:
    catalogue, model_server = services.catalogue, services.model_server

    @routes.get("/models")
    async def list_models() -> ModelList:
        """The models that may be asked, and what they are called too."""
        cards = [_card(served.name, served, model_server) for served in await catalogue.all()]
        aliases = (await catalogue.aliases()).items()
        return ModelList([*cards, *(_card(alias, served, model_server) for alias, served in sorted(aliases))])

    @routes.get("/models/{model:path}")
    async def show_model(model: str) -> ModelCard:
        """One of them."""
        return _card(model, await catalogue.find(model), model_server)

    @routes.delete("/models/{model:path}")
    async def delete_model(model: str, force: bool = False) -> RemovedModel:
        """Remove a registered model from the disk; `force`: its aliases too, which else forbid it."""
        served = await catalogue.find(model)
        if served.name != model:
            raise InvalidInput(f"{model!r} is another name of {served.name}; remove that one", param="model")
        await asyncio.to_thread(remove_model, model, services.settings.models, force)
        await catalogue.refresh()
        await _unloaded(model_server.unload_model(model))
        return RemovedModel(model)

    @routes.post("/models/{model:path}/load")
    async def load_model(model: str) -> ModelCard:
        """Have it ready on a worker, before anybody asks; answers when it is."""
        served = await catalogue.find(model)
        await model_server.load_model(served.loaded)
        return _card(model, served, model_server)

    @routes.post("/models/{model:path}/unload")
    async def unload_model(model: str) -> ModelCard:
        """Give its memory back on every worker, once its answers have ended; the next request loads it again."""
        served = await catalogue.find(model)
        await model_server.unload_model(served.name)
        return _card(model, served, model_server)


def _add_aliases(routes: APIRouter, services: Services) -> None:
    catalogue, folder = services.catalogue, services.settings.models

    @routes.get("/aliases")
    async def list_aliases() -> AliasList:
        """What models are called too."""
        return AliasList([Alias(alias, served.name) for alias, served in sorted((await catalogue.aliases()).items())])

    @routes.put("/aliases/{alias:path}")
    async def put_alias(alias: str, target: Text) -> Alias:
        """Let a registered model be asked by another name; an alias that exists is pointed anew."""
        name = await asyncio.to_thread(set_alias, alias, target, folder)
        await catalogue.refresh()
        return Alias(alias, name)

    @routes.delete("/aliases/{alias:path}", status_code=status.HTTP_204_NO_CONTENT)
    async def delete_alias(alias: str) -> None:
        """Forget an alias; the model stays."""
        await asyncio.to_thread(remove_alias, alias, folder)
        await catalogue.refresh()


def _add_imports(routes: APIRouter, imports: Imports) -> None:
    @routes.post("/imports", status_code=status.HTTP_202_ACCEPTED)
    async def create_import(source: Text, name: Text) -> ImportJob:
        """Register a model under a name: `hf:ORG/NAME`, or a path below the server's home folder, such as `runs/ID`.

        It is on the disk when this answers, and goes on over restarts.
        """
        return await imports.create(source, name)

    @routes.get("/imports")
    async def list_imports() -> ImportList:
        """The last imports, newest first."""
        return ImportList(await imports.all())

    @routes.get("/imports/{job_id}")
    async def show_import(job_id: str, wait: Wait = 0.0) -> ImportJob:
        """How an import stands, and how many bytes it has fetched or copied."""
        return await imports.read(job_id, wait)

    @routes.delete("/imports/{job_id}")
    async def cancel_import(job_id: str) -> ImportJob:
        """Give an import up; one that is over stays as it is."""
        return await imports.cancel(job_id)


def _card(name: str, served: Served, model_server: ModelServer) -> ModelCard:
    config = served.config or served.classifier
    return ModelCard(
        id=name,
        created=served.created,
        alias_of=None if name == served.name else served.name,
        architecture=config.architecture if config else None,
        num_parameters=config.num_parameters if config else None,
        context=served.context,
        labels=None if served.classifier is None else list(served.classifier.labels),
        num_bytes=served.num_bytes,
        loaded_by=holders(served.loaded, model_server),
    )


def holders(model: str, model_server: ModelServer) -> list[str]:
    """Names of the workers that hold a model now."""
    return [worker.name for worker in model_server.workers if model in worker.models]


async def _unloaded(unloading: Awaitable[int]) -> None:
    """Of a model that is gone; where no worker is there, none holds it."""
    try:
        await unloading
    except Unavailable:
        return
