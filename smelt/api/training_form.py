"""/api/training/start, stop and status, as an earlier server had them: a form with data and a config becomes a run.

The data becomes a dataset of the sender's first, and the answer waits for it. Keys are that server's, which are
nanoGPT's; where form and config file say different things, the form wins. What it got wrong is right here: a run that
cannot begin says why, how it ended is told, and a resumed run keeps the config it began with.
"""

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qsl

import yaml
from fastapi import APIRouter, Request

from smelt.api.multipart import read_form
from smelt.api.openai_parsing import object_of
from smelt.api.resources import visible_to
from smelt.api.services import Services
from smelt.api.streaming import ClientLeft, NoAnswer, json_body, whole_body
from smelt.configs import validated
from smelt.control.dataset_requests import DatasetRequests
from smelt.control.run_requests import RunRequests
from smelt.control.runs import RunStatus
from smelt.errors import AlreadyExists, InvalidInput, NotFound, Unavailable
from smelt.run_configs import TrainConfig

MAX_BODY_BYTES = 2**20
DATA_SECONDS = 600.0  # that an answer waits for the data to be prepared; that goes on without it
KEPT_S = 7 * 24 * 3600.0
LOG_LINES = 100
MAX_LABEL_CHARS = 200
PURPOSE = "user_data"
DEFAULTS: dict[str, Any] = {
    "batch_size": 12,
    "max_iters": 5000,
    "learning_rate": 6e-4,
    "eval_interval": 500,
    "train_val_split": 0.0005,
    "compile": "false",
    "tokenizer": "gpt2",
}
SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
# What decides nothing here: where processes meet, and services that the sender has no account of the server's for.
MEANINGLESS = ("backend", "master_addr", "master_port", "dataset", "wandb_log", "wandb_project", "wandb_run_name")
OWN = ("file", "url", "init_from", "out_dir", "config", "config_file", "nnodes", "ddp_enabled", "nproc_per_node")


@dataclass(frozen=True, slots=True)
class Started:
    """The run is on the disk, and will be trained."""

    run_id: str
    success: bool = True


@dataclass(frozen=True, slots=True)
class Stopped:
    """Whether there was a run to stop."""

    success: bool


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line, and when the log was last written to."""

    timestamp: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStatus:
    """The caller's last run of this form. Beside what that server told: how the run stands, and why it ended so."""

    is_training: bool
    config: dict[str, Any]
    logs: list[LogLine]
    run_id: str | None = None
    state: str | None = None
    reason: str = ""
    step: int = 0
    max_iters: int = 0
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for: its fields, and the file that came with it."""

    fields: dict[str, Any]
    file_id: str | None = None
    filename: str = ""


def router(services: Services, datasets: DatasetRequests) -> APIRouter:
    """The three routes."""
    runs = services.run_requests
    routes = APIRouter(prefix="/api/training", tags=["other shapes"])
    form = {"type": "object", "properties": {name: {"type": "string"} for name in OWN}}
    takes = {"required": True, "content": {"multipart/form-data": {"schema": form}}}

    @routes.post("/start", response_model=Started, openapi_extra={"requestBody": takes})
    async def start(request: Request) -> Any:
        """Train on a `file` or a `url` by a `config`; `init_from` resume goes on with the last run of an `out_dir`."""
        try:
            asked = await _asked(request, services)
        except ClientLeft:
            return NoAnswer()
        owner = request.state.caller.owner
        last = await _last_run(runs, owner)
        if last is not None and last.state in ("queued", "running"):
            raise AlreadyExists(f"training is under way already: {last.id} is {last.state}; stop it first")
        label = str(asked.fields.get("out_dir") or "out")[:MAX_LABEL_CHARS]
        if asked.fields.get("init_from") == "resume":
            return Started(await _resumed(asked, label, runs, owner))
        values = run_values(asked.fields)
        validated(TrainConfig, values)  # before the data takes its time
        values["dataset"] = await _dataset(asked, values, datasets, owner)
        if values.get("init_from", "scratch") != "scratch":
            del values["tokenizer"]  # the model has its own
        return Started((await runs.create(values, owner, label)).id)

    @routes.post("/stop")
    async def stop(request: Request) -> Stopped:
        """Stop the run, with a checkpoint."""
        last = await _last_run(runs, request.state.caller.owner)
        if last is None or last.state not in ("queued", "running"):
            return Stopped(False)
        await runs.cancel(last.id, visible_to(request))
        return Stopped(True)

    @routes.get("/status")
    async def status(request: Request) -> TrainingStatus:
        """How the run stands, its config, and the last lines of its log."""
        last = await _last_run(runs, request.state.caller.owner)
        if last is None:
            return TrainingStatus(is_training=False, config={}, logs=[])
        return await _status(last, runs)

    return routes


def run_values(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a TrainConfig that a form means. InvalidInput names a key that means nothing."""
    given = {**_object(fields.get("config_file")), **_object(fields.get("config"))}
    given |= {name: value for name, value in fields.items() if name not in OWN}
    given = {name: value for name, value in given.items() if name not in MEANINGLESS and value not in ("", None)}
    values = DEFAULTS | _without(given, OWN)
    scratch = fields.get("init_from") or given.get("init_from") or "scratch"
    values["init_from"] = scratch
    if scratch == "scratch" and "preset" not in values:
        values = SHAPE | values
    if "beta1" in values or "beta2" in values:
        values["betas"] = (values.pop("beta1", 0.9), values.pop("beta2", 0.95))
    _set_ranks(values, given | fields)
    if unknown := [name for name in values if name not in TrainConfig.model_fields]:
        raise InvalidInput(f"unknown key {unknown[0]!r} in the config", param=unknown[0])
    return values


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The values without some, and with the keys of their sections, such as `model:`, beside the others."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name not in names}


