"""Files that come in parts: each part a file and a row, and at the end one file of them; knows no HTTP and no content.

A part lies at `uploads/UPLOAD/PART` below the home folder, and its row comes when it is on the disk. The row of the
file that they become is written in the commit that ends the upload, so it is completed once, whatever dies.
"""

import asyncio
import hashlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, Engine

from smelt.control.sessions import ask
from smelt.control.uploads import CONTENT, GRACE_S, Incoming, Uploads, room_in, shown_name, suffix_of
from smelt.disk import check_room, sync
from smelt.errors import InvalidInput, NotFound, RateLimited, SmeltError, StorageError, TooLarge
from smelt.storage import records, upload_rows
from smelt.storage.records import ChunkedUpload, Upload, UploadPart
from smelt.storage.upload_rows import CANCELLED, COMPLETED, EXPIRED, PENDING
from smelt.storage.writer import Writer

PREFIX = "upload_"
LIFE_S = 3600.0  # that an upload has for its parts
KEPT_S = 86_400.0  # that is remembered how it ended
MAX_PENDING = 50
MAX_PARTS = 10_000
MAX_SENDINGS = 3  # of each byte: clients send a part up to three times where its answer is lost
JOIN_BYTES = 2**20  # that are copied at a time

T = TypeVar("T")


