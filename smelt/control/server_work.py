"""Work that the server does itself for its ledger, a thread's length at a time: accepted, done, told of, given up.

Knows no HTTP, and not what the work is. One that dies with its process begins again at the next start, so whatever
does it must know what it had finished.
"""

import asyncio
import hashlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import msgspec

from smelt.control.completions import STATUSES, Status
from smelt.errors import NotFound, OutOfSpace, SmeltError, StaleEpoch, StorageError
from smelt.storage.futures import Future, Granted, Ledger
from smelt.storage.transitions import Submission
from smelt.transport.failures import failure_of, is_of_the_user
from smelt.transport.messages import Failure

MAX_LISTED = 100
RETRY_SECONDS = 1.0

log = logging.getLogger(__name__)

Note = Callable[[str, int, int | None], None]  # what is being done, bytes done, bytes in all or None
R = TypeVar("R", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is, in bytes; `num_total` None: not known yet."""

    stage: str = ""  # fetching, copying, tokenizing ...; "" before there is anything to tell
    num_done: int = 0
    num_total: int | None = None


@dataclass(frozen=True, slots=True)
class Job(Generic[R]):
    """A piece of work as it stands."""

    id: str
    owner: str
    created: float  # seconds since 1970
    request: R
    status: Status
    progress: Progress
    failure: Failure | None = None


class _GivenUpError(SmeltError):
    """Nobody wants this work any more."""


class ServerWork(Generic[R]):
    """The work of one kind, done one after the other while `running`.

    `do` is called in a thread with the job's id, its owner, the request, and what to tell progress to, which raises
    where the job was given up.
    """

    def __init__(
        self, ledger: Ledger, kind: str, request_type: type[R], do: Callable[[str, str, R, Note], object]
    ) -> None:
        self._ledger = ledger
        self._kind = kind
        self._request_type = request_type
        self._do = do
        self._progress: dict[str, Progress] = {}
        self._current: str | None = None  # the one that is being done
        self._given_up: set[str] = set()

    async def accept(self, owner: str, request: R) -> Job[R]:
        """When this returns it will be done, whatever dies."""
        body = msgspec.msgpack.encode(request)
        submission = Submission(owner, self._kind, hashlib.sha256(body).hexdigest(), body)
        return await self.read(owner, await self._ledger.accept(submission))

    async def all(self, owner: str | None) -> list[Job[R]]:
        """The last ones of an owner, or of all, newest first; those that are long over are forgotten."""
        futures = await self._ledger.recent(owner, self._kind, MAX_LISTED)
        return [self._job(future) for future in futures if future.request is not None]

    async def read(self, owner: str, job_id: str, wait_s: float = 0.0) -> Job[R]:
        """How one stands; waits so long for its end. NotFound where the owner has none of that id."""
        future = await self._ledger.read(owner, job_id)
        if future.kind != self._kind or future.request is None:
            raise NotFound(f"there is no {self._kind} {job_id!r}")
        return self._job(await self._ledger.wait(owner, job_id, wait_s) if wait_s > 0 else future)

    async def cancel(self, owner: str, job_id: str) -> Job[R]:
        """Give one up; one that is over stays as it is. NotFound."""
        await self.read(owner, job_id)
        if await self._ledger.cancel(owner, job_id) and job_id == self._current:
            self._given_up.add(job_id)
        return await self.read(owner, job_id)

    async def forget(self, owner: str, job_id: str) -> None:
        """Tell no longer of one that is over. NotFound."""
        await self._ledger.drop(owner, job_id)

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
                for granted in await self._ledger.next_grants(epoch, 1, (self._kind,)):
                    await self._finish(granted, epoch)
        except Exception:
            log.exception("no %s is done any more, until the next start", self._kind)
            raise
        finally:
            await self._ledger.release(epoch, died=False)

    async def _finish(self, granted: Granted, epoch: int) -> None:
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
                log.error("cannot keep the end of an %s: %s", self._kind, error)  # noqa: TRY400 - no bug of ours
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self._progress.pop(granted.id, None)
            return

    async def _outcome(self, granted: Granted) -> Failure | None:
        if granted.request is None:
            return Failure("StorageError", "the request was kept in a file that is damaged or gone; send it again")
        request = msgspec.msgpack.decode(granted.request, type=self._request_type)
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Failure | None] = loop.create_future()

        def work() -> None:
            failure = self._done(granted, request)
            with suppress(RuntimeError):  # the loop is closed: the next process begins again
                loop.call_soon_threadsafe(_settle, ended, failure)

        # A daemon, so that the end of the process does not wait for it.
        threading.Thread(target=work, name=self._kind, daemon=True).start()
        return await ended

    def _done(self, granted: Granted, request: R) -> Failure | None:
        try:
            self._do(granted.id, granted.owner, request, partial(self._note, granted.id))
        except SmeltError as error:
            return failure_of(error)
        except Exception as bug:
            log.exception("an %s failed", self._kind)
            return failure_of(bug)
        return None

    def _note(self, job_id: str, stage: str, num_done: int, num_total: int | None) -> None:
        if job_id in self._given_up:
            raise _GivenUpError("it was cancelled")
        self._progress[job_id] = Progress(stage, num_done, num_total)

    def _job(self, future: Future) -> Job[R]:
        request = msgspec.msgpack.decode(future.request or b"", type=self._request_type)
        progress = self._progress.get(future.id, Progress())
        failure = msgspec.msgpack.decode(future.result or b"", type=Failure) if future.state == "failed" else None
        return Job(future.id, future.owner, future.created, request, STATUSES[future.state], progress, failure)


def _settle(ended: "asyncio.Future[Failure | None]", failure: Failure | None) -> None:
    if not ended.done():
        ended.set_result(failure)
