"""Fine-tuning jobs: files checked, a run of the recipe asked for and followed, its result served; knows no HTTP.

A job is a row, and its run does the work: so it survives whatever a run survives. What the run's folder can tell is
not written down a second time.
"""

import asyncio
import hashlib
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine

from smelt.configs import RUN_METRICS
from smelt.control.catalogue import Catalogue
from smelt.control.completions import key_digest
from smelt.control.fine_tuning_story import Event, Story, events_of, read_story, table_of
from smelt.control.run_requests import NEVER_ACCEPTED, RunRequests
from smelt.control.runs import ENDED, Checkpoint, RunStatus, checkpoints_in
from smelt.control.sessions import ask
from smelt.control.trained_models import register_result
from smelt.control.uploads import Uploads
from smelt.data.training_examples import check_examples
from smelt.errors import DataError, InUse, InvalidInput, NotFound, OutOfSpace, SeqReused, SmeltError, StorageError
from smelt.models.registry import is_registered
from smelt.run_configs import FineTuneConfig, config_of
from smelt.storage import records
from smelt.storage.futures import Ledger
from smelt.storage.records import FineTuningJob, Upload
from smelt.storage.writer import Writer

PURPOSE = "fine-tune"
RESULT_PURPOSE = "fine-tune-results"
FILES = {"training_file": "data", "validation_file": "valid_data"}  # what a run calls a job's files
SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_BASE_CHARS = 100  # of a base model's name in that of what was made of it
OPEN = ("validating_files", "running")  # the server is at it; a paused one waits for its owner
OVER = ("succeeded", "failed", "cancelled")
LOOK_SECONDS = 60.0  # between two looks at a run of which nobody says anything
STOP_SECONDS = 30.0  # that a run may take to save a checkpoint
RETRY_SECONDS = 1.0

log = logging.getLogger(__name__)