class ChunkedUploads:
    """The uploads in parts of one home folder, which become files of its `Uploads`."""

    def __init__(self, uploads: Uploads, database: Engine, writer: Writer) -> None:
        self._uploads = uploads
        self._database = database
        self._writer = writer

    async def create(
        self, owner: str, name: str, purpose: str, num_bytes: int, file_seconds: float | None
    ) -> ChunkedUpload:
        """Begin one. InvalidInput, RateLimited where the owner has too many, OutOfSpace where there is no room."""
        check_room(self._uploads.folder, num_bytes)
        created = time.time()
        upload = ChunkedUpload(
            id=f"{PREFIX}{secrets.token_hex(12)}",
            owner=owner,
            created=created,
            name=shown_name(name, "filename"),
            purpose=purpose,
            num_bytes=num_bytes,
            expires=created + LIFE_S,
            file_seconds=file_seconds,
        )
        await self._write(partial(_begin, upload=upload))
        return upload

    async def pending(self, owner: str, upload_id: str) -> ChunkedUpload:
        """The owner's upload of that id. NotFound, InvalidInput where it takes no parts any more."""
        upload = await asyncio.to_thread(ask, self._database, partial(_get, owner=owner, upload_id=upload_id))
        check_pending(upload)
        return upload

    async def add_part(self, upload: ChunkedUpload, incoming: Incoming) -> UploadPart:
        """The part, once it is on the disk. InvalidInput, TooLarge where the upload has no place for it."""
        await incoming.flush()
        if not incoming.num_bytes:
            raise InvalidInput("the part is empty; leave it out", "data")
        part = UploadPart(
            id=f"part_{secrets.token_hex(12)}", owner=upload.owner, upload_id=upload.id, num_bytes=incoming.num_bytes
        )
        await asyncio.to_thread(self._place, incoming, part)
        try:
            await self._write(partial(_add_part, part=part))
        except SmeltError:
            await asyncio.to_thread(self._path(part).unlink, missing_ok=True)
            raise
        return part

    async def complete(
        self, owner: str, upload_id: str, part_ids: Sequence[str], md5: str | None = None
    ) -> tuple[ChunkedUpload, Upload]:
        """The upload and the file that its parts are in that order; asked a second time it changes nothing.

        NotFound, InvalidInput where the parts are not what was announced, OutOfSpace.
        """
        read = partial(_with_parts, owner=owner, upload_id=upload_id)
        upload, parts = await asyncio.to_thread(ask, self._database, read)
        file_id = _file_id(upload, part_ids, md5)
        if (done := await self._completed(upload, file_id)) is not None:
            return done
        chosen = _chosen(upload, {part.id: part for part in parts}, part_ids)
        file = _file_of(upload, file_id)
        try:
            async with self._uploads.incoming(upload.num_bytes) as incoming:
                await asyncio.to_thread(self._join, chosen, incoming.folder / CONTENT, md5)
                await self._uploads.place(incoming, file)
        except FileNotFoundError:  # somebody has ended it meanwhile
            upload, _ = await asyncio.to_thread(ask, self._database, read)
            if (done := await self._completed(upload, file_id)) is None:
                raise StorageError(f"a part of {upload.id} is missing on the disk; send it again") from None
            return done
        upload, file = await self._write(partial(_complete, upload=upload, file=file))
        await asyncio.to_thread(self._remove_folder, upload.id)
        return upload, file

    async def _completed(self, upload: ChunkedUpload, file_id: str) -> tuple[ChunkedUpload, Upload] | None:
        """The upload and its file where it has ended with that one; None while it is pending. InvalidInput."""
        if (upload.state, upload.file_id) == (COMPLETED, file_id):
            return upload, await self._uploads.find(upload.owner, file_id)
        check_pending(upload)
        return None

    async def cancel(self, owner: str, upload_id: str) -> ChunkedUpload:
        """Give an upload up, with its parts. NotFound, InvalidInput where it has ended otherwise."""
        upload = await self._write(partial(_cancel, owner=owner, upload_id=upload_id))
        await asyncio.to_thread(self._remove_folder, upload.id)
        return upload

    async def tidy(self) -> None:
        """End uploads whose time is over, and remove parts that nobody needs; to be called every now and then."""
        await self._write(partial(upload_rows.expire, now=time.time(), kept_s=KEPT_S))
        known = await asyncio.to_thread(ask, self._database, partial(records.of_all_owners, kind=ChunkedUpload))
        await asyncio.to_thread(self._remove_ended, {upload.id: upload.state for upload in known})

    def _path(self, part: UploadPart) -> Path:
        return self._uploads.folder / part.upload_id / part.id

    def _place(self, incoming: Incoming, part: UploadPart) -> None:
        """Give a part its place, so that it survives a power loss."""
        path, content = self._path(part), incoming.folder / CONTENT
        with room_in(self._uploads.folder):
            sync(content)
            path.parent.mkdir(exist_ok=True)
            content.rename(path)
            sync(path.parent)
            sync(self._uploads.folder)

    def _join(self, parts: Sequence[UploadPart], target: Path, md5: str | None) -> None:
        """Write parts one after the other. InvalidInput where they are gone, or their checksum is another."""
        digest = hashlib.md5(usedforsecurity=False)
        with room_in(self._uploads.folder), target.open("wb") as joined:
            for part in parts:
                for piece in _pieces(self._path(part)):
                    joined.write(piece)
                    if md5 is not None:
                        digest.update(piece)
        if md5 is not None and digest.hexdigest() != md5.lower():
            raise InvalidInput(
                f"in that order the parts have the md5 {digest.hexdigest()}, not {md5}; check order and content", "md5"
            )

    def _remove_folder(self, upload_id: str) -> None:
        shutil.rmtree(self._uploads.folder / upload_id, ignore_errors=True)

    def _remove_ended(self, states: dict[str, str]) -> None:
        for folder in self._uploads.folder.glob(f"{PREFIX}*"):
            state = states.get(folder.name)
            # One without a row may have been begun since they were read.
            is_ended = state != PENDING if state is not None else time.time() - folder.stat().st_mtime >= GRACE_S
            if is_ended:
                self._remove_folder(folder.name)

    async def _write(self, run: Callable[[Connection], T]) -> T:
        return await asyncio.wrap_future(self._writer.write(run))


def state_of(upload: ChunkedUpload) -> str:
    """pending, completed, cancelled or expired, as of now."""
    return EXPIRED if upload.state == PENDING and upload.expires <= time.time() else upload.state


def check_pending(upload: ChunkedUpload) -> None:
    """InvalidInput, with what to do, where an upload has ended."""
    if (state := state_of(upload)) == PENDING:
        return
    ended = {
        COMPLETED: f"is completed: its file is {upload.file_id}; for another file begin another upload",
        CANCELLED: "was cancelled; begin another upload",
        EXPIRED: f"has expired, {LIFE_S / 60:.0f} minutes after it began; begin another upload",
    }
    raise InvalidInput(f"{upload.id} {ended[state]}", "upload_id")


