"""Datasets that are asked of a server: checked, made one after the other in a process apart, told of; knows no HTTP.

A source is an uploaded file, text that is built in, a web address of a public machine, or a dataset of the hub: a path
would make the server read what its sender cannot.
"""

import asyncio
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import msgspec
from pydantic import Field

from smelt.configs import Config, validated
from smelt.control.datasets import DatasetInfo, Row, info, infos, no_such_dataset, open_for, remove, rows
from smelt.control.server_work import Job, Note, Progress, ServerWork
from smelt.control.uploads import Uploads
from smelt.data.bpe import is_tiktoken_name
from smelt.data.datasets import MANIFEST_FILE, dataset_folder, open_dataset
from smelt.data.preparing_process import Order, prepare_apart
from smelt.data.sources import BUILTINS, parse_hub_spec
from smelt.errors import AlreadyExists, DataError, Forbidden, InvalidInput, NotFound
from smelt.models.hub import REPOSITORY
from smelt.settings import Settings
from smelt.storage.futures import Ledger

KIND = "dataset"
State = Literal["queued", "preparing", "ready", "failed", "damaged"]
UNFINISHED = ("queued", "in_progress")
Split = Literal["train", "val"]
NAME_HELP = "up to 64 letters, digits, dots, dashes and underscores"


class DatasetConfig(Config):
    """What to make a dataset of, and how."""

    name: str = Field(description=NAME_HELP)
    source: str | None = Field(None, description="builtin:pydoc, an http(s) address, or hf:ORG/NAME[:config][:split]")
    file_id: str | None = Field(
        None, description="an uploaded file: .txt .md .jsonl .json .csv .tsv .parquet, .gz .zst"
    )
    tokenizer: str = Field("bpe:4096", description="bytes, char, bpe:N, or one of tiktoken's, such as gpt2")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="part of the documents kept for validation")
    block_size: int = Field(128, ge=1, description="tokens that each split must hold at least")
    column: str = Field("text", max_length=200, description="field of a record that holds the text")
    errors: Literal["strict", "skip"] = Field("strict", description="stop at the first bad record, or leave them out")


class DatasetRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A checked one, as the ledger keeps it. `file`: a path below the home folder, of an upload."""

    name: str
    source: str
    file: str | None
    tokenizer: str
    val_fraction: float
    block_size: int
    column: str
    errors: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetStatus:
    """A dataset, or one that is being made. What is None is not known before it is made."""

    name: str
    owner: str
    state: State
    error: str | None = None  # why it failed, or is damaged
    progress: Progress = Progress()
    source: str
    tokenizer: str
    created: float  # seconds since 1970
    num_bytes: int | None = None  # on the disk, as are the others
    num_source_bytes: int | None = None
    num_skipped: int | None = None  # bad records that were left out
    vocab_size: int | None = None
    num_train_tokens: int | None = None
    num_train_documents: int | None = None
    num_val_tokens: int | None = None
    num_val_documents: int | None = None


class DatasetRequests:
    """The datasets of one server: those in its folder, seen together with what its ledger knows of them."""

    def __init__(self, settings: Settings, ledger: Ledger, uploads: Uploads) -> None:
        self._settings = settings
        self._uploads = uploads
        self._work = ServerWork(ledger, KIND, DatasetRequest, self._make)

    def running(self) -> AbstractAsyncContextManager[None]:
        """Make what is asked for while the block runs."""
        return self._work.running()

    async def create(self, values: dict[str, Any], owner: str, *, may_use_hub: bool) -> DatasetStatus:
        """Accept a dataset: when this returns it will be made, whatever dies.

        ConfigError and InvalidInput say what is wrong; AlreadyExists where the name is taken; NotFound for a file that
        the owner does not have; Forbidden for the hub, which only administrators have the server read.
        """
        config = validated(DatasetConfig, values)
        await asyncio.to_thread(self._check_free, config.name)
        if any(job.status in UNFINISHED and job.request.name == config.name for job in await self._work.all(None)):
            raise AlreadyExists(f"a dataset {config.name!r} is being made already; choose another name")
        check_tokenizer(config.tokenizer)
        source, file = await self._source(config, owner, may_use_hub)
        options = config.model_dump(include={"tokenizer", "val_fraction", "block_size", "column", "errors"})
        request = DatasetRequest(name=config.name, source=source, file=file, **options)
        return _of_job(await self._work.accept(owner, request))

    async def all(self, owner: str | None = None) -> list[DatasetStatus]:
        """Every dataset that an owner may use, or all: those that are made, and those that are not there yet."""
        jobs = await self._work.all(owner)
        made = [_of_info(each) for each in await asyncio.to_thread(infos, self._settings.datasets, owner)]
        return [*made, *_open_jobs(jobs, {each.name for each in made})]

    async def read(self, name: str, owner: str | None = None, wait_s: float = 0.0) -> DatasetStatus:
        """How one stands; waits so long for its end. NotFound where there is none of that name for the owner."""
        job = next((job for job in await self._work.all(owner) if job.request.name == name), None)
        if job is not None and job.status in UNFINISHED and wait_s > 0:
            job = await self._work.read(job.owner, job.id, wait_s)
        try:
            return _of_info(await asyncio.to_thread(info, self._settings.datasets, name, owner))
        except NotFound:
            if job is None or job.status == "cancelled" or job.status == "completed":
                raise no_such_dataset(name) from None
            return _of_job(job)

    async def rows(self, name: str, owner: str | None, split: Split, offset: int, limit: int) -> tuple[list[Row], int]:
        """Documents as text, and how many the split has. NotFound, DataError."""
        return await asyncio.to_thread(self._rows, name, owner, split, offset, limit)

    async def remove(self, name: str, owner: str | None = None) -> None:
        """Remove a dataset; one that is being made is given up. NotFound, InUse while a run trains on it."""
        gave_up = False
        for job in await self._work.all(owner):
            if job.request.name == name and job.status in UNFINISHED:
                gave_up = (await self._work.cancel(job.owner, job.id)).status == "cancelled"
        if gave_up:
            return
        try:
            await asyncio.to_thread(remove, self._settings.datasets, name, owner)
        except NotFound:
            if not await self._forget_failures(name, owner):
                raise

    async def _forget_failures(self, name: str, owner: str | None) -> bool:
        """Whether there was one that could not be made, and now is no longer listed."""
        failed = [job for job in await self._work.all(owner) if job.request.name == name and job.status == "failed"]
        for job in failed:
            await self._work.forget(job.owner, job.id)
        return bool(failed)

    async def _source(self, config: DatasetConfig, owner: str, may_use_hub: bool) -> tuple[str, str | None]:
        """What to call the source, and the upload's place below the home folder."""
        if (config.source is None) == (config.file_id is None):
            raise InvalidInput("what of? give either source or file_id (or a file, as a form)", param="source")
        if config.file_id is not None:
            upload = await self._uploads.find(owner, config.file_id)
            return upload.name, str(self._uploads.path(upload).relative_to(self._settings.home))
        assert config.source is not None
        check_source(config.source, may_use_hub)
        return config.source, None

    def _check_free(self, name: str) -> None:
        if (dataset_folder(self._settings.datasets, name) / MANIFEST_FILE).exists():
            raise AlreadyExists(f"a dataset {name!r} exists already; remove it, or choose another name")

    def _make(self, job_id: str, owner: str, request: DatasetRequest, progress: Note) -> None:
        """Make the dataset, unless this very job had made it before its process died."""
        folder = self._settings.datasets
        if (folder / request.name / MANIFEST_FILE).exists() and open_dataset(
            folder / request.name
        ).manifest.job == job_id:
            return
        file = None if request.file is None else str(self._settings.home / request.file)
        order = Order(
            **{**msgspec.structs.asdict(request), "file": file}, datasets_folder=str(folder), owner=owner, job=job_id
        )
        prepare_apart(order, progress)

    def _rows(self, name: str, owner: str | None, split: Split, offset: int, limit: int) -> tuple[list[Row], int]:
        dataset = open_for(self._settings.datasets, name, owner)
        return rows(dataset, split, offset, limit), dataset.split(split).num_documents


