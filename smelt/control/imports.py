"""Imports that are asked of a server: accepted into the ledger, done one after the other, told of; knows no HTTP.

A source is a model of the hub, or one below the home folder: any other path would make the server read what its sender
cannot. The work is done by a thread of this process. One that dies with it begins again at the next start, and a model
that it had finished is not made twice.
"""

import asyncio
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from smelt.control.completions import Status
from smelt.control.model_files import kept_files
from smelt.control.models import check_free, import_model, job_of
from smelt.control.server_work import Job, Note, Progress, ServerWork
from smelt.errors import AlreadyExists, InvalidInput, NotFound
from smelt.models.hub import REPOSITORY, hub_folder
from smelt.models.registry import HUB_NAMES, model_in
from smelt.settings import Settings
from smelt.storage.futures import Ledger
from smelt.types import LOCAL_OWNER

KIND = "import"
HUB = "hf:"


class ImportRequest(msgspec.Struct, frozen=True):
    """What is asked for."""

    source: str
    name: str


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


class Imports:
    """The imports of one server. They belong to it, and not to whoever asked. `running` does them."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings = settings
        self._work = ServerWork(ledger, KIND, ImportRequest, self._import)

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
        return _described(await self._work.accept(LOCAL_OWNER, ImportRequest(source, name)))

    async def all(self) -> list[ImportJob]:
        """The last ones, newest first; those that are long over are forgotten."""
        return [_described(job) for job in await self._work.all(LOCAL_OWNER)]

    async def read(self, job_id: str, wait_s: float = 0.0) -> ImportJob:
        """How one stands; waits so long for its end. NotFound."""
        return _described(await self._work.read(LOCAL_OWNER, job_id, wait_s))

    async def cancel(self, job_id: str) -> ImportJob:
        """Give one up, and what it has fetched or copied so far; one that is over stays as it is. NotFound."""
        return _described(await self._work.cancel(LOCAL_OWNER, job_id))

    def running(self) -> AbstractAsyncContextManager[None]:
        """Do what is asked while the block runs."""
        return self._work.running()

    def _import(self, job_id: str, _owner: str, request: ImportRequest, progress: Note) -> None:
        """Make the model, unless this very job had made it before its process died."""
        models, source, name = self._settings.models, request.source, request.name
        if job_of(name, models) == job_id:
            return
        try:
            folder = _folder_in(self._settings.home, source) or hub_folder(*_repositories(source), progress=progress)
            import_model(folder, name, models, source, progress, job_id)
        except AlreadyExists:
            if job_of(name, models) != job_id:
                raise

    def _check(self, source: str, name: str) -> None:
        check_free(name, self._settings.models)
        _folder_in(self._settings.home, source)


def _described(job: Job[ImportRequest]) -> ImportJob:
    error, error_type = (job.failure.message, job.failure.error) if job.failure else (None, None)
    request = job.request
    return ImportJob(job.id, job.created, request.source, request.name, job.status, job.progress, error, error_type)


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
