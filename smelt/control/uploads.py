"""Files that people upload, and those that are made for them: each a folder and a row; knows no HTTP and no content.

A file lies at `uploads/ID/content.SUFFIX` below the home folder. Its row comes when the whole file is on the disk, so
whoever sees it has all of it. What a client calls a file is kept in the row and never becomes a path.
"""

import asyncio
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from sqlalchemy import Connection, Engine

from smelt.control.sessions import ask
from smelt.disk import check_room, is_full, sync
from smelt.errors import AlreadyExists, InvalidInput, NotFound, OutOfSpace
from smelt.storage import records
from smelt.storage.records import Upload
from smelt.storage.writer import Writer

FOLDER = "uploads"
CONTENT = "content"
TEMPORARY = ".tmp-"
MAX_NAME_CHARS = 255
WRITE_BYTES = 2**20  # that are gathered before a thread writes them
GRACE_S = 3600.0  # that a folder without a row is kept: the row may be on its way
ID = re.compile(r"file-[0-9a-f]{24}")
# Readers choose by these; whatever else a name ends with tells them nothing.
SUFFIX = re.compile(r"(\.[a-z0-9]{1,8}){0,2}")


def new_file_id() -> str:
    """An id for a file."""
    return f"file-{secrets.token_hex(12)}"


class Incoming:
    """A file on its way in, in a temporary folder. It vanishes unless it is kept."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.num_bytes = 0
        self._file = (folder / CONTENT).open("wb")
        self._pieces: list[bytes] = []
        self._num_waiting = 0

    async def write(self, piece: bytes) -> None:
        """Take more of it. OutOfSpace."""
        self._pieces.append(piece)
        self.num_bytes += len(piece)
        self._num_waiting += len(piece)
        if self._num_waiting >= WRITE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Hand what was gathered to the system. OutOfSpace."""
        pieces, self._pieces, self._num_waiting = self._pieces, [], 0
        await asyncio.to_thread(self._write, pieces)

    def vanish(self) -> None:
        """Remove what is left of it."""
        self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, pieces: list[bytes]) -> None:
        with room_in(self.folder):
            self._file.writelines(pieces)
            self._file.flush()


