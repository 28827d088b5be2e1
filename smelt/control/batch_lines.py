"""The requests of all batches, taken from the ledger and answered a few at a time; knows no batch and no HTTP.

A request is answered as a live one would be, but such go first. One that cannot be answered now is tried again. What is
under way when this process ends is taken up by the next.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from smelt.control.batch_files import Outcome
from smelt.control.links import stored
from smelt.errors import SmeltError, StaleEpoch, StorageError, Unavailable, WorkerLost
from smelt.storage.futures import Granted, Ledger

KIND = "batch_line"
MAX_RUNNING = 8
MAX_LOST = 3  # workers that may die over a request, as in the ledger
LONGEST_PAUSE_S = 30.0

log = logging.getLogger(__name__)


class Line(msgspec.Struct, frozen=True):
    """A request of a batch, as the ledger keeps it. Its lane is the batch's id, its seq the number of its line."""

    custom_id: str
    endpoint: str
    key_id: str | None
    body: bytes


@dataclass(frozen=True, slots=True)
class Answering:
    """How requests are answered. `answer` raises Unavailable where that is worth another try."""

    answer: Callable[[str, Line], Awaitable[Outcome]]  # of an owner
    refuse: Callable[[SmeltError], Outcome]


# Told of each request that has its answer: its batch, its line, whether it has failed.
Ended = Callable[[str, int, bool], None]


class BatchLines:
    """`run` it for as long as requests of batches shall be answered."""

    def __init__(self, ledger: Ledger, answering: Answering, ended: Ended) -> None:
        self._ledger = ledger
        self._answering = answering
        self._ended = ended
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._alone = asyncio.Lock()  # for those that have lost a worker: one of them may have been the reason

    async def run(self) -> None:
        """Answer whatever comes, until cancelled."""
        epoch = await self._ledger.open_epoch()
        try:
            while True:
                await self._has_room.wait()
                ask = partial(self._ledger.next_grants, epoch, MAX_RUNNING - len(self._tasks), (KIND,))
                for row in await stored("cannot take requests of batches", ask):
                    self._start(row, epoch)
        finally:
            await self._stop(list(self._tasks.values()))
            await self._ledger.release(epoch, died=False)

    async def give_up(self, future_ids: set[str]) -> None:
        """Stop those of these requests that are under way; the ledger has cancelled them."""
        await self._stop([task for future_id, task in self._tasks.items() if future_id in future_ids])

    async def _stop(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _start(self, row: Granted, epoch: int) -> None:
        self._tasks[row.id] = task = asyncio.create_task(self._answer(row, epoch))
        task.add_done_callback(partial(self._note_end, row.id))
        if len(self._tasks) >= MAX_RUNNING:
            self._has_room.clear()

    def _note_end(self, future_id: str, task: asyncio.Task[None]) -> None:
        del self._tasks[future_id]
        self._has_room.set()
        if not task.cancelled() and (bug := task.exception()) is not None:
            log.error("request %s of a batch stays unanswered until the next start", future_id, exc_info=bug)

    async def _answer(self, row: Granted, epoch: int) -> None:
        outcome = await self._outcome(row)
        category = None if outcome.status < 400 else "user" if outcome.status < 500 else "server"
        body = msgspec.msgpack.encode(outcome)
        try:
            keep = partial(self._ledger.finish, row.id, epoch, body, category)
            await stored("cannot keep an answer of a batch", keep)
        except StaleEpoch:
            return  # it was cancelled in this moment
        assert row.lane is not None, "every one belongs to a batch"
        assert row.seq is not None, "and is a line of it"
        self._ended(row.lane, row.seq, category is not None)

    async def _outcome(self, row: Granted) -> Outcome:
        if row.request is None:
            return self._answering.refuse(StorageError("its request was kept in a file that is damaged or gone"))
        line = msgspec.msgpack.decode(row.request, type=Line)
        num_lost = 0
        while True:
            try:
                if num_lost == 0:
                    return await self._answering.answer(row.owner, line)
                async with self._alone:
                    return await self._answering.answer(row.owner, line)
            except WorkerLost as lost:
                num_lost += 1
                if num_lost == MAX_LOST:
                    return self._answering.refuse(lost)
            except Unavailable as unavailable:
                await asyncio.sleep(min(unavailable.retry_after_s, LONGEST_PAUSE_S))
