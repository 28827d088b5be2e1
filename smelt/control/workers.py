"""Workers: who is connected, and which of them answers a live request; knows no HTTP and no model.

The handler of `transport.streams.listen` is `serve`; the API asks `generate`. Work of the ledger reaches workers and
launchers over the same links without anybody choosing: they take it when they have room.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

from smelt.control.answers import LiveAnswer, LiveRequest
from smelt.control.leases import Leases
from smelt.control.links import Link, Witness
from smelt.control.model_server import WorkerInfo
from smelt.errors import (
    AlreadyExists,
    ConnectionClosed,
    Overloaded,
    TooLarge,
    TransportError,
    Unavailable,
    WorkerLost,
)
from smelt.storage.futures import Granted, Ledger
from smelt.transport.messages import (
    Classified,
    Classify,
    Embed,
    Embedded,
    Finish,
    Generate,
    LoadModel,
    Render,
    Rendered,
    Result,
    TextChunk,
    UnloadModel,
)
from smelt.transport.streams import Connection

PATIENCE_SECONDS = 10.0  # for a worker to come: a restart takes that long
MAX_WAITING = 512  # live requests per worker of which nothing has been written yet

log = logging.getLogger(__name__)


def nobody(row: Granted, result: Result) -> None:
    """A witness that takes no note."""


class Workers:
    """Implements `ModelServer` with the workers that have dialled in. Belongs to one event loop.

    `witness` is told of each row of the ledger that is done.
    """

    def __init__(self, ledger: Ledger, patience_s: float = PATIENCE_SECONDS, witness: Witness = nobody) -> None:
        self._ledger = ledger
        self._witness = witness
        self._patience_s = patience_s
        self._links: list[Link] = []
        self._leases = Leases(self._links)
        self._live: set[str] = set()
        self._waiting: set[str] = set()
        self._has_changed = asyncio.Event()  # a worker has come, or the end
        self._is_idle = asyncio.Event()
        self._is_draining = False

    @property
    def workers(self) -> list[WorkerInfo]:
        """Who is connected, oldest first."""
        return [_describe(link) for link in self._links if link.connection.role == "worker"]

    async def serve(self, connection: Connection) -> None:
        """Work with one that has dialled in until it is gone; raises the reason."""
        link = Link(connection, self._ledger, self._witness, self._leases.note)
        self._links.append(link)
        self._has_changed.set()
        try:
            await link.run()
        finally:
            self._links.remove(link)
            self._leases.note(link)

    async def generate(self, request: Generate) -> AsyncGenerator[TextChunk | Finish, None]:
        """Pieces of the answers, and one Finish for each. Closing the generator cancels the work; see ModelServer."""
        async with self._answering(request) as answer:
            while (piece := await answer.take()) is not None:
                assert isinstance(piece, TextChunk | Finish), "texts come of texts"
                self._waiting.discard(request.request_id)
                yield piece

    async def embed(self, request: Embed) -> tuple[Embedded, Finish]:
        """The vectors, and how many tokens they are of; see ModelServer."""
        async with self._answering(request) as answer:
            vectors, finish = await answer.whole()
            assert isinstance(vectors, Embedded), "vectors come first"
            assert isinstance(finish, Finish), "and then the end"
            return vectors, finish

    async def render(self, request: Render) -> Rendered:
        """Conversations as data to train on; see ModelServer."""
        async with self._answering(request) as answer:
            rendered, _ = await answer.whole()
            assert isinstance(rendered, Rendered), "the data come first"
            return rendered

    async def classify(self, request: Classify) -> Classified:
        """The probabilities; see ModelServer."""
        async with self._answering(request) as answer:
            classified, _ = await answer.whole()
            assert isinstance(classified, Classified), "the probabilities come first"
            return classified

    async def load_model(self, model: str) -> None:
        """Have the worker that holds a model, or else the least busy one, hold it now."""
        async with self._answering(LoadModel(uuid.uuid4().hex, model)) as answer:
            await answer.whole()

    async def unload_model(self, model: str) -> int:
        """Have every worker that holds a model give it up, after its answers; how many did."""
        links = [link for link in self._links if link.connection.role == "worker" and model in link.status.models]
        await asyncio.gather(*[_unload(link, model) for link in links])
        return len(links)

    async def cancel(self, owner: str, future_id: str) -> bool:
        """Whether a request of the ledger was unfinished and is cancelled now; who works on it stops. NotFound."""
        was_cancelled = await self._ledger.cancel(owner, future_id)
        for link in self._links:
            if future_id in link.granted:
                link.cancel(future_id)
        return was_cancelled

    async def drain(self) -> None:
        """Take on nothing new, and wait until the live answers have ended. What the ledger holds stays there."""
        self._is_draining = True
        self._has_changed.set()
        for link in self._links:
            link.stop_granting()
        while self._live:
            self._is_idle.clear()
            await self._is_idle.wait()

    @asynccontextmanager
    async def _answering(self, request: LiveRequest) -> AsyncIterator[LiveAnswer]:
        """The answer that some worker gives while the block runs; what of it is unfinished then is cancelled."""
        self._admit(request)
        try:
            link, answer = await self._begin(request)
            try:
                yield answer
            finally:
                link.leave(answer)
        finally:
            self._forget(request)

    def _admit(self, request: LiveRequest) -> None:
        if request.request_id in self._live:
            raise AlreadyExists(f"a request {request.request_id!r} is being answered already")
        if len(self._waiting) >= MAX_WAITING * max(1, len(self.workers)):
            raise Overloaded(f"{len(self._waiting)} requests wait for an answer already; try again", retry_after_s=5)
        self._live.add(request.request_id)
        self._waiting.add(request.request_id)

    def _forget(self, request: LiveRequest) -> None:
        self._waiting.discard(request.request_id)
        self._live.discard(request.request_id)
        if not self._live:
            self._is_idle.set()

    async def _begin(self, request: LiveRequest) -> tuple[Link, LiveAnswer]:
        """Give a request to a worker; to another one where it turns out to be gone."""
        while True:
            link = await self._wait_for_link(request.model)
            try:
                return link, await link.begin(request)
            except ConnectionClosed:
                continue
            except TransportError as oversize:
                raise TooLarge(f"the request cannot be passed on: {oversize}") from oversize

    async def _wait_for_link(self, model: str) -> Link:
        try:
            async with asyncio.timeout(self._patience_s):
                while True:
                    if self._is_draining:
                        raise Unavailable("the server is going down", retry_after_s=5)
                    if link := self._choose(model):
                        return link
                    self._has_changed.clear()
                    await self._has_changed.wait()
        except TimeoutError:
            raise Unavailable("no worker is connected; one that has died comes back by itself", 5) from None

    def _choose(self, model: str) -> Link | None:
        """The least busy worker that has the model, or else the least busy."""
        links = [link for link in self._links if link.connection.role == "worker" and link.is_open]
        holding = [link for link in links if link.has_model(model)]
        return min(holding or links, key=lambda link: link.num_busy, default=None)


async def _unload(link: Link, model: str) -> None:
    with suppress(ConnectionClosed, WorkerLost):  # which holds nothing any more
        answer = await link.begin(UnloadModel(uuid.uuid4().hex, model))
        try:
            await answer.whole()
        finally:
            link.leave(answer)


def _describe(link: Link) -> WorkerInfo:
    connection, status = link.connection, link.status
    return WorkerInfo(
        connection.name,
        connection.epoch,
        status.device,
        status.models,
        status.num_running,
        status.num_waiting,
        status.model_loads,
        status.num_lent_bytes,
    )
