"""Completions: live answers of several prompts as one stream, and answers promised for later; knows no HTTP.

A live answer ends with its client. A promised one is a row of the ledger: it is written once, whoever dies meanwhile,
and asked for by its id.
"""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
from sqlalchemy import Engine

from smelt.control.model_server import ModelServer
from smelt.errors import InvalidInput, NotFound, TooLarge, Unavailable
from smelt.storage import transitions
from smelt.storage.futures import MAX_INLINE, Future, Ledger
from smelt.storage.tables import AnyRow
from smelt.storage.transitions import State, Submission
from smelt.transport.failures import error_of
from smelt.transport.messages import Completion, Failure, Finish, Generate, TextChunk

KIND = "generate"
MAX_KEY_CHARS = 255
# Pieces of several answers that wait for the one client of them all.
MAX_WAITING_PIECES = 64

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]
STATUSES: dict[State, Status] = {
    "queued": "queued",
    "granted": "in_progress",
    "done": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}

Pieces = AsyncGenerator[tuple[int, TextChunk | Finish], None]


@dataclass(frozen=True, slots=True)
class Promise:
    """An answer that was promised, as it stands. "expired": it was there, and nobody fetched it in time."""

    future_id: str
    created: float  # seconds since 1970
    status: Status
    model: str = ""  # "" once it has expired
    is_chat: bool | None = None
    completion: Completion | None = None
    failure: Failure | None = None


class Completions:
    """What every API that completes text stands on."""

    def __init__(self, model_server: ModelServer, ledger: Ledger, database: Engine) -> None:
        self._model_server = model_server
        self._ledger = ledger
        self._database = database

    def answers(self, requests: Sequence[Generate]) -> Pieces:
        """(number of the request, its next piece) as they come, each one's last being a Finish. Closing it cancels all.

        Raises what any of them fails with, and what `ModelServer.generate` raises.
        """
        if len(requests) == 1:
            return self._answer(0, requests[0])
        return _merged([self._answer(number, request) for number, request in enumerate(requests)])

    async def _answer(self, number: int, request: Generate) -> Pieces:
        async with aclosing(self._model_server.generate(request)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Finish):
                    _check(piece)
                    yield number, piece
                    return
                yield number, piece
        raise Unavailable("the answer broke off; ask again")

    async def promise(self, request: Generate, fingerprint: str, key: str | None = None) -> str:
        """The id under which the answer will be found, once the request is on the disk.

        With a key of the caller's, the same request gets the same id again; SeqReused where the key came with another
        fingerprint. The seed is drawn now, so that a second attempt writes the same text.
        """
        if request.params.seed is None:
            request = msgspec.structs.replace(request, params=replace(request.params, seed=secrets.randbits(63)))
        body = msgspec.msgpack.encode(request)
        if len(body) > MAX_INLINE:
            raise TooLarge(f"a request for later may have {MAX_INLINE:,} bytes, and this one has {len(body):,}")
        submission = Submission(request.owner, KIND, fingerprint, body)
        if key is not None:
            lane = _lane_of(request.owner, key)
            submission = replace(submission, lane=lane, seq=1, first_seq=None)
        return await self._ledger.accept(submission)

    async def read(self, owner: str, future_id: str, wait_s: float = 0.0) -> Promise:
        """How a promised answer stands; waits so long for it to be finished. NotFound where the owner has none."""
        row = await asyncio.to_thread(self._row, owner, future_id)
        if wait_s > 0:
            future = await self._ledger.wait(owner, future_id, wait_s)
        else:
            future = await self._ledger.read(owner, future_id)
        return _promise(row, future)

    async def cancel(self, owner: str, future_id: str) -> Promise:
        """Give an answer up; one that is finished stays as it is. NotFound where the owner has none."""
        await asyncio.to_thread(self._row, owner, future_id)  # other kinds of work are not ours to cancel
        await self._model_server.cancel(owner, future_id)
        return await self.read(owner, future_id)

    def _row(self, owner: str, future_id: str) -> AnyRow:
        with self._database.connect() as connection:
            row = transitions.row(owner, future_id, connection)
        if row.kind != KIND:
            raise NotFound(f"request {future_id!r} does not exist")
        return row


def _lane_of(owner: str, key: str) -> str:
    """A place that the key alone decides. Hashed, for a lane's name is short and a key is anybody's text."""
    if not 0 < len(key) <= MAX_KEY_CHARS or not key.isprintable():
        raise InvalidInput(f"an idempotency key has 1 to {MAX_KEY_CHARS} printable characters")
    return f"{KIND}/{hashlib.sha256(msgspec.json.encode([owner, key])).hexdigest()}"


def _promise(row: AnyRow, future: Future) -> Promise:
    if row.request is None:  # forgotten together with the result
        return Promise(future.id, row.created, "expired" if future.state == "done" else STATUSES[future.state])
    request = msgspec.msgpack.decode(row.request, type=Generate)
    status: Status = "expired" if future.expired and future.state == "done" else STATUSES[future.state]
    promise = Promise(future.id, row.created, status, request.model, bool(request.messages))
    if status == "completed" and future.result is not None:
        return replace(promise, completion=msgspec.msgpack.decode(future.result, type=Completion))
    if status == "failed":
        return replace(promise, failure=_failure(future))
    return promise


def _failure(future: Future) -> Failure:
    if future.result is None:
        return Failure("WorkerLost", f"{future.attempts} workers died over this request; ask for less")
    return msgspec.msgpack.decode(future.result, type=Failure)


def _check(finish: Finish) -> None:
    """Raise what an answer has failed with."""
    if finish.failure is not None:
        raise error_of(finish.failure)
    if finish.reason == "aborted":
        raise Unavailable("the answer was broken off by the server; ask again")


async def _merged(streams: Sequence[Pieces]) -> Pieces:
    """The pieces of all, as they come; the first error ends it."""
    queue: asyncio.Queue[tuple[int, TextChunk | Finish] | Exception] = asyncio.Queue(MAX_WAITING_PIECES)
    tasks = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    num_left = len(tasks)
    try:
        while num_left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            num_left -= isinstance(item[1], Finish)
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(stream: Pieces, queue: asyncio.Queue[tuple[int, TextChunk | Finish] | Exception]) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                await queue.put(item)
    except Exception as error:  # noqa: BLE001 - whoever reads the queue raises it
        await queue.put(error)
