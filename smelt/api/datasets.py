"""Datasets over HTTP: made of an upload, a web address or built-in text, listed, looked at, removed; reads no file.

What was accepted is made whatever dies, in a process apart; to ask with `wait` tells when it is ready.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, status

from smelt.api.multipart import read_form
from smelt.api.openai_parsing import object_of, schema_of
from smelt.api.resources import visible_to
from smelt.api.services import Services
from smelt.api.streaming import ClientLeft, NoAnswer, json_body
from smelt.control.dataset_requests import DatasetConfig, DatasetRequests, DatasetStatus, Split
from smelt.control.datasets import MAX_ROWS, Row
from smelt.errors import InvalidInput

MAX_BODY_BYTES = 2**16
MAX_WAIT_S = 60.0
KEPT_S = 7 * 24 * 3600.0  # an upload that came with a dataset: its data is in the dataset then
PURPOSE = "user_data"

Wait = Annotated[float, Query(ge=0, le=MAX_WAIT_S, allow_inf_nan=False, description="seconds to wait for its end")]


@dataclass(frozen=True, slots=True)
class DatasetList:
    """Datasets that are ready, in alphabetical order, then those that are being made or have failed."""

    data: list[DatasetStatus]


@dataclass(frozen=True, slots=True)
class RowList:
    """Documents of a split."""

    data: list[Row]
    num_rows: int  # of the split
    has_more: bool


def router(services: Services, requests: DatasetRequests) -> APIRouter:
    """The routes of datasets."""
    routes = APIRouter(prefix="/v1/datasets", tags=["datasets"])
    schema = schema_of(DatasetConfig)
    form = {**schema, "properties": {**schema["properties"], "file": {"type": "string", "format": "binary"}}}
    takes = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}

    @routes.get("")
    async def list_datasets(request: Request) -> DatasetList:
        """Every dataset that the caller may train on, and what is being made of their data."""
        return DatasetList(await requests.all(visible_to(request)))

    @routes.post(
        "",
        status_code=status.HTTP_202_ACCEPTED,
        response_model=DatasetStatus,
        openapi_extra={"requestBody": {"required": True, "content": takes}},
    )
    async def create_dataset(request: Request) -> Any:
        """Make a dataset: as JSON of `source` or `file_id`, or as a form with a `file`. It is on the disk then."""
        try:
            values = await _values(request, services)
        except ClientLeft:
            return NoAnswer()
        caller = request.state.caller
        return await requests.create(values, caller.owner, may_use_hub="admin" in caller.scopes)

    @routes.get("/{name}")
    async def show_dataset(request: Request, name: str, wait: Wait = 0.0) -> DatasetStatus:
        """One dataset: how far it is, or what it holds."""
        return await requests.read(name, visible_to(request), wait)

    @routes.get("/{name}/rows")
    async def read_rows(
        request: Request,
        name: str,
        split: Split = "train",
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=0, le=MAX_ROWS)] = 10,
    ) -> RowList:
        """Documents as the text that their tokens stand for; of long ones the beginning."""
        rows, num_rows = await requests.rows(name, visible_to(request), split, offset, limit)
        return RowList(rows, num_rows, offset + len(rows) < num_rows)

    @routes.delete("/{name}", status_code=status.HTTP_204_NO_CONTENT)
    async def delete_dataset(request: Request, name: str) -> None:
        """Remove a dataset; one that is being made is given up. 409 while a run trains on it, or waits to."""
        await requests.read(name, visible_to(request))  # a 404 comes before word of others' runs
        await services.run_requests.check_unneeded(name)
        await requests.remove(name, visible_to(request))

    return routes


async def _values(request: Request, services: Services) -> dict[str, Any]:
    """The fields, as JSON or as a form whose file is kept first."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return object_of(await json_body(request, MAX_BODY_BYTES))
    async with services.uploads.incoming() as incoming:
        form = await read_form(request, "file", incoming.write)
        if form.filename is None:
            return dict(form.fields)
        if "source" in form.fields or "file_id" in form.fields:
            raise InvalidInput("a form with a file needs neither source nor file_id; leave them out", param="source")
        owner = request.state.caller.owner
        upload = await services.uploads.keep(incoming, owner, form.filename, PURPOSE, KEPT_S)
        return {**form.fields, "file_id": upload.id}
