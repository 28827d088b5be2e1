"""The ledger: requests that were accepted, who works on them, and their results; knows no request's meaning.

What `accept` has answered is on the disk and is never lost. Every change goes through the one writer thread, every
question past it. The methods belong to one event loop; nobody polls: workers and clients are woken by commits.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection, Engine

from smelt.errors import StorageError
from smelt.storage import batch_rows, transitions
from smelt.storage import lanes as turns
from smelt.storage.demands import Demands
from smelt.storage.faults import Fault, no_fault
from smelt.storage.files import Files
from smelt.storage.lanes import Wish
from smelt.storage.tables import AnyRow
from smelt.storage.transitions import FINISHED, Accepted, Alongside, Body, State, Submission
from smelt.storage.writer import Operation, Writer

# Bytes: a larger body lies in a file, and its row holds the name.
MAX_INLINE = 1 << 20
# Rows of a log that are read at once.
LOG_ROWS = 64
# Open futures of which it is known in memory how they stand.
MAX_REMEMBERED = 4096
# Younger files are kept by `collect_files`: their row may be on its way.
FILE_GRACE_S = 3600.0

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Granted:
    """A request that a worker has to do now. A `seq` that is not its predecessor's plus one tells of a gap.

    `request` None: its file is damaged or gone, so that all that can be done is to say so.
    """

    id: str
    owner: str
    kind: str
    lane: str | None
    seq: int | None
    attempts: int
    request: bytes | None


@dataclass(frozen=True, slots=True)
class Future:
    """How a request stands. `result` is there when it is finished, unless it is `expired`.

    `request` is the body that came with it: None where it lies in a file, was forgotten together with the result, or is
    not asked for.
    """

    id: str
    owner: str
    kind: str
    created: float  # seconds since 1970
    request: bytes | None
    lane: str | None
    seq: int | None
    state: State
    attempts: int
    category: str | None
    result: bytes | None
    expired: bool


@dataclass(frozen=True, slots=True)
class Ending:
    """How a future has ended, for those who wait for it."""

    state: State
    category: str | None
    result: bytes


@dataclass(frozen=True, slots=True)
class Logged:
    """A request of a lane as its log has it. One that has failed or was cancelled changed nothing."""

    seq: int
    kind: str
    request: bytes
    failed: bool


class Ledger:
    """The futures of one database. Nobody else may write to it while it is open."""

    def __init__(
        self, engine: Engine, writer: Writer, files: Files, fault: Fault = no_fault, hole_timeout_s: float = 1200.0
    ) -> None:
        self._engine = engine
        self._writer = writer
        self._files = files
        self._fault = fault
        self._hole_timeout_s = hole_timeout_s
        self._holes_since: dict[tuple[str, int], float] = {}
        # Those who wait for a future: they hear its ending, or None where they shall read it.
        self._waiting: defaultdict[str, set[asyncio.Future[Ending | None]]] = defaultdict(set)
        self._open: dict[str, Future] = {}  # those that were accepted here, until they end
        self._demands = Demands(writer)
        writer.write(turns.recover).result()

    async def accept(self, submission: Submission, alongside: Alongside | None = None) -> str:
        """The request's id, once it is on the disk.

        `alongside` writes, for a request that is new, what shall be there if and only if the request is. SeqReused
        where another request has its place, SeqAbandoned where its lane went on without it, NotFound where the lane is
        another owner's.
        """
        body, now = await self._stored(submission.request), time.time()
        accepted = await self._change(partial(transitions.accept, submission, body, now, self._fault, alongside))
        if accepted.is_open:
            self._remember(submission, accepted, now)
        self._fault("after_commit_before_answer")
        return accepted.id

    async def open_epoch(self) -> int:
        """The number of a worker's new connection; none was ever used before."""
        return await asyncio.wrap_future(self._writer.write(transitions.open_epoch))

    async def next_grants(
        self, epoch: int, limit: int, kinds: tuple[str, ...], all_kinds: tuple[str, ...] = ()
    ) -> list[Granted]:
        """Wait until there is work of these kinds, and take up to `limit` requests of it.

        `all_kinds` has those too that the connection asks for beside this: work whose worker died goes before all.
        StaleEpoch where the connection is over. Whoever stops waiting must `release` the epoch: something may have
        been granted to it in that moment.
        """
        rows = await self._demands.rows(Wish(epoch, limit, kinds, all_kinds or kinds))
        self._fault("after_grant_before_send")
        return [await self._granted(row) for row in rows]

    async def finish(
        self, future_id: str, epoch: int, result: bytes, category: str | None = None, *, durable: bool = True
    ) -> None:
        """Keep a result; with a `category` (user or server) it is a failure. StaleEpoch refuses it.

        One that is not `durable` is shown before it is on the disk: the work has to give the same again, if power
        takes it.
        """
        body = await self._stored(result)
        run = partial(transitions.finish, future_id, epoch, body, category, time.time(), self._fault)
        await self._change(run, durable)
        self._fault("after_result_commit")
        self._wake(future_id, Ending("failed" if category else "done", category, result))

    async def release(self, epoch: int, *, died: bool = True) -> None:
        """A worker's connection is over: what it held is queued again.

        Where it `died`, its work may have been the reason: the third time that work has failed.
        """
        answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        release = Operation(partial(turns.release, epoch=epoch, died=died, now=time.time()), answer=answer)
        self._writer.submit([release, *self._demands.with_ending(epoch)])
        for failed in await answer:
            self._wake(failed)

    async def cancel(self, owner: str, future_id: str) -> bool:
        """Whether the request was still unfinished, and now is cancelled. NotFound where the owner has none."""
        was_cancelled = await self._change(partial(transitions.cancel, owner, future_id, time.time()))
        self._wake(future_id)
        return was_cancelled

    async def read(self, owner: str, future_id: str) -> Future:
        """How a request stands. NotFound where the owner has none."""
        return await asyncio.to_thread(self._read, owner, future_id)

    async def recent(self, owner: str | None, kind: str, limit: int) -> list[Future]:
        """How the last requests of a kind stand, the owner's or everybody's, newest first."""
        rows = await asyncio.to_thread(self._query, partial(transitions.recent, owner, kind, limit))
        return [await asyncio.to_thread(self._future, row) for row in rows]

    async def wait(self, owner: str, future_id: str, timeout_s: float, *, with_request: bool = True) -> Future:
        """How a request stands when it is finished, or when the time is over. NotFound where the owner has none.

        Who can do without its body is not kept waiting by the disk while it is open.
        """
        ending = None
        with self._listening(future_id) as ended:
            future = None if with_request else self._open.get(future_id)
            if future is None or future.owner != owner:
                future = await self.read(owner, future_id)
            if future.state in FINISHED:
                return future
            with suppress(TimeoutError):
                ending = await asyncio.wait_for(ended, timeout_s)
        if ending is None:
            return await self.read(owner, future_id)
        return replace(future, state=ending.state, category=ending.category, result=ending.result)

    async def log(self, lane: str, after: int, before: int) -> AsyncGenerator[Logged, None]:
        """What was asked of a lane between two seqs, in order; one that never came is not among it.

        StorageError where some of it was forgotten or is damaged.
        """
        while rows := await asyncio.to_thread(self._query, partial(transitions.logged, lane, after, before, LOG_ROWS)):
            for row in rows:
                yield await asyncio.to_thread(self._logged, row)
            after = rows[-1].seq

    async def states(self, lane: str) -> list[tuple[int, str, State]]:
        """(seq, id, state) of each request of a lane, in order."""
        return await asyncio.to_thread(self._query, partial(batch_rows.states, lane))

    async def outcomes(self, lane: str, after: int, limit: int) -> list[Future]:
        """The first finished requests of a lane behind a seq, in order."""
        rows = await asyncio.to_thread(self._query, partial(batch_rows.outcomes, lane, after, limit))
        return [await asyncio.to_thread(self._future, row) for row in rows]

    async def forget_lane(self, lane: str) -> None:
        """Remove a lane and all that was asked of it."""
        self._open = {name: future for name, future in self._open.items() if future.lane != lane}
        await self._change(partial(batch_rows.forget, lane))

    async def forget_log(self, lane: str, before: int, *, durable: bool = False) -> int:
        """Drop the requests of a lane below a seq, which nobody will replay; returns of how many futures."""
        num_forgotten = await self._change(partial(transitions.forget, lane, before), durable)
        self._fault("after_log_forgotten")
        return num_forgotten

    async def abandon_holes(self) -> None:
        """Let lanes go on whose missing seq has not come for so long; to be called every now and then."""
        now = time.monotonic()
        open_holes = await asyncio.to_thread(self._query, turns.holes)
        self._holes_since = {hole: self._holes_since.get(hole, now) for hole in open_holes}
        old = [hole for hole, since in self._holes_since.items() if now - since >= self._hole_timeout_s]
        if old:
            await self._change(partial(turns.abandon, missing=old))

    async def expire(self, min_age_s: float, kept_kinds: Sequence[str] = ()) -> int:
        """Drop results that have been there for so long, and requests nobody replays; returns of how many futures.

        Those of `kept_kinds` stay until somebody forgets them.
        The row stays: its place is taken for good, and whoever asks is told that the result has expired.
        """
        return await self._change(partial(transitions.expire, time.time() - min_age_s, kept_kinds))

    async def drop(self, owner: str, future_id: str) -> None:
        """Forget a finished request and its result at once. NotFound where the owner has none of that id."""
        await self._change(partial(transitions.drop, owner, future_id))

    async def collect_files(self) -> int:
        """Remove the files of bodies that no row names; returns how many."""
        referenced = await asyncio.to_thread(self._query, transitions.referenced_files)
        return await asyncio.to_thread(self._files.collect, referenced, FILE_GRACE_S)

    def _change(self, run: Callable[[Connection], T], durable: bool = True) -> Awaitable[T]:
        """Submit a change and, for the same commit, grants for the workers that wait."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._writer.submit([Operation(run, durable, answer), *self._demands.with_change()])
        return answer

    async def _stored(self, body: bytes) -> Body:
        if len(body) <= MAX_INLINE:
            return Body(body, None)
        return Body(None, await asyncio.to_thread(self._files.put, body))

    async def _granted(self, row: AnyRow) -> Granted:
        request = row.request
        if row.request_file is not None:
            try:
                request = await asyncio.to_thread(self._files.read, row.request_file)
            except StorageError as damage:
                log.error("request %s is lost: %s", row.id, damage)  # noqa: TRY400 - no bug of ours
        return Granted(row.id, row.owner, row.kind, row.lane, row.seq, row.attempts, request)

    def _logged(self, row: AnyRow) -> Logged:
        has_failed = row.state in ("failed", "cancelled")
        if row.request is None and row.request_file is None and not has_failed:
            raise StorageError(f"the log of {row.lane} up to seq {row.seq} was forgotten")
        request = row.request or b""
        if row.request_file is not None and not has_failed:
            request = self._files.read(row.request_file)
        return Logged(row.seq, row.kind, request, has_failed)

    def _read(self, owner: str, future_id: str) -> Future:
        return self._future(self._query(partial(transitions.row, owner, future_id)))

    def _future(self, row: AnyRow) -> Future:
        result = row.result if row.result_file is None else self._files.read(row.result_file)
        return Future(
            row.id,
            row.owner,
            row.kind,
            row.created,
            row.request,
            row.lane,
            row.seq,
            row.state,
            row.attempts,
            row.category,
            result,
            row.expired,
        )

    def _query(self, run: Callable[[Connection], T]) -> T:
        with self._engine.connect() as connection:
            return run(connection)

    @contextmanager
    def _listening(self, future_id: str) -> Iterator[asyncio.Future[Ending | None]]:
        ended: asyncio.Future[Ending | None] = asyncio.get_running_loop().create_future()
        self._waiting[future_id].add(ended)
        try:
            yield ended
        finally:
            self._waiting[future_id].discard(ended)
            if not self._waiting[future_id]:
                del self._waiting[future_id]

    def _remember(self, submission: Submission, accepted: Accepted, now: float) -> None:
        """As it stands without its body, until it ends; the oldest is forgotten where there are many."""
        owner, kind, lane = submission.owner, submission.kind, submission.lane
        self._open[accepted.id] = Future(
            accepted.id, owner, kind, now, None, lane, accepted.seq, "queued", 0, None, None, expired=False
        )
        if len(self._open) > MAX_REMEMBERED:
            del self._open[next(iter(self._open))]

    def _wake(self, future_id: str, ending: Ending | None = None) -> None:
        self._open.pop(future_id, None)
        for ended in self._waiting.get(future_id, ()):
            if not ended.done():
                ended.set_result(ending)
