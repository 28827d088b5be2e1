"""One worker or launcher that has dialled in: hands it work of the ledger, takes what it says; chooses no worker.

Whatever goes wrong on a link ends it, and the peer dials in again. What the disk refuses is tried again instead:
live answers need no disk, and must not end because it is full.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec

from smelt.control.answers import LiveAnswer, LiveRequest, Whole
from smelt.control.lane_logs import keep_snapshot, log_parts
from smelt.errors import ConnectionClosed, OutOfSpace, StaleEpoch, StorageError, TransportError, WorkerLost
from smelt.storage.futures import Granted, Ledger
from smelt.transport.failures import is_of_the_user
from smelt.transport.handshake import Role
from smelt.transport.messages import (
    Cancel,
    Classified,
    Embedded,
    Failure,
    Finish,
    Grant,
    Lent,
    LogWanted,
    Message,
    Ping,
    Pong,
    Rendered,
    Result,
    SnapshotTaken,
    TextChunk,
    WorkerStatus,
)
from smelt.transport.operations import SAMPLE, TRAINING_KINDS
from smelt.transport.streams import Connection

PING_SECONDS = 5.0
MAX_UNANSWERED = 3  # pings; their number and not the clock decides, so that our own sleep condemns nobody
RETRY_SECONDS = 1.0  # until a full disk is asked again

log = logging.getLogger(__name__)

T = TypeVar("T")

# Told of each row that a peer has done, once its result is kept.
Witness = Callable[[Granted, Result], None]


@dataclass(frozen=True, slots=True)
class Share:
    """Kinds of work of which a peer holds so many rows at most, whatever it holds of others."""

    kinds: tuple[str, ...]
    max_granted: int


@dataclass(frozen=True, slots=True)
class Duty:
    """What a role is granted. `answers_for_death`: whether the work may have been what killed it."""

    shares: tuple[Share, ...]
    answers_for_death: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of all shares."""
        return tuple(kind for share in self.shares for kind in share.kinds)


DUTIES: dict[Role, Duty] = {
    # Many sessions' operations are computed at once, and so are many samples.
    "worker": Duty(
        (Share(("generate",), 16), Share(TRAINING_KINDS, 256), Share((SAMPLE,), 256)),
        answers_for_death=True,
    ),
    # One run at a time, for they share the device. A run has a process of its own, and its launcher reports its death.
    "launcher": Duty((Share(("train",), 1),), answers_for_death=False),
}


