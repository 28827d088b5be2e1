"""Sessions: a client's stay at the Tinker API, from its start to what it says at its end; knows no HTTP and no model.

Heartbeats are remembered and not written down: a session's death decides about nothing that is durable.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection, Engine

from smelt.storage import records, session_rows
from smelt.storage.records import SamplerRecord, Session, TrainingModel
from smelt.storage.writer import Writer

NAMED = "named-adapters"  # the project of sessions that have no client: somebody named an adapter
SILENCE_S = 300.0  # after which a session counts as gone

Standing = Literal["active", "finished", "gone"]

T = TypeVar("T")


class Sessions:
    """The sessions of every owner."""

    def __init__(self, database: Engine, writer: Writer, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        self._started = clock()
        self._heard: dict[str, float] = {}  # last heartbeats

    async def create(self, session: Session) -> str:
        """Keep a new session, and give its id."""
        await self._write(partial(records.add, record=session))
        self._heard[session.id] = self._clock()
        return session.id

    async def read(self, owner: str, session_id: str) -> Session:
        """The owner's session. NotFound."""
        return await self._ask(lambda connection: records.get(connection, Session, owner, session_id))

    async def beat(self, owner: str, session_id: str) -> bool:
        """Note that the client lives; False where the session had been finished. NotFound."""
        session = await self.read(owner, session_id)
        if session.finished is None:
            self._heard[session_id] = self._clock()
        return session.finished is None

    async def finish(self, owner: str, session_id: str, ending: dict[str, Any]) -> None:
        """Keep what the client says at its end; the first word counts. NotFound."""

        def write(connection: Connection) -> None:
            session = records.get(connection, Session, owner, session_id)
            if session.finished is None:
                records.replace(connection, replace(session, finished=time.time(), ending=ending))

        await self._write(write)
        self._heard.pop(session_id, None)

    async def assign_project(self, owner: str, session_id: str, project_id: str) -> None:
        """Say which project a session is of. NotFound."""

        def write(connection: Connection) -> None:
            session = records.get(connection, Session, owner, session_id)
            records.replace(connection, replace(session, project_id=project_id))

        await self._write(write)

    async def page(self, owner: str, limit: int, offset: int) -> list[Session]:
        """The owner's sessions, newest first."""
        return await self._ask(partial(session_rows.newest_sessions, owner=owner, limit=limit, offset=offset))

    async def parts(self, owner: str, session_id: str) -> tuple[list[TrainingModel], list[SamplerRecord]]:
        """The models and the samplers of a session, oldest first."""

        def ask(connection: Connection) -> tuple[list[TrainingModel], list[SamplerRecord]]:
            models = records.find(connection, TrainingModel, owner, session_id=session_id)
            return models, records.find(connection, SamplerRecord, owner, session_id=session_id)

        return await self._ask(ask)

    async def trace(self, session_id: str) -> list[tuple[str, str, str, float, float]]:
        """(lane, kind, state, accepted, last changed) of each request of a session, in seconds since 1970."""
        return await self._ask(partial(session_rows.trace, session_id=session_id))

    def standing(self, session: Session) -> Standing:
        """Whether its client is there. After a start nobody is gone before they could have been heard."""
        if session.finished is not None:
            return "finished"
        return "gone" if self.silence_s(session.id) > SILENCE_S else "active"

    def silence_s(self, session_id: str) -> float:
        """How long nothing was heard of a session, as far as this process knows."""
        return self._clock() - self._heard.get(session_id, self._started)

    async def _ask(self, run: Callable[[Connection], T]) -> T:
        return await asyncio.to_thread(ask, self._database, run)

    async def _write(self, run: Callable[[Connection], T]) -> T:
        return await asyncio.wrap_future(self._writer.write(run))


def ask(database: Engine, run: Callable[[Connection], T]) -> T:
    """What a question to the database gives."""
    with database.connect() as connection:
        return run(connection)