def check_tokenizer(name: str) -> None:
    """InvalidInput for a tokenizer that a request cannot name: a path would lead to files of the server's."""
    if name not in ("bytes", "char") and not name.startswith("bpe:") and not is_tiktoken_name(name):
        raise InvalidInput(f"tokenizer {name!r} is unknown; use bytes, char, bpe:N or gpt2", param="tokenizer")


def check_source(source: str, may_use_hub: bool) -> None:
    """InvalidInput for what no request may name; Forbidden for the hub, unless its use is allowed."""
    scheme, _, rest = source.partition(":")
    if not source.isprintable() or len(source) > 2000:
        raise InvalidInput("source is too long, or holds characters that cannot be printed", param="source")
    if scheme in ("http", "https") and rest.startswith("//"):
        return
    if scheme == "builtin" and rest in BUILTINS:
        return
    if scheme == "hf":
        try:
            name, _, _ = parse_hub_spec(source)
        except DataError as error:
            raise InvalidInput(str(error), param="source") from None
        if not REPOSITORY.fullmatch(name):
            raise InvalidInput(f"{source!r} is not a dataset of the hub; write hf:ORG/NAME", param="source")
        if not may_use_hub:
            raise Forbidden("a dataset of the hub may name files anywhere: an administrator adds it")
        return
    builtins = ", ".join(f"builtin:{name}" for name in BUILTINS)
    raise InvalidInput(
        f"source {source!r} is neither an http(s) address nor hf:ORG/NAME nor {builtins}; a file is uploaded, and a "
        f"folder is added on the server itself: smelt data add NAME --from FOLDER",
        param="source",
    )


def _open_jobs(jobs: list[Job[DatasetRequest]], made: set[str]) -> list[DatasetStatus]:
    """The last job of each name that is not made; one that was cancelled, or made and removed, is not told of."""
    seen = set(made)
    found = []
    for job in jobs:
        if job.request.name not in seen and job.status in (*UNFINISHED, "failed"):
            found.append(_of_job(job))
        seen.add(job.request.name)
    return found


def _of_job(job: Job[DatasetRequest]) -> DatasetStatus:
    states: dict[str, State] = {"queued": "queued", "in_progress": "preparing"}
    return DatasetStatus(
        name=job.request.name,
        owner=job.owner,
        state=states.get(job.status, "failed"),
        error=job.failure.message if job.failure else None,
        progress=job.progress,
        source=job.request.source,
        tokenizer=job.request.tokenizer,
        created=job.created,
    )


def _of_info(found: DatasetInfo) -> DatasetStatus:
    told = asdict(found)
    for name in ("folder", "problem", "dtype"):
        del told[name]
    if found.problem is None:
        return DatasetStatus(**told, state="ready")
    return DatasetStatus(**told, state="damaged", error="its files are damaged; remove it and add it again")
