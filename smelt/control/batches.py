"""Batches: files of requests that are answered within a time, whatever dies meanwhile; knows no HTTP and no endpoint.

A batch is a row, its requests are futures of a lane of its own, and its files lie in the home folder.
"""

import asyncio
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine

from smelt.control.batch_course import INPUT, Course, Desk, remove
from smelt.control.batch_lines import Answering, BatchLines
from smelt.control.completions import key_digest
from smelt.control.sessions import ask
from smelt.control.uploads import Uploads
from smelt.disk import sync
from smelt.errors import InvalidInput, NotFound, RateLimited, SeqReused
from smelt.storage import batch_rows, records
from smelt.storage.batch_rows import OVER
from smelt.storage.futures import Ledger
from smelt.storage.records import BatchJob
from smelt.storage.writer import Writer

FOLDER = "batches"
PURPOSE = "batch"
MAX_OPEN = 50  # batches of an owner that are not over


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What is asked for."""

    endpoint: str
    input_file_id: str
    window_s: float
    output_seconds: float | None = None  # that what comes of it is kept
    user_metadata: dict[str, Any] | None = None


class Batches:
    """The batches of one server. `running` sees them through."""

    def __init__(self, home: Path, database: Engine, writer: Writer, ledger: Ledger, uploads: Uploads) -> None:
        self._folder = home / FOLDER
        self._database = database
        self._writer = writer
        self._ledger = ledger
        self._uploads = uploads
        self._courses: dict[str, Course] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._desk: Desk | None = None

    async def create(self, owner: str, key_id: str | None, asked: BatchRequest, key: str | None = None) -> BatchJob:
        """Accept a batch: when this returns it will be answered, whatever dies.

        With a key of the caller's, the same request gets the same batch again; SeqReused where the key came with
        another. NotFound and InvalidInput say what is wrong with its file, RateLimited that the owner has too many.
        """
        now = time.time()
        batch = BatchJob(
            id=f"batch_{key_digest(owner, key)[:32] if key else secrets.token_hex(16)}",
            owner=owner,
            created=now,
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            key_id=key_id,
            deadline=now + asked.window_s,
            output_seconds=asked.output_seconds,
            user_metadata=asked.user_metadata,
        )
        if key is not None and (known := await self._known(batch)) is not None:
            return known
        upload = await self._uploads.find(owner, asked.input_file_id)
        if upload.purpose != PURPOSE:
            text = f"{upload.id} was uploaded with the purpose {upload.purpose}; upload it with {PURPOSE!r}"
            raise InvalidInput(text, "input_file_id")
        count = partial(batch_rows.num_unfinished, owner=owner)
        if await asyncio.to_thread(ask, self._database, count) >= MAX_OPEN:
            raise RateLimited(f"{MAX_OPEN} of your batches are not over; wait for one of them, or cancel it", 60)
        folder = self._folder / batch.id
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)  # it may have come and crashed
        await self._uploads.lend(upload, folder / INPUT)
        for each in (folder, self._folder):
            await asyncio.to_thread(sync, each)
        await asyncio.wrap_future(self._writer.write(partial(records.add, record=batch)))
        self._begin(batch)
        return batch

    async def _known(self, batch: BatchJob) -> BatchJob | None:
        """The batch that came with the same key, if one did. SeqReused where it is another."""
        try:
            known = await self.read(batch.owner, batch.id)
        except NotFound:
            return None
        asked = ("endpoint", "input_file_id", "output_seconds", "user_metadata")
        if any(getattr(known, name) != getattr(batch, name) for name in asked):
            raise SeqReused(f"that idempotency key came with another batch, {known.id}; use a new one")
        return known

    async def read(self, owner: str, batch_id: str) -> BatchJob:
        """How a batch stands. NotFound where the owner has none of that id."""
        read = partial(records.get, kind=BatchJob, owner=owner, record_id=batch_id)
        try:
            return self._live(await asyncio.to_thread(ask, self._database, read))
        except NotFound:
            raise NotFound(f"there is no batch {batch_id[:80]!r}") from None

    async def page(self, owner: str, limit: int, after: str | None = None) -> list[BatchJob]:
        """The owner's batches, newest first, from behind the one of that id. NotFound where there is none."""

        def read(connection: Connection) -> list[BatchJob]:
            return records.page(connection, BatchJob, owner, limit, after)

        return [self._live(batch) for batch in await asyncio.to_thread(ask, self._database, read)]

    async def cancel(self, owner: str, batch_id: str) -> BatchJob:
        """Give up what has no answer yet; a batch that is over stays as it is. NotFound."""
        await self.read(owner, batch_id)
        move = partial(
            batch_rows.move,
            owner=owner,
            batch_id=batch_id,
            expected=["validating", "in_progress"],
            now=time.time(),
            status="cancelling",
        )
        batch = await asyncio.wrap_future(self._writer.write(move))
        if batch.status == "cancelling" and batch_id in self._courses:
            self._courses[batch_id].cancel()
        return self._live(batch)

    @asynccontextmanager
    async def running(self, answering: Answering) -> AsyncIterator[None]:
        """See batches through while the block runs, those of earlier processes first."""
        lines = BatchLines(self._ledger, answering, self._note_ended)
        self._desk = Desk(self._folder, self._writer, self._ledger, self._uploads, lines)
        for owner, batch_id in await asyncio.to_thread(ask, self._database, batch_rows.unfinished):
            self._begin(await self.read(owner, batch_id))
        await self._remove_leftovers(self._desk)
        answering_lines = asyncio.create_task(lines.run())
        try:
            yield
        finally:
            self._desk = None
            tasks = [answering_lines, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _begin(self, batch: BatchJob) -> None:
        if self._desk is None:
            return  # the next process sees it through
        course = self._courses[batch.id] = Course(batch, self._desk)
        task = asyncio.create_task(course.run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _task: self._courses.pop(batch.id))

    def _note_ended(self, batch_id: str, seq: int, failed: bool) -> None:
        if (course := self._courses.get(batch_id)) is not None:
            course.note_ended(seq, failed)

    def _live(self, batch: BatchJob) -> BatchJob:
        """With the numbers of this moment."""
        course = self._courses.get(batch.id)
        if course is None or batch.status in OVER:
            return batch
        return replace(batch, num_completed=course.num_completed, num_failed=course.num_failed)

    async def _remove_leftovers(self, desk: Desk) -> None:
        """Of batches that were over, or were never accepted, when a process died."""
        with suppress(FileNotFoundError):
            for folder in await asyncio.to_thread(lambda: list(self._folder.iterdir())):
                if folder.name not in self._courses:
                    await remove(folder.name, desk)
                    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
