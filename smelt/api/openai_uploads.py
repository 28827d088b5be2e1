"""OpenAI's uploads: files that are sent in parts, which go straight to the disk; knows no content."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from smelt.api.multipart import read_form
from smelt.api.openai import MAX_BODY_BYTES
from smelt.api.openai_files import Expiry, FileObject, Purpose, announced_bytes, kept_seconds, shown_file
from smelt.api.openai_parsing import Body, check_neutral, parse, schema_of
from smelt.api.services import Services
from smelt.api.streaming import ClientLeft, NoAnswer, json_body
from smelt.control.chunked_uploads import MAX_PARTS, ChunkedUploads, state_of
from smelt.control.uploads import Uploads
from smelt.errors import InvalidInput, TooLarge
from smelt.storage.records import ChunkedUpload, Upload, UploadPart

MAX_PART_BYTES = 64 * 2**20  # OpenAI's
PART_FORM = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "format": "binary"}},
}

Name = Annotated[str, Field(min_length=1, max_length=1024)]


class UploadBody(Body):
    """A file that will come in parts."""

    filename: Name = Field(description="what it is called; its suffix says how it is read")
    purpose: Purpose
    bytes: int = Field(ge=1, description="how many it will have, up to the server's max_upload_mb")
    mime_type: Name = Field(description="taken, and means nothing here")
    expires_after: Expiry | None = Field(None, description="when the file is removed")


class CompleteBody(Body):
    """The parts that a file consists of."""

    part_ids: list[Annotated[str, Field(max_length=64)]] = Field(
        min_length=1, max_length=MAX_PARTS, description="in the order of the file"
    )
    md5: str | None = Field(None, pattern="^[0-9a-fA-F]{32}$", description="of the whole file, in hexadecimal digits")


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadObject:
    """An upload, as OpenAI's clients know it. `bytes` were announced; `file` is there once it is completed."""

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: str
    file: FileObject | None
    object: Literal["upload"] = "upload"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartObject:
    """A part that is on the disk."""

    id: str
    created_at: int
    upload_id: str
    object: Literal["upload.part"] = "upload.part"


def router(services: Services) -> APIRouter:
    """The routes of uploads."""
    routes = APIRouter(prefix="/v1", tags=["openai"])
    chunked, max_bytes = services.chunked_uploads, services.settings.max_upload_mb * 2**20

    @routes.post("/uploads", response_model=UploadObject, openapi_extra=_takes(schema_of(UploadBody)))
    async def create_upload(request: Request) -> UploadObject | NoAnswer:
        """Begin to upload a file in parts, which may come within an hour."""
        try:
            body = parse(UploadBody, await json_body(request, MAX_BODY_BYTES), {})
        except ClientLeft:
            return NoAnswer()
        check_neutral(body.model_extra, {})
        if body.bytes > max_bytes:
            raise TooLarge(f"bytes {body.bytes:,} is more than {max_bytes:,}, the setting max_upload_mb", "bytes")
        seconds = kept_seconds(body.purpose, None if body.expires_after is None else body.expires_after.seconds)
        owner = request.state.caller.owner
        return shown_upload(await chunked.create(owner, body.filename, body.purpose, body.bytes, seconds))

    @routes.post(
        "/uploads/{upload_id}/parts",
        response_model=PartObject,
        openapi_extra=_takes(PART_FORM, "multipart/form-data"),
    )
    async def add_part(request: Request, upload_id: str) -> PartObject | NoAnswer:
        """Add a part, of up to 64 MiB, in any order and beside others. It is on the disk when this answers."""
        try:
            return shown_part(await _received(request, upload_id, chunked, services.uploads))
        except ClientLeft:
            return NoAnswer()

    @routes.post(
        "/uploads/{upload_id}/complete", response_model=UploadObject, openapi_extra=_takes(schema_of(CompleteBody))
    )
    async def complete_upload(request: Request, upload_id: str) -> UploadObject | NoAnswer:
        """Make a file of parts, in the order of their ids. Asked again it answers the same."""
        try:
            body = parse(CompleteBody, await json_body(request, MAX_BODY_BYTES), {})
        except ClientLeft:
            return NoAnswer()
        check_neutral(body.model_extra, {})
        return shown_upload(*await chunked.complete(request.state.caller.owner, upload_id, body.part_ids, body.md5))

    @routes.post("/uploads/{upload_id}/cancel")
    async def cancel_upload(request: Request, upload_id: str) -> UploadObject:
        """Give an upload up. Its parts are removed."""
        return shown_upload(await chunked.cancel(request.state.caller.owner, upload_id))

    return routes


def _takes(schema: Mapping[str, object], media_type: str = "application/json") -> dict[str, object]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


async def _received(request: Request, upload_id: str, chunked: ChunkedUploads, uploads: Uploads) -> UploadPart:
    upload = await chunked.pending(request.state.caller.owner, upload_id)
    async with uploads.incoming(announced_bytes(request)) as incoming:

        async def take(piece: bytes) -> None:
            if incoming.num_bytes + len(piece) > MAX_PART_BYTES:
                raise TooLarge(f"a part may have {MAX_PART_BYTES:,} bytes; send smaller ones", "data")
            await incoming.write(piece)

        form = await read_form(request, "data", take)
        if form.filename is None:
            raise InvalidInput("the form has no file; send the part in `data`, with a filename", "data")
        check_neutral(dict(form.fields), {})
        return await chunked.add_part(upload, incoming)


def shown_upload(upload: ChunkedUpload, file: Upload | None = None) -> UploadObject:
    """An upload in OpenAI's words."""
    return UploadObject(
        id=upload.id,
        bytes=upload.num_bytes,
        created_at=int(upload.created),
        expires_at=int(upload.expires),
        filename=upload.name,
        purpose=upload.purpose,
        status=state_of(upload),
        file=None if file is None else shown_file(file),
    )


def shown_part(part: UploadPart) -> PartObject:
    """A part in OpenAI's words."""
    return PartObject(id=part.id, created_at=int(part.created), upload_id=part.upload_id)
