"""A worker's end of one connection: what comes in goes to the inference server, what that gives goes out.

Knows no models. When the connection ends, so does all that it asked for: nobody would hear the answers.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from smelt.cluster.samples import encoded
from smelt.cluster.training_lanes import Note, Told, TrainingLanes
from smelt.errors import ConnectionClosed, InvalidInput, SmeltError, TooLarge, TransportError, Unavailable
from smelt.inference.events import ClassifyRequest, End, MadeWay, Piece, RenderedData, Samples, Scores, Vectors
from smelt.inference.server import InferenceServer
from smelt.transport.failures import failure_of
from smelt.transport.frames import MAX_FRAME_BYTES
from smelt.transport.messages import (
    Cancel,
    Classified,
    Classify,
    Completion,
    Embed,
    Embedded,
    Finish,
    Generate,
    Grant,
    Lend,
    Lent,
    LoadModel,
    LogPart,
    Message,
    Ping,
    Pong,
    Render,
    Rendered,
    Result,
    SnapshotKept,
    TextChunk,
    UnloadModel,
    WorkerStatus,
)
from smelt.transport.operations import SAMPLE, TRAINING_KINDS, Sample
from smelt.transport.streams import Connection
from smelt.transport.tinker_wire import encode_data
from smelt.types import TokenLogprob

STALLED_SECONDS = 15.0  # a server that reads nothing for so long is gone, and answers must not pile up for it
FRAME_MARGIN = 4096  # bytes that a result has beside its body
MAX_BURST = 64  # messages that are sent together: what one step of the engine gives, usually


@dataclass(slots=True)
class Draft:
    """What has been written so far of an answer that is sent when it is whole."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Work:
    """A live request or, with the `grant`, one of the ledger, whose answers are kept until they are whole."""

    request_id: str
    grant: Grant | None = None
    num_answers: int = 1
    num_ended: int = 0
    drafts: dict[int, Draft] = field(default_factory=dict)
    completions: dict[int, Completion] = field(default_factory=dict)
    samples: bytes | None = None  # of a sampler, instead of completions

    def take(self, piece: Piece) -> None:
        """Keep a piece."""
        draft = self.drafts.setdefault(piece.index, Draft())
        draft.texts.append(piece.text)
        draft.logprobs += piece.logprobs

    def complete(self, end: End) -> None:
        """Put an answer together."""
        draft = self.drafts.pop(end.index, Draft())
        self.completions[end.index] = Completion(
            "".join(draft.texts),
            end.reason,
            end.num_prompt_tokens,
            end.num_output_tokens,
            end.num_cached_tokens,
            tuple(draft.logprobs),
            end.tool_calls,
        )