class Link:
    """`run` it for as long as the connection lives."""

    def __init__(
        self, connection: Connection, ledger: Ledger, witness: Witness, noted: "Callable[[Link], None]"
    ) -> None:
        self.connection = connection
        self.status = WorkerStatus(device="")
        self.num_lent = 0  # bytes that a worker has been told to leave to runs
        self._noted = noted  # called with each status
        self.granted: dict[str, Granted] = {}
        self._answers: dict[str, LiveAnswer] = {}
        self._models: Counter[str] = Counter()  # that its live answers are of
        self._ledger = ledger
        self._witness = witness
        self._duty = DUTIES[connection.role]
        self._rooms = {share: asyncio.Event() for share in self._duty.shares}
        self._num_unanswered = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeping: set[asyncio.Task[None]] = set()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._granting: list[asyncio.Task[None]] = []

    @property
    def num_busy(self) -> int:
        """Requests that it has to do now."""
        return len(self._answers) + len(self.granted)

    @property
    def is_open(self) -> bool:
        """Whether it takes new work."""
        return not (self._end.done() or self.status.leaving)

    def has_model(self, model: str) -> bool:
        """Whether it has loaded that model, or has been asked to."""
        return model in self.status.models or model in self._models

    async def run(self) -> None:
        """Talk until one side ends it, and give the ledger back what was granted; raises the reason.

        Where this server goes down and cancels it, nothing is given back: the next start recovers it all.
        """
        self._update_room()
        self._granting = [self._start(self._grant(share)) for share in self._duty.shares]
        self._start(self._receive())
        self._start(self._ping())
        try:
            await self._end
        except asyncio.CancelledError as end:
            self.hang_up(end)
            await _stop(self._tasks)
            raise
        except Exception:
            await _stop(self._tasks - self._keeping)
            await self._give_back()
            raise

    async def _give_back(self) -> None:
        """What it had finished is kept first."""
        if self._keeping:
            await asyncio.wait(self._keeping)
        died = self._duty.answers_for_death and not self.status.leaving
        await stored("cannot take work back", partial(self._ledger.release, self.connection.epoch, died=died))

    def hang_up(self, reason: BaseException) -> None:
        """End `run` with this reason; all live answers end now."""
        if not self._end.done():
            self._end.set_exception(reason)
        for answer in self._answers.values():
            answer.end(WorkerLost("the worker that was writing the answer is gone; ask again"))

    async def begin(self, request: LiveRequest) -> LiveAnswer:
        """Have a request answered; raises what `send` raises. Whoever begins one must `leave` it."""
        answer = self._answers[request.request_id] = LiveAnswer(request)
        self._models[request.model] += 1
        try:
            await self.send(request)
        except BaseException as error:
            if isinstance(error, TransportError):
                answer.end(error)  # it never left, so there is nothing to cancel
            self.leave(answer)
            raise
        return answer

    def leave(self, answer: LiveAnswer) -> None:
        """Nobody reads this answer any more; if it has not ended, the work is cancelled."""
        request = answer.request
        del self._answers[request.request_id]
        self._models -= Counter([request.model])
        if not answer.has_ended:
            self.cancel(request.request_id)

    def stop_granting(self) -> None:
        """Take no more from the ledger. What is granted in this moment comes back when the link ends."""
        for granting in self._granting:
            granting.cancel()

    async def send(self, message: Message) -> None:
        """Raises what `Connection.send` raises; where the peer is gone, the link ends."""
        try:
            await self.connection.send(message)
        except ConnectionClosed as end:
            self.hang_up(end)
            raise

    def cancel(self, request_id: str) -> None:
        """Tell the peer that nobody wants this any more, without waiting."""
        if not self._end.done():
            self._start(self.send(Cancel(request_id)))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self.hang_up(error)

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            if self._num_unanswered >= MAX_UNANSWERED:
                raise TransportError(f"it has not answered {self._num_unanswered} pings: it hangs, or is cut off")
            self._num_unanswered += 1
            try:
                async with asyncio.timeout(PING_SECONDS):
                    await self.send(Ping(time.monotonic()))
            except TimeoutError:
                log.warning("%s reads nothing", self.connection.name)

    async def _grant(self, share: Share) -> None:
        while True:
            await self._rooms[share].wait()
            limit = share.max_granted - self._num_granted(share)
            ask = partial(self._ledger.next_grants, self.connection.epoch, limit, share.kinds, self._duty.kinds)
            rows = await stored("cannot grant work", ask)
            self.granted |= {row.id: row for row in rows}
            self._update_room()
            for row in rows:
                await self._send_granted(row)

    async def _send_granted(self, row: Granted) -> None:
        epoch, attempt = self.connection.epoch, row.attempts + 1
        if row.request is None:
            lost = "the request was kept in a file that is damaged or gone; send it again"
            await self._keep(Result(row.id, epoch, failure=Failure("StorageError", lost)))
            return
        grant = Grant(row.id, epoch, row.owner, row.lane, row.seq, row.kind, attempt, row.request)
        try:
            await self.send(grant)
        except ConnectionClosed:
            raise
        except TransportError as oversize:
            await self._keep(Result(row.id, epoch, failure=Failure("TooLarge", str(oversize))))

    def _num_granted(self, share: Share) -> int:
        return sum(row.kind in share.kinds for row in self.granted.values())

    def _update_room(self) -> None:
        for share, room in self._rooms.items():
            if self._num_granted(share) < share.max_granted:
                room.set()
            else:
                room.clear()

    async def _receive(self) -> None:
        async for message in self.connection:
            self._num_unanswered = 0
            match message:
                case TextChunk() | Embedded() | Rendered() | Classified() | Lent():
                    self._take_piece(message)
                case Finish():
                    if answer := self._answers.get(message.request_id):
                        answer.finish(message)
                case Result():
                    self._keep_soon(message)
                case WorkerStatus():
                    self._take_status(message)
                case LogWanted():
                    self._start(self._send_log(message))
                case SnapshotTaken():
                    self._start(self._keep_snapshot(message))
                case Pong():
                    pass
                case _:
                    raise TransportError(f"a {self.connection.role} does not send {type(message).__name__}")

    def _take_piece(self, piece: TextChunk | Whole) -> None:
        answer = self._answers.get(piece.request_id)
        if answer is not None and not answer.push(piece):
            self.cancel(piece.request_id)

    async def _send_log(self, wanted: LogWanted) -> None:
        async for part in log_parts(self._ledger, wanted):
            await self.send(part)

    async def _keep_snapshot(self, taken: SnapshotTaken) -> None:
        """What was done before it is kept first: it was sent first."""
        if self._keeping:
            await asyncio.wait(self._keeping)
        await self.send(await stored("cannot keep a snapshot", partial(keep_snapshot, self._ledger, taken)))

    def _take_status(self, status: WorkerStatus) -> None:
        self.status = status
        if status.leaving:
            self.stop_granting()
        self._noted(self)

    def _keep_soon(self, result: Result) -> None:
        """Not one after the other: those that wait together share a commit."""
        keeping = self._start(self._keep(result))
        self._keeping.add(keeping)
        keeping.add_done_callback(self._keeping.discard)

    async def _keep(self, result: Result) -> None:
        """Commit what the peer has done; what is not its to do any more is refused by the ledger, and forgotten."""
        row = self.granted.get(result.future_id)
        if row is None:
            log.warning("%s answered %s, which it does not hold", self.connection.name, result.future_id)
            return
        body, category = result.body, None
        if result.failure is not None:
            body = msgspec.msgpack.encode(result.failure)
            category = "user" if is_of_the_user(result.failure) else "server"
        try:
            # A session's results come of its log, again if need be. A failure may not.
            durable = category is not None or row.kind not in TRAINING_KINDS
            finish = partial(self._ledger.finish, result.future_id, result.epoch, body, category, durable=durable)
            await stored("cannot keep a result", finish)
        except StaleEpoch as stale:
            log.info("%s: %s", self.connection.name, stale)
        else:
            self._witness(row, result)
        self.granted.pop(result.future_id, None)
        self._update_room()


async def _stop(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def stored(complaint: str, change: Callable[[], Awaitable[T]]) -> T:
    """What a change of the ledger gives, as soon as the disk takes it."""
    while True:
        try:
            return await change()
        except (OutOfSpace, StorageError) as error:
            log.error("%s: %s; trying again in %g s", complaint, error, RETRY_SECONDS)  # noqa: TRY400 - no bug of ours
            await asyncio.sleep(RETRY_SECONDS)
