"""Tinker's REST: training runs and checkpoints, as its client and its command line ask for them.

A training run is a model, and a checkpoint is weights that it has saved. Knows no operation.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse
from starlette.requests import Request

from smelt.api.services import Services
from smelt.api.tinker_answers import iso_time, owner_of, texts
from smelt.api.tinker_types import CopyBody, PathBody, TtlBody
from smelt.control.download_links import DownloadLinks
from smelt.control.post_training import PostTraining
from smelt.control.saved_weights import SCHEME, copy_session, expiry, path_of
from smelt.errors import InvalidInput
from smelt.storage.records import SavedWeights, TrainingModel

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=2**62)]
Scope = Literal["owned", "accessible"]

CHECKPOINT_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


def add_routes(routes: APIRouter, services: Services) -> None:
    """All of them."""
    _add_runs(routes, services.post_training)
    _add_checkpoints(routes, services.post_training)
    _add_changes(routes, services.post_training)
    _add_downloads(routes, services)


def _add_runs(routes: APIRouter, training: PostTraining) -> None:
    @routes.get("/training_runs")
    async def list_runs(
        request: Request, limit: Limit = 20, offset: Offset = 0, project_id: str | None = None
    ) -> dict[str, Any]:
        """The caller's models, newest first."""
        models, total = await training.models.page(owner_of(request), limit, offset, project_id)
        runs = [await _run(model, training) for model in models]
        return {"training_runs": runs, "cursor": {"offset": offset, "limit": limit, "total_count": total}}

    @routes.get("/training_runs/{run_id}")
    async def show_run(request: Request, run_id: str, access_scope: Scope = "owned") -> dict[str, Any]:
        """One model; with the scope "accessible" also another's that has published weights."""
        return await _run(await _model(request, training, run_id, access_scope), training)


def _add_checkpoints(routes: APIRouter, training: PostTraining) -> None:
    @routes.get("/training_runs/{run_id}/checkpoints")
    async def list_checkpoints(request: Request, run_id: str) -> dict[str, Any]:
        """All that a model has saved, newest first."""
        model = await training.models.find(owner_of(request), run_id)
        found, _ = await training.weights.page(10_000, 0, model_id=model.id)
        return {"checkpoints": [await _checkpoint(weights, training) for weights in found]}

    @routes.get("/checkpoints")
    async def list_all_checkpoints(request: Request, limit: Limit = 100, offset: Offset = 0) -> dict[str, Any]:
        """All that the caller's models have saved, newest first."""
        found, total = await training.weights.page(limit, offset, owner=owner_of(request))
        checkpoints = [await _checkpoint(weights, training) for weights in found]
        return {"checkpoints": checkpoints, "cursor": {"offset": offset, "limit": limit, "total_count": total}}

    @routes.post("/weights_info")
    async def weights_info(request: Request, body: PathBody) -> dict[str, Any]:
        """What must be known of weights to go on from them."""
        model = (await training.weights.find_saved(owner_of(request), body.tinker_path)).model
        return {
            "base_model": model.base_model,
            "is_lora": model.rank > 0,
            "lora_rank": model.rank or None,
            "train_unembed": model.train_unembed,
            "train_mlp": model.train_mlp,
            "train_attn": model.train_attn,
        }