class FineTuning:
    """The jobs of one server. `running` sees them through."""

    def __init__(
        self,
        models_folder: Path,
        database: Engine,
        writer: Writer,
        ledger: Ledger,
        uploads: Uploads,
        runs: RunRequests,
        catalogue: Catalogue,
    ) -> None:
        self._models_folder = models_folder
        self._database = database
        self._writer = writer
        self._ledger = ledger
        self._uploads = uploads
        self._runs = runs
        self._catalogue = catalogue
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._is_running = False

    async def create(
        self,
        owner: str,
        model: str,
        files: Mapping[str, str],
        config: Mapping[str, Any],
        suffix: str | None = None,
        user_metadata: dict[str, Any] | None = None,
        key: str | None = None,
    ) -> FineTuningJob:
        """Accept a job: when this returns it will be done, whatever dies.

        With a key of the caller's, the same request gets the same job again; SeqReused where the key came with another.
        `files`: training_file and maybe validation_file, by their ids. `config`: of a FineTuneConfig what is not its
        default. UnknownModel, NotFound and InvalidInput say what is wrong.
        """
        served = await self._catalogue.find(model)
        if not is_registered(served.name, self._models_folder):
            text = f"{model!r} is served from a folder of its own; to fine-tune it: smelt models import FOLDER NAME"
            raise InvalidInput(text, "model")
        for param, file_id in files.items():
            await self._find(owner, param, file_id)
        if suffix is not None and not SUFFIX.fullmatch(suffix):
            raise InvalidInput("suffix has 1 to 64 letters, digits, '.', '_' and '-'", "suffix")
        values = {**config, "recipe": "fine-tune", "model": served.name}
        config_of({**values, "data": "training_file"})  # says what is wrong with it
        job = FineTuningJob(
            id=f"ftjob-{key_digest(owner, key)[:24] if key else secrets.token_hex(12)}",
            owner=owner,
            model=served.name,
            request={**files, "config": values, "suffix": suffix},
            user_metadata=user_metadata,
        )
        if key is not None and (known := await self._known(job)) is not None:
            return known
        await asyncio.wrap_future(self._writer.write(partial(records.add, record=job)))
        self._begin(job)
        return job

    async def _known(self, job: FineTuningJob) -> FineTuningJob | None:
        """The job that came with the same key, if one did. SeqReused where it is another."""
        try:
            known = await self.read(job.owner, job.id)
        except NotFound:
            return None
        if (known.model, known.request, known.user_metadata) != (job.model, job.request, job.user_metadata):
            raise SeqReused(f"that idempotency key came with another job, {known.id}; use a new one")
        return known

    async def _find(self, owner: str, param: str, file_id: str) -> Upload:
        try:
            upload = await self._uploads.find(owner, file_id)
        except NotFound as missing:
            raise InvalidInput(f"{param}: {missing}", param) from None
        if upload.purpose != PURPOSE:
            text = f"{file_id} was uploaded with the purpose {upload.purpose}; upload it with {PURPOSE!r}"
            raise InvalidInput(text, param)
        return upload

    async def read(self, owner: str, job_id: str) -> FineTuningJob:
        """A job. NotFound where the owner has none of that id."""
        read = partial(records.get, kind=FineTuningJob, owner=owner, record_id=job_id)
        try:
            return await asyncio.to_thread(ask, self._database, read)
        except NotFound:
            raise NotFound(f"there is no fine-tuning job {job_id[:80]!r}") from None

    async def page(
        self, owner: str, limit: int, after: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> list[FineTuningJob]:
        """The owner's jobs, newest first, from behind the one of that id; those with that metadata, if any is given.

        NotFound where the owner has none of that id.
        """
        wanted = (metadata or {}).items()

        def read(connection: Connection) -> list[FineTuningJob]:
            found: list[FineTuningJob] = []
            place = after
            while some := records.page(connection, FineTuningJob, owner, limit, place):
                found += [job for job in some if wanted <= (job.user_metadata or {}).items()]
                if len(found) >= limit:
                    break
                place = some[-1].id
            return found[:limit]

        return await asyncio.to_thread(ask, self._database, read)

    async def run_of(self, job: FineTuningJob) -> RunStatus | None:
        """How its run stands; None where it has none, or where somebody has removed that."""
        if job.run_id is None:
            return None
        try:
            return await self._runs.status(job.run_id)
        except NotFound:
            return None

    async def cancel(self, owner: str, job_id: str) -> FineTuningJob:
        """Give a job up, with a checkpoint of its run. InvalidInput where it is over already."""
        job = await self.read(owner, job_id)
        while job.state != "cancelled":
            if job.state in OVER:
                raise InvalidInput(f"{job_id} has {job.state} already")
            # Where it has got further meanwhile, this changes nothing, and it is tried again.
            job = await self._replace(job, state="cancelled", finished=time.time())
        run_id = job.run_id
        if run_id is not None:
            await self._runs.cancel(run_id)
        return job

    async def pause(self, owner: str, job_id: str) -> FineTuningJob:
        """Stop a job's run, with a checkpoint, until it is resumed. InvalidInput where it is not under way."""
        job = await self.read(owner, job_id)
        if job.state != "running" or job.run_id is None:
            raise InvalidInput(f"{job_id} is {job.state}; only a job that is queued or running can be paused")
        run_id = job.run_id
        job = await self._replace(job, state="paused")
        if job.state != "paused":
            raise InvalidInput(f"{job_id} has {job.state} already")
        if (await self._runs.cancel(run_id)).state in ("succeeded", "failed"):  # it was faster
            job = await self._replace(job, state="running")
            self._begin(job)
        return job

    async def resume(self, owner: str, job_id: str) -> FineTuningJob:
        """Let a paused job go on from its last checkpoint. InvalidInput where it is not paused."""
        job = await self.read(owner, job_id)
        if job.state != "paused" or job.run_id is None:
            raise InvalidInput(f"{job_id} is {job.state}; only a job that is paused can be resumed")
        await self._stopped(job.run_id)
        await self._runs.resume(job.run_id)
        job = await self._replace(job, state="running")
        self._begin(job)
        return job

    async def _stopped(self, run_id: str) -> None:
        """Wait for a run that was told to stop. InUse where it does not."""
        give_up = time.monotonic() + STOP_SECONDS
        while (await self._runs.status(run_id)).state not in ENDED:  # its lock announces nothing
            if time.monotonic() > give_up:
                raise InUse("its run is still saving its checkpoint; try again in a moment")
            await asyncio.sleep(0.1)

    async def events(self, job: FineTuningJob) -> list[Event]:
        """All that has happened to a job, in order."""
        return await asyncio.to_thread(lambda: events_of(job, *self._told(job)))

    async def checkpoints(self, job: FineTuningJob) -> list[tuple[Checkpoint, Story]]:
        """What is kept of a job's run, newest first, each with the whole story."""

        def read() -> list[tuple[Checkpoint, Story]]:
            story, _ = self._told(job)
            return [(checkpoint, story) for checkpoint in self._runs.runs.checkpoints(job.run_id or "")]

        return [] if await self.run_of(job) is None else await asyncio.to_thread(read)

    def _told(self, job: FineTuningJob) -> tuple[Story, float | None]:
        """What its run has told, and when it began."""
        try:
            entry, out_dir = self._runs.runs.find(job.run_id or "")
        except NotFound:
            return Story(), None
        return read_story(out_dir / RUN_METRICS, entry.started or entry.created), entry.started

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """See jobs through while the block runs, those of earlier processes first."""
        self._is_running = True
        for state in OPEN:
            read = partial(records.of_all_owners, kind=FineTuningJob, state=state)
            for job in await asyncio.to_thread(ask, self._database, read):
                self._begin(job)
        try:
            yield
        finally:
            self._is_running = False
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    def _begin(self, job: FineTuningJob) -> None:
        if not self._is_running:
            return  # the next process sees it through
        before = self._tasks.get(job.id)
        self._tasks[job.id] = task = asyncio.create_task(self._see_through(job.owner, job.id, before))
        task.add_done_callback(partial(self._note_end, job.id))

    def _note_end(self, job_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(job_id) is task:
            del self._tasks[job_id]

    async def _see_through(self, owner: str, job_id: str, before: asyncio.Task[None] | None) -> None:
        if before is not None:  # one at a time: it may be about to end
            await asyncio.wait([before])
        steps = {"validating_files": self._start, "running": self._follow}
        while (job := await self.read(owner, job_id)).state in OPEN:
            try:
                await steps[job.state](job)
            except (OutOfSpace, StorageError) as error:
                log.error("%s has to wait: %s", job_id, error)  # noqa: TRY400 - no bug of ours
                await asyncio.sleep(RETRY_SECONDS)
            except Exception as error:
                if not isinstance(error, SmeltError):
                    log.exception("%s failed", job_id)
                await self._fail(job, error)

    async def _start(self, job: FineTuningJob) -> None:
        """Check the files, and ask for the run."""
        values = dict(job.request["config"])
        for param, name in FILES.items():
            if (file_id := job.request.get(param)) is not None:
                values[name] = file_id
                await self._check(job, param, file_id)
        run_id = await self._run_for(job, values)
        now = await self._replace(job, state="running", run_id=run_id)
        if now.run_id != run_id:  # somebody has cancelled the job meanwhile
            await self._runs.cancel(run_id)

    async def _run_for(self, job: FineTuningJob, values: dict[str, Any]) -> str:
        """The id of a job's run, which may be there already: a process that came so far has died."""
        for status in await self._runs.all(job.owner):
            if status.name == job.id:
                if status.reason == NEVER_ACCEPTED:
                    await self._runs.resume(status.id)
                return status.id
        return (await self._runs.create(values, job.owner, label=job.id)).id

    async def _check(self, job: FineTuningJob, param: str, file_id: str) -> None:
        upload = await self._find(job.owner, param, file_id)
        method = job.request["config"].get("method", "supervised")
        try:
            await asyncio.to_thread(check_examples, self._uploads.path(upload), upload.name, method)
        except DataError as error:
            raise InvalidInput(str(error), param) from None

    async def _follow(self, job: FineTuningJob) -> None:
        """Wait for the end of the run, and give its result to whoever asks."""
        assert job.run_id is not None, "it was started"
        entry, out_dir = await asyncio.to_thread(self._runs.runs.find, job.run_id)
        if entry.future_id is not None:
            await self._ledger.wait(job.owner, entry.future_id, LOOK_SECONDS)
        status = await self._runs.status(job.run_id)
        if status.state == "failed":
            raise InvalidInput(status.reason.replace(f"{out_dir}/", ""))
        if status.state == "cancelled":  # by its own API
            await self._replace(job, state="cancelled", finished=time.time())
        elif status.state == "succeeded":
            await self._hand_over(job, out_dir)
        elif entry.future_id is None:
            await asyncio.sleep(RETRY_SECONDS)

    async def _hand_over(self, job: FineTuningJob, out_dir: Path) -> None:
        await asyncio.to_thread(self._register, job, out_dir)
        await self._catalogue.refresh()
        story, _ = await asyncio.to_thread(self._told, job)
        await self._replace(
            job,
            state="succeeded",
            finished=time.time(),
            fine_tuned_model=name_of(job),
            trained_tokens=round(story.num_tokens),
            result_files=[await self._keep_table(job, story, out_dir)],
        )

    def _register(self, job: FineTuningJob, out_dir: Path) -> None:
        """Give names to what the run has made: the result and, where they are small, the states on the way."""
        register_result(out_dir, name_of(job), self._models_folder, job.id)
        if config_of_job(job).lora:
            for checkpoint in checkpoints_in(out_dir):
                register_result(Path(checkpoint.path), checkpoint_name(job, checkpoint), self._models_folder, job.id)

    async def _keep_table(self, job: FineTuningJob, story: Story, out_dir: Path) -> str:
        table = out_dir / "step_metrics.csv"
        await asyncio.to_thread(table.write_bytes, table_of(story))
        digest = hashlib.sha256(f"{job.id}/{table.name}".encode()).hexdigest()
        upload = Upload(
            id=f"file-{digest[:24]}", owner=job.owner, name=table.name, purpose=RESULT_PURPOSE, suffix="", num_bytes=0
        )
        return (await self._uploads.adopt(table, upload)).id

    async def _fail(self, job: FineTuningJob, error: Exception) -> None:
        is_ours = not isinstance(error, SmeltError)
        message = "something went wrong inside the server; its log says more" if is_ours else str(error)
        param = getattr(error, "param", None)
        code = "server_error" if is_ours else f"invalid_{param}" if param in job.request else "training_failed"
        told = {"code": code, "message": message, "param": param}
        await self._replace(job, state="failed", finished=time.time(), error=told)

    async def _replace(self, job: FineTuningJob, **changes: Any) -> FineTuningJob:
        """The row as it is afterwards: unless it is another state's by now, it has changed."""

        def change(connection: Connection) -> FineTuningJob:
            now = records.get(connection, FineTuningJob, job.owner, job.id)
            if now.state == job.state:
                now = replace(now, **changes)
                records.replace(connection, now)
            return now

        return await asyncio.wrap_future(self._writer.write(change))


def name_of(job: FineTuningJob) -> str:
    """What a job's model is called: ft:BASE:SUFFIX:ID."""
    base = job.model.removeprefix("ft:").replace("/", "-").replace(":", "-")[:MAX_BASE_CHARS]
    return f"ft:{base}:{job.request.get('suffix') or ''}:{job.id[-8:]}"


def checkpoint_name(job: FineTuningJob, checkpoint: Checkpoint) -> str:
    """What a state of a job's model on the way is called."""
    return f"{name_of(job)}:ckpt-step-{checkpoint.step}"


def config_of_job(job: FineTuningJob) -> FineTuneConfig:
    """The config of its run, as it was asked for."""
    config = config_of({**job.request["config"], "data": job.request["training_file"]})
    assert isinstance(config, FineTuneConfig), "the recipe is fine-tune"
    return config