def _set_ranks(values: dict[str, Any], given: dict[str, Any]) -> None:
    if _whole(given.get("nnodes") or 1, "nnodes") > 1:
        raise InvalidInput("a run on several machines is started on them, by torchrun or SLURM", param="nnodes")
    if str(given.get("ddp_enabled", "")).lower() in ("true", "1", "on", "yes"):
        values["ranks"] = given.get("nproc_per_node") or 4


def _whole(value: Any, name: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InvalidInput(f"{name} {value!r} is no whole number", param=name) from None


def _object(text: Any) -> dict[str, Any]:
    """A mapping that came as JSON or YAML. InvalidInput where it is none."""
    if text in (None, ""):
        return {}
    try:
        value = yaml.safe_load(text) if isinstance(text, str) else text
    except yaml.YAMLError as error:
        raise InvalidInput(f"the config is neither JSON nor YAML: {error}", param="config") from None
    if not isinstance(value, dict):
        raise InvalidInput("the config must be a mapping of keys to values", param="config")
    return {str(name).replace("-", "_"): each for name, each in value.items()}


async def _asked(request: Request, services: Services) -> Asked:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return Asked(object_of(await json_body(request, MAX_BODY_BYTES)))
    if kind != "multipart/form-data":
        body = await whole_body(request.receive, MAX_BODY_BYTES)
        return Asked(dict(parse_qsl(body.decode(errors="replace"))))
    async with services.uploads.incoming() as incoming:
        form = await read_form(request, "file", incoming.write, texts=("config_file",))
        if not form.filename:
            return Asked(dict(form.fields))
        owner = request.state.caller.owner
        upload = await services.uploads.keep(incoming, owner, form.filename, PURPOSE, KEPT_S)
        return Asked(dict(form.fields), upload.id, upload.name)


async def _dataset(asked: Asked, values: dict[str, Any], datasets: DatasetRequests, owner: str) -> str:
    """The name of the dataset of the file or the address, once it is there; or that of one that is there already."""
    url = asked.fields.get("url")
    if asked.file_id is None and not url and asked.fields.get("dataset"):
        return str(asked.fields["dataset"])
    if asked.file_id is None and not url:
        raise InvalidInput("No data source provided", param="file")
    stem = PurePosixPath(asked.filename or str(url).rstrip("/")).name.partition(".")[0]
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in stem).strip("-")[:40]
    wanted = {
        "name": f"{plain or 'data'}-{time.time_ns() // 1000:x}",
        "tokenizer": values["tokenizer"],
        "val_fraction": values.pop("train_val_split"),
        "block_size": values.get("block_size", SHAPE["block_size"]),
        **({"source": url} if asked.file_id is None else {"file_id": asked.file_id}),
    }
    made = await datasets.create(wanted, owner, may_use_hub=False)
    made = await datasets.read(made.name, owner, DATA_SECONDS)
    if made.error is not None:
        raise InvalidInput(made.error, param="file")
    if made.state != "ready":
        raise Unavailable(f"dataset {made.name} is still being prepared; train on it by POST /v1/runs then", 30)
    return made.name


async def _resumed(asked: Asked, label: str, runs: RunRequests, owner: str) -> str:
    found = await _last_run(runs, owner, label)
    if found is None:
        raise NotFound(f"there is no run to resume in out_dir {label!r}")
    wanted = _without(_object(asked.fields.get("config")) | asked.fields, OWN).get("max_iters")
    await runs.resume(found.id, owner, None if wanted is None else _whole(wanted, "max_iters"))
    return found.id


async def _last_run(runs: RunRequests, owner: str, label: str | None = None) -> RunStatus | None:
    """The owner's last run that came with a label, as all of this form do; with a label, the last of that."""
    for run in await runs.all(owner):
        given = (await asyncio.to_thread(runs.runs.find, run.id))[0].label
        if given is not None and label in (None, given):
            return run
    return None


async def _status(run: RunStatus, runs: RunRequests) -> TrainingStatus:
    details = await runs.show(run.id)
    log = await asyncio.to_thread(runs.runs.log, run.id, LOG_LINES)
    written = "" if log.written is None else datetime.fromtimestamp(log.written, UTC).isoformat()
    return TrainingStatus(
        is_training=run.state in ("queued", "running"),
        config=details.config,
        logs=[LogLine(written, line) for line in log.lines],
        run_id=run.id,
        state=run.state,
        reason=run.reason,
        step=run.step,
        max_iters=run.max_iters,
        loss=run.loss,
    )
