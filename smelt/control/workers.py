"""Workers: who is connected, and which of them answers a live request; knows no HTTP and no model.

The handler of `transport.streams.listen` is `serve`; the API asks `generate`. Work of the ledger reaches workers and
launchers over the same links without anybody choosing: they take it when they have room.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator

from smelt.control.answers import LiveAnswer
from smelt.control.links import Link
from smelt.control.model_server import WorkerInfo
from smelt.errors import AlreadyExists, ConnectionClosed, TooLarge, TransportError, Unavailable
from smelt.storage.futures import Ledger
from smelt.transport.messages import Finish, Generate, TextChunk
from smelt.transport.streams import Connection

PATIENCE_SECONDS = 10.0  # for a worker to come: a restart takes that long
MAX_WAITING = 512  # live requests per worker of which nothing has been written yet

log = logging.getLogger(__name__)


class Workers:
    """Implements `ModelServer` with the workers that have dialled in. Belongs to one event loop."""

    def __init__(self, ledger: Ledger, patience_s: float = PATIENCE_SECONDS) -> None:
        self._ledger = ledger
        self._patience_s = patience_s
        self._links: list[Link] = []
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
        link = Link(connection, self._ledger)
        self._links.append(link)
        self._has_changed.set()
        try:
            await link.run()
        finally:
            self._links.remove(link)

    async def generate(self, request: Generate) -> AsyncGenerator[TextChunk | Finish, None]:
        """Pieces of the answer, then one Finish. Closing the generator cancels the work; see ModelServer."""
        self._admit(request)
        try:
            link, answer = await self._begin(request)
            try:
                while not isinstance(piece := await answer.take(), Finish):
                    self._waiting.discard(request.request_id)
                    yield piece
                yield piece
            finally:
                link.leave(answer)
        finally:
            self._forget(request)

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

    def _admit(self, request: Generate) -> None:
        if request.request_id in self._live:
            raise AlreadyExists(f"a request {request.request_id!r} is being answered already")
        if len(self._waiting) >= MAX_WAITING * max(1, len(self.workers)):
            raise Unavailable(f"{len(self._waiting)} requests wait for an answer already; try again", retry_after_s=5)
        self._live.add(request.request_id)
        self._waiting.add(request.request_id)

    def _forget(self, request: Generate) -> None:
        self._waiting.discard(request.request_id)
        self._live.discard(request.request_id)
        if not self._live:
            self._is_idle.set()

    async def _begin(self, request: Generate) -> tuple[Link, LiveAnswer]:
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


def _describe(link: Link) -> WorkerInfo:
    connection, status = link.connection, link.status
    return WorkerInfo(
        connection.name, connection.epoch, status.device, status.models, status.num_running, status.num_waiting
    )
