"""A worker's end of one connection: what comes in goes to the inference server, what that gives goes out.

Knows no models. When the connection ends, so does all that it asked for: nobody would hear the answers.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from smelt.errors import ConnectionClosed, InvalidInput, SmeltError, TransportError, Unavailable
from smelt.inference.events import End, Piece, Vectors
from smelt.inference.server import InferenceServer
from smelt.transport.failures import failure_of
from smelt.transport.messages import (
    Cancel,
    Completion,
    Finish,
    Generate,
    Grant,
    Message,
    Ping,
    Pong,
    Result,
    TextChunk,
    WorkerStatus,
)
from smelt.transport.streams import Connection

STALLED_SECONDS = 15.0  # a server that reads nothing for so long is gone, and answers must not pile up for it
MAX_BURST = 64  # messages that are sent together: what one step of the engine gives, usually


@dataclass(eq=False, slots=True)
class Work:
    """A live request or, with the `grant`, one of the ledger, whose text is kept until it is whole."""

    request_id: str
    grant: Grant | None
    texts: list[str] = field(default_factory=list)


class Uplink:
    """`serve` it until the connection ends, and let it `take` what the inference server gives meanwhile."""

    def __init__(self, connection: Connection, server: InferenceServer, status: WorkerStatus) -> None:
        self._connection = connection
        self._server = server
        self._status = status
        self._work: dict[str, Work] = {}  # by the key that the inference server knows it by
        self._unsent: deque[Message] = deque([status])
        self._has_unsent = asyncio.Event()
        self._has_unsent.set()
        self._is_idle = asyncio.Event()

    async def serve(self) -> None:
        """Until the connection ends or this is cancelled; what is still running is dropped."""
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._receive())
                both.create_task(self._send())
        finally:
            for key in self._work:
                self._server.cancel(key)
            self._work.clear()
            self._unsent.clear()
            self._is_idle.set()

    async def leave(self) -> None:
        """Say goodbye, and return when what was begun has ended and been sent."""
        self._status = msgspec.structs.replace(self._status, leaving=True)
        self._tell(self._status)
        while self._work or self._unsent:
            self._is_idle.clear()
            await self._is_idle.wait()

    def take(self, event: Piece | End | Vectors) -> None:
        """Pass on what came of this connection's requests; what is of an earlier one finds nobody."""
        work = self._work.get(event.key)
        if work is None:
            return
        if isinstance(event, Piece):
            self._take_piece(work, event)
        elif isinstance(event, End):
            del self._work[event.key]
            self._tell(_ended(work, event))

    def take_status(self, status: WorkerStatus) -> None:
        """Tell what the worker is doing now."""
        self._status = msgspec.structs.replace(status, leaving=self._status.leaving)
        self._tell(self._status)

    def _take_piece(self, work: Work, piece: Piece) -> None:
        if work.grant is None:
            self._tell(TextChunk(work.request_id, piece.text, tuple(piece.token_ids)))
        else:
            work.texts.append(piece.text)

    async def _receive(self) -> None:
        async for message in self._connection:
            match message:
                case Generate():
                    self._begin(Work(message.request_id, None), message)
                case Grant():
                    self._begin_granted(message)
                case Cancel():
                    self._server.cancel(self._key(message.request_id))
                case Ping():
                    self._tell(Pong(message.sent_at))
                case _:
                    raise TransportError(f"the server sends a worker no {type(message).__name__}")

    def _begin_granted(self, grant: Grant) -> None:
        work = Work(grant.future_id, grant)
        try:
            if grant.kind != "generate":
                raise InvalidInput(f"a worker does not do work of the kind {grant.kind!r}")
            request = msgspec.msgpack.decode(grant.body, type=Generate)
        except (InvalidInput, msgspec.DecodeError) as error:
            self._tell(_ended(work, End("", "aborted", error=error)))
        else:
            self._begin(work, request)

    def _begin(self, work: Work, request: Generate) -> None:
        if self._status.leaving:
            # Sent before the server had heard of it. What was granted goes back by itself when we hang up.
            if work.grant is None:
                error = Unavailable("the worker is going down; ask again")
                self._tell(_ended(work, End("", "aborted", error=error)))
            return
        key = self._key(work.request_id)
        self._work[key] = work
        self._server.submit(key, request)

    def _key(self, request_id: str) -> str:
        """Work of the ledger may come again over a later connection, before its first try has ended here."""
        return f"{self._connection.epoch}/{request_id}"

    def _tell(self, message: Message) -> None:
        self._unsent.append(message)
        self._has_unsent.set()

    async def _send(self) -> None:
        while True:
            await self._has_unsent.wait()
            self._has_unsent.clear()
            while self._unsent:
                burst = list(islice(self._unsent, MAX_BURST))
                try:
                    async with asyncio.timeout(STALLED_SECONDS):
                        await self._connection.send(*burst)
                except TimeoutError:
                    raise ConnectionClosed(f"the server has read nothing for {STALLED_SECONDS:g} s") from None
                for _ in burst:
                    self._unsent.popleft()
            if not self._work:
                self._is_idle.set()


def _ended(work: Work, end: End) -> Message:
    failure = failure_of(end.error) if end.error else None
    if work.grant is None:
        return Finish(work.request_id, end.reason, end.num_prompt_tokens, end.num_output_tokens, failure)
    if failure is None and end.reason == "aborted":
        failure = failure_of(SmeltError("it was cancelled"))
    if failure is not None:
        return Result(work.grant.future_id, work.grant.epoch, failure=failure)
    completion = Completion("".join(work.texts), end.reason, end.num_prompt_tokens, end.num_output_tokens)
    return Result(work.grant.future_id, work.grant.epoch, msgspec.msgpack.encode(completion))
