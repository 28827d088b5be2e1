"""Batches as rows: how one changes, and the requests of its lane; knows no request's meaning.

Pure SQL.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, delete, func, select

from smelt.storage import records
from smelt.storage.records import BatchJob
from smelt.storage.tables import AnyRow, batch_jobs, futures, lanes
from smelt.storage.transitions import FINISHED, State

OVER = ("completed", "failed", "expired", "cancelled")


def states(lane: str, connection: Connection) -> list[tuple[int, str, State]]:
    """(seq, id, state) of each request of a lane, in order."""
    query = select(futures.c.seq, futures.c.id, futures.c.state).where(futures.c.lane == lane).order_by(futures.c.seq)
    return [(row.seq, row.id, row.state) for row in connection.execute(query)]


def outcomes(lane: str, after: int, limit: int, connection: Connection) -> Sequence[AnyRow]:
    """The first finished requests of a lane behind a seq, in order."""
    finished = futures.c.lane == lane, futures.c.seq > after, futures.c.state.in_(FINISHED)
    return connection.execute(select(futures).where(*finished).order_by(futures.c.seq).limit(limit)).all()


def forget(lane: str, connection: Connection) -> None:
    """Remove a lane with all that was asked of it: what came of that is elsewhere by now."""
    connection.execute(delete(futures).where(futures.c.lane == lane))
    connection.execute(delete(lanes).where(lanes.c.lane == lane))


def unfinished(connection: Connection) -> list[tuple[str, str]]:
    """(owner, id) of each batch that is not over, oldest first."""
    query = select(batch_jobs.c.owner, batch_jobs.c.id).where(batch_jobs.c.status.not_in(OVER))
    return [(row.owner, row.id) for row in connection.execute(query.order_by(batch_jobs.c.created))]


def num_unfinished(connection: Connection, owner: str) -> int:
    """How many batches of an owner are not over."""
    query = select(func.count()).where(batch_jobs.c.owner == owner, batch_jobs.c.status.not_in(OVER))
    return int(connection.execute(query).scalar_one())


def move(
    connection: Connection, owner: str, batch_id: str, expected: Sequence[str], now: float, **changes: Any
) -> BatchJob:
    """Change a batch if it has one of these statuses, and return it as it is then. NotFound."""
    batch = records.get(connection, BatchJob, owner, batch_id)
    if batch.status not in expected:
        return batch
    batch = replace(batch, **changes, times={**batch.times, changes["status"]: now})
    records.replace(connection, batch)
    return batch
