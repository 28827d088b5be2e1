"""OpenAI's files: uploaded as forms that go straight to the disk, listed, read, deleted; knows no content."""

from dataclasses import dataclass
from typing import Annotated, Literal, cast, get_args

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import Field

from smelt.api.multipart import Form, read_form
from smelt.api.openai_lists import Listing, listing
from smelt.api.openai_parsing import Body, check_neutral
from smelt.api.services import Services
from smelt.api.streaming import ClientLeft, NoAnswer
from smelt.control.uploads import Uploads
from smelt.errors import InvalidInput
from smelt.storage.records import Upload

MAX_LISTED = 10_000
MIN_SECONDS, MAX_SECONDS = 3600, 2_592_000
BATCH_SECONDS = float(MAX_SECONDS)  # that the input of a batch is kept, unless its sender says otherwise
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(get_args(Purpose))},
        ANCHOR: {"type": "string", "enum": ["created_at"]},
        SECONDS: {"type": "integer", "minimum": MIN_SECONDS, "maximum": MAX_SECONDS},
    },
}


class Expiry(Body):
    """How long a file is kept."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_SECONDS, le=MAX_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileObject:
    """A file, as OpenAI's clients know it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"
    status_details: None = None


@dataclass(frozen=True, slots=True)
class DeletedFile:
    """A file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


def router(services: Services) -> APIRouter:
    """The routes of files."""
    routes = APIRouter(prefix="/v1", tags=["openai"])
    uploads = services.uploads
    takes = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}}

    @routes.post("/files", response_model=FileObject, openapi_extra=takes)
    async def create_file(request: Request) -> FileObject | NoAnswer:
        """Upload a file. It is on the disk when this answers; one for a batch is kept for 30 days."""
        try:
            return shown_file(await _received(request, uploads))
        except ClientLeft:
            return NoAnswer()

    @routes.get("/files")
    async def list_files(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = MAX_LISTED,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Listing[FileObject]:
        """Your files, newest first."""
        owner, newest_first = request.state.caller.owner, order == "desc"
        found = await uploads.page(owner, limit + 1, after, newest_first=newest_first, purpose=purpose)
        return listing(found, limit, shown_file, lambda file: file.id)

    @routes.get("/files/{file_id}")
    async def show_file(request: Request, file_id: str) -> FileObject:
        """One of them."""
        return shown_file(await uploads.find(request.state.caller.owner, file_id))

    @routes.get("/files/{file_id}/content", response_class=FileResponse)
    async def read_file(request: Request, file_id: str) -> FileResponse:
        """What is in a file."""
        upload = await uploads.find(request.state.caller.owner, file_id)
        return FileResponse(uploads.path(upload), media_type="application/octet-stream", filename=upload.name)

    @routes.delete("/files/{file_id}")
    async def delete_file(request: Request, file_id: str) -> DeletedFile:
        """Delete a file. Work that was accepted with it goes on."""
        await uploads.delete(request.state.caller.owner, file_id)
        return DeletedFile(file_id)

    return routes


async def _received(request: Request, uploads: Uploads) -> Upload:
    async with uploads.incoming(announced_bytes(request)) as incoming:
        form = await read_form(request, "file", incoming.write)
        purpose, seconds = _understood(form)
        assert form.filename is not None, "checked"
        return await uploads.keep(incoming, request.state.caller.owner, form.filename, purpose, seconds)


def announced_bytes(request: Request) -> int:
    """How long a body will be; 0 where nobody says."""
    announced = request.headers.get("content-length", "")
    return int(announced) if announced.isdigit() else 0


def kept_seconds(purpose: str, seconds: int | None) -> float | None:
    """How long a file is kept of which its sender has said this: None until its owner deletes it."""
    if seconds is not None:
        return float(seconds)
    return BATCH_SECONDS if purpose == "batch" else None


def _understood(form: Form) -> tuple[Purpose, float | None]:
    """What a file is for, and how many seconds it is kept: None where its owner has to delete it. InvalidInput."""
    if form.filename is None:
        raise InvalidInput("the form has no file; send it in the part `file`, with a filename", "file")
    fields = dict(form.fields)
    purpose = cast("Purpose", fields.pop("purpose", None))
    if purpose not in get_args(Purpose):
        raise InvalidInput(f"purpose must be one of {', '.join(get_args(Purpose))}", "purpose")
    anchor, seconds = fields.pop(ANCHOR, None), fields.pop(SECONDS, None)
    check_neutral(dict(fields), {})
    if anchor is None and seconds is None:
        return purpose, kept_seconds(purpose, None)
    if anchor != "created_at":
        raise InvalidInput("expires_after.anchor must be created_at", "expires_after")
    if not (seconds or "").isdecimal() or not MIN_SECONDS <= int(seconds or "") <= MAX_SECONDS:
        raise InvalidInput(f"expires_after.seconds must be from {MIN_SECONDS} to {MAX_SECONDS}", "expires_after")
    return purpose, float(seconds or "")


def shown_file(upload: Upload) -> FileObject:
    """A file in OpenAI's words."""
    return FileObject(
        id=upload.id,
        bytes=upload.num_bytes,
        created_at=int(upload.created),
        filename=upload.name,
        purpose=upload.purpose,
        expires_at=None if upload.expires is None else int(upload.expires),
    )