class Uploads:
    """The files of one home folder. Nobody else writes to their folder while a server runs."""

    def __init__(self, home: Path, database: Engine, writer: Writer) -> None:
        self.folder = home / FOLDER
        self._database = database
        self._writer = writer

    @asynccontextmanager
    async def incoming(self, num_bytes: int = 0) -> AsyncIterator[Incoming]:
        """A file to write to while the block runs; `keep` it there, or it is gone afterwards.

        OutOfSpace where it is announced to have more bytes than there is room for.
        """
        check_room(self.folder, num_bytes)
        incoming = await asyncio.to_thread(Incoming, self.folder / f"{TEMPORARY}{secrets.token_hex(8)}")
        try:
            yield incoming
        finally:
            await asyncio.to_thread(incoming.vanish)

    async def keep(
        self, incoming: Incoming, owner: str, name: str, purpose: str, expires_s: float | None = None
    ) -> Upload:
        """The file, once it is on the disk and in the database. InvalidInput for an empty one or a name too long."""
        await incoming.flush()
        if not incoming.num_bytes:
            raise InvalidInput("the file is empty", "file")
        name = shown_name(name)
        suffix, created = suffix_of(name), time.time()
        expires = None if expires_s is None else created + expires_s
        upload = Upload(
            id=new_file_id(),
            owner=owner,
            created=created,
            name=name,
            purpose=purpose,
            suffix=suffix,
            num_bytes=incoming.num_bytes,
            expires=expires,
        )
        await self.place(incoming, upload)
        await self._add(upload)
        return upload

    async def adopt(self, file: Path, upload: Upload) -> Upload:
        """Give a file that was made here to its owner, under the id it has; done a second time it changes nothing."""
        async with self.incoming() as incoming:
            await asyncio.to_thread(link, file, incoming.folder / CONTENT)
            size = (await asyncio.to_thread(file.stat)).st_size
            upload = replace(upload, num_bytes=size, suffix=suffix_of(upload.name))
            await self.place(incoming, upload)
        with suppress(AlreadyExists):
            await self._add(upload)
        return upload

    async def place(self, incoming: Incoming, upload: Upload) -> None:
        """Put a file where whoever has its row finds it, so that it survives a power loss. OutOfSpace."""
        await asyncio.to_thread(self._place, incoming, upload)

    async def find(self, owner: str, file_id: str) -> Upload:
        """The owner's file of that id. NotFound, also where its time is over."""
        return await asyncio.to_thread(ask, self._database, partial(_find, owner=owner, file_id=file_id))

    async def page(
        self, owner: str, limit: int, after: str | None = None, *, newest_first: bool = True, purpose: str | None = None
    ) -> list[Upload]:
        """The owner's files in order of creation, from behind the one of that id. NotFound where there is none."""
        equal = {} if purpose is None else {"purpose": purpose}

        def read(connection: Connection) -> list[Upload]:
            return records.page(connection, Upload, owner, limit, after, newest_first=newest_first, **equal)

        found = await asyncio.to_thread(ask, self._database, read)
        return [upload for upload in found if not _is_over(upload)]

    def path(self, upload: Upload) -> Path:
        """Where its content lies."""
        return self.folder / upload.id / f"{CONTENT}{upload.suffix}"

    async def lend(self, upload: Upload, target: Path) -> None:
        """Have its content under another path too, where it stays when the file is deleted. NotFound if it is gone."""
        try:
            await asyncio.to_thread(link, self.path(upload), target)
        except FileNotFoundError:
            raise no_such_file(upload.id) from None

    async def delete(self, owner: str, file_id: str) -> None:
        """Remove a file. NotFound where the owner has none of that id."""
        upload = await self.find(owner, file_id)
        await self._remove(upload)

    async def tidy(self) -> None:
        """Remove files whose time is over, and what a crash has left; to be called every now and then."""
        known = await asyncio.to_thread(ask, self._database, partial(records.of_all_owners, kind=Upload))
        for upload in known:
            if _is_over(upload):
                with suppress(NotFound):  # its owner was faster
                    await self._remove(upload)
        await asyncio.to_thread(self._remove_orphans, {upload.id for upload in known})

    async def _remove(self, upload: Upload) -> None:
        delete = partial(records.delete, kind=Upload, owner=upload.owner, record_id=upload.id)
        await asyncio.wrap_future(self._writer.write(delete))
        await asyncio.to_thread(shutil.rmtree, self.folder / upload.id, ignore_errors=True)

    async def _add(self, upload: Upload) -> None:
        await asyncio.wrap_future(self._writer.write(partial(records.add, record=upload)))

    def _place(self, incoming: Incoming, upload: Upload) -> None:
        """Give it its folder; one that is there already stays."""
        content = incoming.folder / f"{CONTENT}{upload.suffix}"
        with room_in(self.folder):
            (incoming.folder / CONTENT).rename(content)
            sync(content)
            sync(incoming.folder)
            with suppress(FileExistsError):
                _rename(incoming.folder, self.folder / upload.id)
            sync(self.folder)

    def _remove_orphans(self, known: set[str]) -> None:
        for folder in self.folder.glob("*"):
            is_old = time.time() - folder.stat().st_mtime >= GRACE_S
            if is_old and folder.name not in known and folder.name.startswith((TEMPORARY, "file-")):
                shutil.rmtree(folder, ignore_errors=True)


def shown_name(name: str, param: str = "file") -> str:
    """What a client calls a file, without the folders that some of them send. InvalidInput where it is none."""
    last = PurePosixPath(name.replace("\\", "/")).name
    if not last or len(last) > MAX_NAME_CHARS or not last.isprintable():
        raise InvalidInput(f"a file's name has 1 to {MAX_NAME_CHARS} printable characters", param)
    return last


def suffix_of(name: str) -> str:
    """The suffixes of a name that say how to read a file, such as .jsonl.gz; "" where they could be anything else."""
    suffix = "".join(PurePosixPath(name).suffixes[-2:]).lower()
    last = PurePosixPath(name).suffix.lower()
    return next((each for each in (suffix, last) if SUFFIX.fullmatch(each)), "")


def no_such_file(file_id: str) -> NotFound:
    """What to say for an unknown id, and for one that is not the asker's."""
    return NotFound(f"there is no file {file_id[:80]!r}")


def _find(connection: Connection, owner: str, file_id: str) -> Upload:
    found = records.find(connection, Upload, owner, id=file_id) if ID.fullmatch(file_id) else []
    if not found or _is_over(found[0]):
        raise no_such_file(file_id)
    return found[0]


def _is_over(upload: Upload) -> bool:
    return upload.expires is not None and upload.expires <= time.time()


def link(file: Path, target: Path) -> None:
    """The same content under another path, in place of what is there: the same file, unless that is on another disk."""
    temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        os.link(file, temporary)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(file, temporary)
        sync(temporary)
    temporary.rename(target)


def _rename(folder: Path, target: Path) -> None:
    """FileExistsError where the target is there; systems differ in what they say."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(target) from None
        raise


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """OutOfSpace where the disk of a folder is full."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise OutOfSpace(f"the disk of {folder} is full; free some space and try again") from error
        raise