class Uplink:
    """`serve` it until the connection ends, and let it `take` what the inference server gives meanwhile."""

    def __init__(
        self, connection: Connection, server: InferenceServer, status: WorkerStatus, lanes: TrainingLanes | None = None
    ) -> None:
        self._connection = connection
        self._server = server
        self._lanes = lanes
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
            self._server.lend("", 0)  # runs end with the server's connections, too
            if self._lanes is not None:
                self._lanes.hang_up()
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

    def take(self, event: Piece | End | Vectors | RenderedData | Scores | Samples | MadeWay) -> None:
        """Pass on what came of this connection's requests; what is of an earlier one finds nobody."""
        work = self._work.get(event.key)
        if work is None:
            return
        if isinstance(event, End):
            self._take_end(work, event)
        elif isinstance(event, Samples):
            work.samples = encoded(event)
        elif work.grant is None:
            self._tell(_piece(work, event))
        else:
            assert isinstance(event, Piece), "the ledger has no requests for vectors"
            work.take(event)

    def take_told(self, told: Told) -> None:
        """Pass on what a session's lane has to say."""
        if isinstance(told, Note):
            if told.epoch == self._connection.epoch:
                self._tell(told.message)
        elif (work := self._work.pop(told.key, None)) and work.grant is not None:
            self._tell(_failed(work.grant, told.error) if told.error else _done(work.grant, told.body))

    def take_status(self, status: WorkerStatus) -> None:
        """Tell what the worker is doing now."""
        self._status = msgspec.structs.replace(status, leaving=self._status.leaving)
        self._tell(self._status)

    def _take_end(self, work: Work, end: End) -> None:
        work.num_ended += 1
        is_over = end.reason == "aborted" or work.num_ended == work.num_answers
        if is_over:
            del self._work[end.key]
        if work.grant is None:
            self._tell(_finish(work, end))
        elif end.reason == "aborted":
            self._tell(_failed(work.grant, end.error or SmeltError("it was cancelled")))
        else:
            work.complete(end)
            if is_over:
                self._tell(_written(work, work.grant))

    async def _receive(self) -> None:
        async for message in self._connection:
            match message:
                case Generate() | Embed() | Render() | Classify() | LoadModel() | UnloadModel() | Lend():
                    self._begin_live(message)
                case Grant():
                    self._begin_granted(message)
                case Cancel():
                    self._cancel(self._key(message.request_id))
                case LogPart() if self._lanes is not None:
                    self._lanes.take_log(message)
                case SnapshotKept() if self._lanes is not None:
                    self._lanes.take_kept(message)
                case Ping():
                    self._tell(Pong(message.sent_at))
                case _:
                    raise TransportError(f"the server sends a worker no {type(message).__name__}")

    def _begin_live(self, request: Generate | Embed | Render | Classify | LoadModel | UnloadModel | Lend) -> None:
        work = Work(request.request_id)
        if self._status.leaving:  # sent before the server had heard of it
            error = Unavailable("the worker is going down; ask again")
            self._tell(_finish(work, End("", "aborted", error=error)))
            return
        key = self._remember(work)
        match request:
            case Generate():
                work.num_answers = request.num_samples
                self._server.submit(key, request)
            case Embed():
                self._server.embed(key, request)
            case Render():
                self._server.render(key, request)
            case Classify():
                self._server.classify(key, ClassifyRequest(request.texts, request.model))
            case LoadModel():
                self._server.load(key, request.model)
            case UnloadModel():
                self._server.unload(key, request.model)
            case Lend():
                self._server.lend(key, request.num_bytes)

    def _cancel(self, key: str) -> None:
        self._server.cancel(key)
        if self._lanes is not None:
            self._lanes.cancel(key)

    def _begin_granted(self, grant: Grant) -> None:
        if self._status.leaving:
            return  # it goes back by itself when we hang up
        try:
            if grant.kind == "generate":
                self._write(grant, msgspec.msgpack.decode(grant.body, type=Generate))
            elif grant.kind in TRAINING_KINDS and self._lanes is not None:
                self._lanes.begin(self._remember(Work(grant.future_id, grant)), grant)
            elif grant.kind == SAMPLE and self._lanes is not None:
                sample = msgspec.msgpack.decode(grant.body, type=Sample)
                self._lanes.sample(self._remember(Work(grant.future_id, grant)), grant, sample)
            else:
                raise InvalidInput(f"a worker does not do work of the kind {grant.kind!r}")
        except (InvalidInput, msgspec.DecodeError) as error:
            self._tell(_failed(grant, error))

    def _write(self, grant: Grant, request: Generate) -> None:
        self._server.submit(self._remember(Work(grant.future_id, grant, request.num_samples)), request)

    def _remember(self, work: Work) -> str:
        key = self._key(work.request_id)
        self._work[key] = work
        return key

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
                if self._lanes is not None and any(isinstance(message, Result) for message in burst):
                    self._lanes.fault("after_result_sent")
            if not self._work:
                self._is_idle.set()


def _piece(work: Work, event: Piece | Vectors | RenderedData | Scores | MadeWay) -> Message:
    if isinstance(event, MadeWay):
        return Lent(work.request_id, event.models)
    if isinstance(event, Scores):
        return Classified(work.request_id, event.labels, event.probabilities)
    if isinstance(event, RenderedData):
        return Rendered(work.request_id, encode_data(event.data))
    if isinstance(event, Vectors):
        return Embedded(work.request_id, event.vectors, event.width)
    return TextChunk(work.request_id, event.text, tuple(event.token_ids), event.index, event.logprobs)


def _finish(work: Work, end: End) -> Finish:
    return Finish(
        work.request_id,
        end.reason,
        end.num_prompt_tokens,
        end.num_output_tokens,
        failure_of(end.error) if end.error else None,
        end.index,
        end.num_cached_tokens,
        end.tool_calls,
    )


def _failed(grant: Grant, error: Exception) -> Result:
    return Result(grant.future_id, grant.epoch, failure=failure_of(error))


def _done(grant: Grant, body: bytes) -> Result:
    if len(body) > MAX_FRAME_BYTES - FRAME_MARGIN:
        return _failed(grant, TooLarge(f"the result has {len(body):,} bytes, and {MAX_FRAME_BYTES:,} can be sent"))
    return Result(grant.future_id, grant.epoch, body)


def _written(work: Work, grant: Grant) -> Result:
    if work.samples is not None:
        return _done(grant, work.samples)
    completions = [work.completions[index] for index in sorted(work.completions)]
    return Result(grant.future_id, grant.epoch, msgspec.msgpack.encode(completions))
