"""Imports that are asked of a server: accepted into the ledger, done one after the other, told of; knows no HTTP.

A source is a model of the hub, or one below the home folder: any other path would make the server read what its sender
cannot. The work is done by a thread of this process. One that dies with it begins again at the next start, and a model
that it had finished is not made twice.
"""

import asyncio
import hashlib
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import msgspec

from smelt.control.completions import STATUSES, Status
from smelt.control.model_files import kept_files
from smelt.control.models import check_free, import_model, job_of
from smelt.errors import AlreadyExists, InvalidInput, NotFound, OutOfSpace, SmeltError, StaleEpoch, StorageError
from smelt.models.hub import REPOSITORY, hub_folder
from smelt.models.registry import HUB_NAMES, model_in
from smelt.settings import Settings
from smelt.storage.futures import Future, Granted, Ledger
from smelt.storage.transitions import Submission
from smelt.transport.failures import failure_of, is_of_the_user
from smelt.transport.messages import Failure
from smelt.types import LOCAL_OWNER

KIND = "import"
HUB = "hf:"
MAX_LISTED = 100
RETRY_SECONDS = 1.0

log = logging.getLogger(__name__)


class ImportRequest(msgspec.Struct, frozen=True):
    """What is asked for."""

    source: str
    name: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is, in bytes; `num_total` None: not known yet."""

    stage: str = ""  # fetching or copying; "" before there is anything to tell
    num_done: int = 0
    num_total: int | None = None


@dataclass(frozen=True, slots=True)
class ImportJob:
    """An import as it stands."""

    id: str
    created: float  # seconds since 1970
    source: str
    name: str
    status: Status
    progress: Progress
    error: str | None = None
    error_type: str | None = None  # the name of a class of smelt.errors


class _GivenUpError(SmeltError):
    """Nobody wants this import any more."""


class Imports:
    """The imports of one server. They belong to it, and not to whoever asked. `running` does them."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings = settings
        self._ledger = ledger
        self._progress: dict[str, Progress] = {}
        self._current: str | None = None  # the one that is being done
        self._given_up: set[str] = set()

    async def create(self, source: str, name: str) -> ImportJob:
        """Accept an import: when this returns it will be done, whatever dies. One that is under way is the same one.

        Raises InvalidInput and NotFound for a source that cannot be meant, AlreadyExists where the name is taken, or is
        being given to another source.
        """
        await asyncio.to_thread(self._check, source, name)
        for job in await self.all():
            if job.name == name and job.status in ("queued", "in_progress"):
                if job.source == source:
                    return job
                raise AlreadyExists(f"{name!r} is being imported from {job.source} already: {job.id}")
        body = msgspec.msgpack.encode(ImportRequest(source, name))
        submission = Submission(LOCAL_OWNER, KIND, hashlib.sha256(body).hexdigest(), body)
        return await self.read(await self._ledger.accept(submission))

    async def all(self) -> list[ImportJob]:
        """The last ones, newest first; those that are long over are forgotten."""
        futures = await self._ledger.recent(LOCAL_OWNER, KIND, MAX_LISTED)
        return [self._job(future) for future in futures if future.request is not None]

    async def read(self, job_id: str, wait_s: float = 0.0) -> ImportJob:
        """How one stands; waits so long for its end. NotFound."""
        future = await self._ledger.read(LOCAL_OWNER, job_id)
        if future.kind != KIND or future.request is None:
            raise NotFound(f"there is no import {job_id!r}")
        return self._job(await self._ledger.wait(LOCAL_OWNER, job_id, wait_s) if wait_s > 0 else future)

    async def cancel(self, job_id: str) -> ImportJob:
        """Give one up, and what it has fetched or copied so far; one that is over stays as it is. NotFound."""
        await self.read(job_id)
        if await self._ledger.cancel(LOCAL_OWNER, job_id) and job_id == self._current:
            self._given_up.add(job_id)
        return await self.read(job_id)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Do what is asked while the block runs."""
        working = asyncio.create_task(self._work())
        try:
            yield
        finally:
            working.cancel()
            await asyncio.wait([working])

    async def _work(self) -> None:
        epoch = await self._ledger.open_epoch()
        try:
            while True:
                for granted in await self._ledger.next_grants(epoch, 1, (KIND,)):
                    await self._do(granted, epoch)
        except Exception:
            log.exception("nothing is imported any more, until the next start")
            raise
        finally:
            await self._ledger.release(epoch, died=False)

    async def _do(self, granted: Granted, epoch: int) -> None:
        """Do one, and write down what came of it as soon as the disk takes it."""
        self._current = granted.id
        failure = await self._outcome(granted)
        self._current = None
        self._given_up.discard(granted.id)
        body, category = b"", None
        if failure is not None:
            body = msgspec.msgpack.encode(failure)
            category = "user" if is_of_the_user(failure) else "server"
        while True:
            try:
                await self._ledger.finish(granted.id, epoch, body, category)
            except StaleEpoch:
                pass  # it was cancelled
            except (OutOfSpace, StorageError) as error:
                log.error("cannot keep the end of an import: %s", error)  # noqa: TRY400 - no bug of ours
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self._progress.pop(granted.id, None)
            return

    async def _outcome(self, granted: Granted) -> Failure | None:
        if granted.request is None:
            return Failure("StorageError", "the request was kept in a file that is damaged or gone; send it again")
        request = msgspec.msgpack.decode(granted.request, type=ImportRequest)
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Failure | None] = loop.create_future()

        def work() -> None:
            failure = self._import(granted.id, request)
            with suppress(RuntimeError):  # the loop is closed: the next process begins again
                loop.call_soon_threadsafe(_settle, ended, failure)

        # A daemon, so that the end of the process does not wait for it.
        threading.Thread(target=work, name="import", daemon=True).start()
        return await ended

    def _import(self, job_id: str, request: ImportRequest) -> Failure | None:
        """Make the model, unless this very job had made it before its process died."""
        models, source, name = self._settings.models, request.source, request.name
        if job_of(name, models) == job_id:
            return None
        try:
            progress = partial(self._note, job_id)
            folder = _folder_in(self._settings.home, source) or hub_folder(*_repositories(source), progress=progress)
            import_model(folder, name, models, source, progress, job_id)
        except AlreadyExists as error:
            return None if job_of(name, models) == job_id else failure_of(error)
        except SmeltError as error:
            return failure_of(error)
        except Exception as bug:
            log.exception("the import of %s failed", source)
            return failure_of(bug)
        return None

    def _note(self, job_id: str, stage: str, num_done: int, num_total: int | None) -> None:
        if job_id in self._given_up:
            raise _GivenUpError("it was cancelled")
        self._progress[job_id] = Progress(stage, num_done, num_total)

    def _check(self, source: str, name: str) -> None:
        check_free(name, self._settings.models)
        _folder_in(self._settings.home, source)

    def _job(self, future: Future) -> ImportJob:
        request = msgspec.msgpack.decode(future.request or b"", type=ImportRequest)
        progress = self._progress.get(future.id, Progress())
        job = ImportJob(future.id, future.created, request.source, request.name, STATUSES[future.state], progress)
        if future.state != "failed":
            return job
        failure = msgspec.msgpack.decode(future.result or b"", type=Failure)
        return replace(job, error=failure.message, error_type=failure.error)


def _folder_in(home: Path, source: str) -> Path | None:
    """The model folder that a source means below the home folder; None where it means a model of the hub.

    InvalidInput for anything else, and for a checkpoint that has to be converted; NotFound where there is none.
    """
    if source in HUB_NAMES or source.startswith(HUB):
        for repository in _repositories(source):
            if not REPOSITORY.fullmatch(repository):
                raise InvalidInput(f"{source!r} is not a model of the hub; write hf:ORG/NAME", param="source")
        return None
    path = PurePosixPath(source)
    if not source.isprintable() or "://" in source or path.is_absolute() or {"..", "~"} & {*path.parts, source[:1]}:
        raise InvalidInput(
            f"source {source!r} is neither hf:ORG/NAME nor a path below the server's home folder, such as runs/NAME; "
            "a folder elsewhere is imported on the server itself: smelt models import FOLDER NAME",
            param="source",
        )
    real_home = home.resolve()
    place = (real_home / path).resolve()
    nothing = NotFound(f"the server's home folder has no model at {source!r}")
    if not source or not place.is_relative_to(real_home) or not place.exists():
        raise nothing
    try:
        folder = model_in(place)
        if folder.is_file():
            raise InvalidInput(
                f"{source!r} is a nanoGPT checkpoint, which has to be converted; on the server itself: "
                f"smelt models import PATH NAME",
                param="source",
            )
        files = kept_files(folder)
    except NotFound:
        raise nothing from None
    # Links are followed to where they really lead.
    if not all(file.resolve().is_relative_to(real_home) for file in (folder, *files)):
        raise nothing
    return folder


def _repositories(source: str) -> tuple[str, ...]:
    """What the hub may call it."""
    return HUB_NAMES.get(source, (source.removeprefix(HUB),))


def _settle(ended: "asyncio.Future[Failure | None]", failure: Failure | None) -> None:
    if not ended.done():
        ended.set_result(failure)
