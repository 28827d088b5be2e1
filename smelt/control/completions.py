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
from itertools import accumulate
from typing import Literal

import msgspec

from smelt.control.abuse_checker import AbuseChecker
from smelt.control.answers import check
from smelt.control.model_server import ModelServer
from smelt.errors import InvalidInput, NotFound, TooLarge, Unavailable
from smelt.storage.futures import MAX_INLINE, Future, Granted, Ledger
from smelt.storage.transitions import State, Submission
from smelt.transport.messages import Completion, Failure, Finish, Generate, Result, TextChunk

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

Piece = tuple[int, TextChunk | Finish]  # with the number of the choice it is of
Pieces = AsyncGenerator[Piece, None]


@dataclass(frozen=True, slots=True)
class Promise:
    """An answer that was promised, as it stands. "expired": it was there, and nobody fetched it in time."""

    future_id: str
    created: float  # seconds since 1970
    status: Status
    model: str = ""  # "" once it has expired
    is_chat: bool | None = None
    has_logprobs: bool = False
    completions: tuple[Completion, ...] = ()  # one for each choice
    failure: Failure | None = None


class Completions:
    """What every API that completes text stands on."""

    def __init__(self, model_server: ModelServer, ledger: Ledger, abuse_checker: AbuseChecker) -> None:
        self._model_server = model_server
        self._ledger = ledger
        self._checker = abuse_checker

    async def check(self, requests: Sequence[Generate]) -> None:
        """Before anything is answered or promised: Banned, or BannedPrompt with a strike."""
        for request in requests:
            await self._checker.check(request)

    def answers(self, requests: Sequence[Generate]) -> Pieces:
        """(number of the choice, its next piece) as they come, each one's last being a Finish. Closing it cancels all.

        The choices of the first request come first, then those of the second. Raises what any of them fails with, and
        what `ModelServer.generate` raises.
        """
        firsts = accumulate([request.num_samples for request in requests], initial=0)
        streams = [self._answer(first, request) for first, request in zip(firsts, requests, strict=False)]
        return streams[0] if len(streams) == 1 else _merged(streams)

    async def _answer(self, first: int, request: Generate) -> Pieces:
        num_left = request.num_samples
        written = self._model_server.generate(request)
        async with aclosing(self._checker.watched(request, written)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Finish):
                    check(piece)
                    num_left -= 1
                yield first + piece.index, piece
        if num_left:
            raise Unavailable("the answer broke off; ask again")

    async def promise(self, request: Generate, fingerprint: str, key: str | None = None) -> str:
        """The id under which the answer will be found, once the request is on the disk.

        With a key of the caller's, the same request gets the same id again; SeqReused where the key came with another
        fingerprint. The seed is drawn now, so that a second attempt writes the same text. Live ones go before it.
        """
        request = msgspec.structs.replace(request, is_live=False)
        if request.params.seed is None:
            request = msgspec.structs.replace(request, params=replace(request.params, seed=secrets.randbits(63)))
        body = msgspec.msgpack.encode(request)
        if len(body) > MAX_INLINE:
            raise TooLarge(f"a request for later may have {MAX_INLINE:,} bytes, and this one has {len(body):,}")
        submission = Submission(request.owner, KIND, fingerprint, body)
        if key is not None:
            lane = f"{KIND}/{key_digest(request.owner, key)}"
            submission = replace(submission, lane=lane, seq=1, first_seq=None)
        return await self._ledger.accept(submission)

    async def read(self, owner: str, future_id: str, wait_s: float = 0.0) -> Promise:
        """How a promised answer stands; waits so long for it to be finished. NotFound where the owner has none."""
        if wait_s > 0:
            promise = _promise(await self._ledger.wait(owner, future_id, wait_s))
        else:
            promise = _promise(await self._ledger.read(owner, future_id))
        return replace(promise, completions=tuple(map(self._checker.filtered, promise.completions)))

    async def cancel(self, owner: str, future_id: str) -> Promise:
        """Give an answer up; one that is finished stays as it is. NotFound where the owner has none."""
        await self.read(owner, future_id)  # other kinds of work are not ours to cancel
        await self._model_server.cancel(owner, future_id)
        return await self.read(owner, future_id)


async def gathered(pieces: Pieces, num_choices: int) -> list[Completion]:
    """The answers, once they are whole."""
    chunks: list[list[TextChunk]] = [[] for _ in range(num_choices)]
    answers: dict[int, Completion] = {}
    async for number, piece in pieces:
        if isinstance(piece, TextChunk):
            chunks[number].append(piece)
        else:
            answers[number] = _completion(chunks[number], piece)
    return [answers[number] for number in range(num_choices)]


def _completion(chunks: Sequence[TextChunk], finish: Finish) -> Completion:
    return Completion(
        "".join(chunk.text for chunk in chunks),
        finish.reason,
        finish.num_prompt_tokens,
        finish.num_output_tokens,
        finish.num_cached_tokens,
        tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        finish.tool_calls,
    )


def written(row: Granted, result: Result) -> tuple[Generate, list[Completion]] | None:
    """What was asked for and the answers, of a row that has been done; None where they are none."""
    if row.kind != KIND or row.request is None or result.failure is not None:
        return None
    request = msgspec.msgpack.decode(row.request, type=Generate)
    return request, msgspec.msgpack.decode(result.body, type=list[Completion])


def key_digest(owner: str, key: str) -> str:
    """What stands for an idempotency key of an owner's: hashed, for names are short and a key is anybody's text."""
    if not 0 < len(key) <= MAX_KEY_CHARS or not key.isprintable():
        raise InvalidInput(f"an idempotency key has 1 to {MAX_KEY_CHARS} printable characters")
    return hashlib.sha256(msgspec.json.encode([owner, key])).hexdigest()


def _promise(future: Future) -> Promise:
    if future.kind != KIND:
        raise NotFound(f"request {future.id!r} does not exist")
    has_expired = future.state == "done" and (future.expired or future.request is None)
    status: Status = "expired" if has_expired else STATUSES[future.state]
    if future.request is None:  # forgotten together with the result
        return Promise(future.id, future.created, status)
    request = msgspec.msgpack.decode(future.request, type=Generate)
    has_logprobs = request.params.num_logprobs is not None
    promise = Promise(future.id, future.created, status, request.model, bool(request.messages), has_logprobs)
    if status == "completed" and future.result is not None:
        return replace(promise, completions=msgspec.msgpack.decode(future.result, type=tuple[Completion, ...]))
    if status == "failed":
        return replace(promise, failure=_failure(future))
    return promise


def _failure(future: Future) -> Failure:
    if future.result is None:
        return Failure("WorkerLost", f"{future.attempts} workers died over this request; ask for less")
    return msgspec.msgpack.decode(future.result, type=Failure)


async def _merged(streams: Sequence[Pieces]) -> Pieces:
    """The pieces of all, as they come; the first error ends it."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(MAX_WAITING_PIECES)
    tasks = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    num_left = len(tasks)
    try:
        while num_left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(stream: Pieces, queue: asyncio.Queue[Piece | Exception | None]) -> None:
    """All that a stream gives, and None at its end."""
    try:
        async with aclosing(stream):
            async for item in stream:
                await queue.put(item)
        await queue.put(None)
    except Exception as error:  # noqa: BLE001 - whoever reads the queue raises it
        await queue.put(error)