def _begin(connection: Connection, upload: ChunkedUpload) -> None:
    if upload_rows.num_pending(connection, upload.owner, upload.created) >= MAX_PENDING:
        raise RateLimited(f"{MAX_PENDING} of your uploads are pending; complete one of them, or cancel it", 60)
    records.add(connection, upload)


def _get(connection: Connection, owner: str, upload_id: str) -> ChunkedUpload:
    found = records.find(connection, ChunkedUpload, owner, id=upload_id)
    if not found:
        raise NotFound(f"there is no upload {upload_id[:80]!r}")
    return found[0]


def _with_parts(connection: Connection, owner: str, upload_id: str) -> tuple[ChunkedUpload, list[UploadPart]]:
    upload = _get(connection, owner, upload_id)
    return upload, records.find(connection, UploadPart, owner, upload_id=upload_id)


def _add_part(connection: Connection, part: UploadPart) -> None:
    upload = _get(connection, part.owner, part.upload_id)
    check_pending(upload)
    num_parts, num_bytes = upload_rows.held(connection, upload.id)
    if num_parts >= MAX_PARTS:
        raise TooLarge(f"{upload.id} has {MAX_PARTS:,} parts, and may have no more; send larger ones", "data")
    if part.num_bytes > upload.num_bytes or num_bytes + part.num_bytes > MAX_SENDINGS * upload.num_bytes:
        raise TooLarge(
            f"{upload.id} was announced with {upload.num_bytes:,} bytes, and its parts have more; begin another upload "
            "with all the bytes of the file",
            "data",
        )
    records.add(connection, part)


def _file_id(upload: ChunkedUpload, part_ids: Sequence[str], md5: str | None) -> str:
    """The same for the same parts, so that whoever asks again gets the same file."""
    digest = hashlib.sha256("\n".join([upload.id, (md5 or "").lower(), *part_ids]).encode())
    return f"file-{digest.hexdigest()[:24]}"


def _file_of(upload: ChunkedUpload, file_id: str) -> Upload:
    created = time.time()
    return Upload(
        id=file_id,
        owner=upload.owner,
        created=created,
        name=upload.name,
        purpose=upload.purpose,
        suffix=suffix_of(upload.name),
        num_bytes=upload.num_bytes,
        expires=None if upload.file_seconds is None else created + upload.file_seconds,
    )


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(JOIN_BYTES):
            yield piece


def _chosen(upload: ChunkedUpload, parts: dict[str, UploadPart], part_ids: Sequence[str]) -> list[UploadPart]:
    """The parts of those ids. NotFound, InvalidInput where they are not as long as was announced."""
    for part_id in part_ids:
        if part_id not in parts:
            raise NotFound(f"there is no part {part_id[:80]!r} of {upload.id}")
    if len(set(part_ids)) < len(part_ids):
        raise InvalidInput("part_ids has a part twice; name each once", "part_ids")
    num_bytes = sum(parts[part_id].num_bytes for part_id in part_ids)
    if num_bytes != upload.num_bytes:
        raise InvalidInput(
            f"these parts have {num_bytes:,} bytes, and {upload.num_bytes:,} were announced; name all parts, or begin "
            "another upload with the right number of bytes",
            "part_ids",
        )
    return [parts[part_id] for part_id in part_ids]


def _complete(connection: Connection, upload: ChunkedUpload, file: Upload) -> tuple[ChunkedUpload, Upload]:
    now = _get(connection, upload.owner, upload.id)
    if (now.state, now.file_id) == (COMPLETED, file.id):  # somebody asked at the same time
        return now, records.get(connection, Upload, file.owner, file.id)
    if now.state != PENDING:
        check_pending(now)
    completed = replace(now, state=COMPLETED, file_id=file.id)
    records.add(connection, file)
    records.replace(connection, completed)
    upload_rows.remove_parts(connection, upload.id)
    return completed, file


def _cancel(connection: Connection, owner: str, upload_id: str) -> ChunkedUpload:
    upload = _get(connection, owner, upload_id)
    if upload.state == CANCELLED:
        return upload
    check_pending(upload)
    cancelled = replace(upload, state=CANCELLED)
    records.replace(connection, cancelled)
    upload_rows.remove_parts(connection, upload_id)
    return cancelled