def _add_changes(routes: APIRouter, training: PostTraining) -> None:
    weights = training.weights
    place = "/training_runs/{run_id}/checkpoints/{kind}/{name}"

    @routes.post(f"{place}/publish", status_code=204)
    async def publish(request: Request, run_id: str, kind: str, name: str) -> None:
        """Let everybody read weights."""
        await weights.change(owner_of(request), _path(run_id, kind, name), is_public=True)

    @routes.delete(f"{place}/publish", status_code=204)
    async def unpublish(request: Request, run_id: str, kind: str, name: str) -> None:
        """Let nobody else read weights any more."""
        await weights.change(owner_of(request), _path(run_id, kind, name), is_public=False)

    @routes.put(f"{place}/ttl", status_code=204)
    async def set_ttl(request: Request, run_id: str, kind: str, name: str, body: TtlBody) -> None:
        """Keep weights for so long from now on, or for ever."""
        expires = expiry(body.ttl_seconds, datetime.now(UTC).timestamp())
        await weights.change(owner_of(request), _path(run_id, kind, name), expires=expires)

    @routes.delete(place, status_code=204)
    async def remove(request: Request, run_id: str, kind: str, name: str) -> None:
        """Remove weights and their files."""
        await weights.remove(owner_of(request), _path(run_id, kind, name))

    @routes.post("/copy_weights")
    async def copy(request: Request, body: CopyBody) -> dict[str, str]:
        """Give weights a second path, under which they live on when the first is removed."""
        owner = owner_of(request)
        if body.session_id is not None and body.model_seq_id is not None:
            session, number = await training.sessions.read(owner, body.session_id), body.model_seq_id
        elif body.destination_project_id is not None:
            key = request.headers.get("x-idempotency-key") or str(request.state.request_id)
            session, number = copy_session(owner, body.destination_project_id, key), 0
        else:
            raise InvalidInput("say where the copy belongs: a session_id with a model_seq_id, or a project")
        path = await weights.copy(owner, body.source_path, session, number, body.ttl_seconds)
        return {"tinker_path": path}


def _add_downloads(routes: APIRouter, services: Services) -> None:
    links, weights = DownloadLinks(services.settings.home), services.post_training.weights

    @routes.get("/training_runs/{run_id}/checkpoints/{kind}/{name}/external_weights_urls")
    async def external_urls(request: Request, run_id: str, kind: str, name: str) -> dict[str, Any]:
        """An address for each file, which needs no key for an hour."""
        found = (await weights.find_saved(owner_of(request), _path(run_id, kind, name))).weights
        urls, expires = {}, 0.0
        for file in await weights.files(found):
            token, expires = links.make(found.id, file)
            urls[file] = str(request.url_for("download", token=token, weights_id=found.id, file=file))
        return {"urls": urls, "expires": iso_time(expires)}

    @routes.get("/downloads/{token}/{weights_id}/{file}", response_class=FileResponse)
    async def download(token: str, weights_id: str, file: str) -> FileResponse:
        """A file of saved weights, for whoever has its address."""
        links.check(token, weights_id, file)
        path = await weights.file(weights_id, file)
        return FileResponse(path, media_type="application/octet-stream", filename=file)


async def _model(request: Request, training: PostTraining, run_id: str, scope: Scope) -> TrainingModel:
    if scope == "accessible" and await training.weights.has_public(run_id):
        return await training.models.find_any(run_id)
    return await training.models.find(owner_of(request), run_id)


async def _run(model: TrainingModel, training: PostTraining) -> dict[str, Any]:
    checkpoint = await training.weights.newest(model.id, "weights")
    sampler = await training.weights.newest(model.id, "sampler_weights")
    return {
        "training_run_id": model.id,
        "base_model": model.base_model,
        "model_owner": model.owner,
        "is_lora": model.rank > 0,
        "corrupted": not await training.models.was_opened(model),
        "lora_rank": model.rank or None,
        "last_request_time": iso_time(await training.models.last_request(model)),
        "last_checkpoint": checkpoint and await _checkpoint(checkpoint, training),
        "last_sampler_checkpoint": sampler and await _checkpoint(sampler, training),
        "user_metadata": texts(model.user_metadata),
    }


async def _checkpoint(weights: SavedWeights, training: PostTraining) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{weights.type}/{weights.name}",
        "checkpoint_type": CHECKPOINT_TYPES[weights.type],
        "time": iso_time(weights.created),
        "tinker_path": path_of(weights),
        "size_bytes": await training.weights.size(weights),
        "public": weights.is_public,
        "user_metadata": texts(weights.user_metadata),
        "expires_at": None if weights.expires is None else iso_time(weights.expires),
    }


def _path(run_id: str, kind: str, name: str) -> str:
    return f"{SCHEME}{run_id}/{kind}/{name}"
