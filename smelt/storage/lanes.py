"""Whose turn it is: the order of futures within a lane, and which of them a worker may have next.

Pure SQL on the writer's connection. A lane's `next_seq` is the lowest seq that was neither granted, settled nor
given up. A future is `ready` when it is queued and it is its turn: at once where there is no order, otherwise when
it is the lowest queued one of its lane and nothing below it is missing.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, and_, exists, func, or_, select
from sqlalchemy.sql import ColumnElement

from smelt.errors import StaleEpoch
from smelt.storage.tables import AnyRow, epochs, futures, lanes

# After so many workers died holding it, a future has failed.
MAX_ATTEMPTS = 3


def advance(connection: Connection, names: Iterable[str]) -> None:
    """Bring `next_seq` and `ready` up to date in lanes whose futures changed; None and unordered ones stay."""
    ordered = _ordered(connection, set(names))
    if not ordered:
        return
    settled = exists().where(
        futures.c.lane == lanes.c.lane, futures.c.seq == lanes.c.next_seq, futures.c.state != "queued"
    )
    skip = lanes.update().where(lanes.c.lane.in_(ordered), settled).values(next_seq=lanes.c.next_seq + 1)
    while connection.execute(skip).rowcount:
        pass
    lowest = (
        select(futures.c.number)
        .where(futures.c.lane == lanes.c.lane, futures.c.state == "queued", futures.c.seq <= lanes.c.next_seq)
        .order_by(futures.c.seq)
        .limit(1)
        .scalar_subquery()
    )
    turns = connection.execute(select(lowest).where(lanes.c.lane.in_(ordered))).scalars().all()
    connection.execute(futures.update().where(futures.c.lane.in_(ordered), futures.c.ready).values(ready=False))
    connection.execute(futures.update().where(futures.c.number.in_(turns)).values(ready=True))


def grant(connection: Connection, epoch: int, limit: int, kinds: tuple[str, ...]) -> list[AnyRow]:
    """Give up to `limit` ready futures of these kinds to a worker: one of each lane, then their successors.

    A lane belongs to one worker while it holds any of its futures. A future whose worker died is granted alone, so
    that it cannot take others with it again. StaleEpoch where the connection is over.
    """
    if connection.execute(select(epochs.c.closed).where(epochs.c.epoch == epoch)).scalar_one_or_none() is not False:
        raise StaleEpoch(f"epoch {epoch} is over: the worker must connect again")
    held = select(func.count(), func.max(futures.c.attempts)).where(
        futures.c.state == "granted", futures.c.epoch == epoch
    )
    num_held, max_attempts = connection.execute(held).one()
    if max_attempts:
        return []
    wanted = futures.c.kind.in_(kinds)
    suspects = _ready(connection, epoch, and_(wanted, futures.c.attempts > 0), 1)
    if suspects:
        return [] if num_held else _mark_granted(connection, epoch, suspects)
    granted: list[AnyRow] = []
    while len(granted) < limit:
        rows = _ready(connection, epoch, and_(wanted, futures.c.attempts == 0), limit - len(granted))
        if not rows:
            break
        granted += _mark_granted(connection, epoch, rows)
    return granted


def release(connection: Connection, epoch: int, died: bool, now: float) -> list[str]:
    """End a connection: what it held is queued again; ids of what has failed instead.

    Where the worker died, that was an attempt, and there are three. One that said goodbye blames nobody.
    """
    connection.execute(epochs.update().where(epochs.c.epoch == epoch).values(closed=True))
    held = and_(futures.c.state == "granted", futures.c.epoch == epoch)
    names = connection.execute(select(futures.c.lane).where(held).distinct()).scalars().all()
    failed = _fail_worn_out(connection, held, now) if died else []
    _queue_again(connection, held, names, attempts=futures.c.attempts + int(died), updated=now)
    return failed


def _fail_worn_out(connection: Connection, held: ColumnElement[bool], now: float) -> list[str]:
    worn_out = and_(held, futures.c.attempts >= MAX_ATTEMPTS - 1)
    failed = connection.execute(select(futures.c.id).where(worn_out)).scalars().all()
    failure = {"state": "failed", "category": "server", "attempts": MAX_ATTEMPTS, "updated": now}
    connection.execute(futures.update().where(worn_out).values(failure))
    return list(failed)


def recover(connection: Connection) -> None:
    """At the start: no connection of an earlier process is open, and what it had granted is queued again.

    Not counted as an attempt: it was not the worker that died.
    """
    connection.execute(epochs.update().where(~epochs.c.closed).values(closed=True))
    granted = futures.c.state == "granted"
    names = connection.execute(select(futures.c.lane).where(granted).distinct()).scalars().all()
    _queue_again(connection, granted, names)


def holes(connection: Connection) -> dict[tuple[str, int], int]:
    """(lane, seq that is missing) -> lowest seq that waits behind it."""
    lowest = func.min(futures.c.seq)
    query = (
        select(lanes.c.lane, lanes.c.next_seq, lowest)
        .join(futures, futures.c.lane == lanes.c.lane)
        .where(futures.c.state == "queued")
        .group_by(lanes.c.lane, lanes.c.next_seq)
        .having(lowest > lanes.c.next_seq)
    )
    return {(lane, missing): seq for lane, missing, seq in connection.execute(query)}


def abandon(connection: Connection, missing: Iterable[tuple[str, int]]) -> None:
    """Give up what is still missing: the lane goes on with the lowest seq that waits."""
    waiting = holes(connection)
    for lane, seq in missing:
        if (lane, seq) in waiting:
            update = lanes.update().where(lanes.c.lane == lane).values(next_seq=waiting[lane, seq])
            connection.execute(update)
            advance(connection, [lane])


def _ordered(connection: Connection, names: set[str]) -> list[str]:
    query = select(lanes.c.lane).where(lanes.c.lane.in_(names), lanes.c.next_seq.is_not(None))
    return list(connection.execute(query).scalars()) if names else []


def _ready(connection: Connection, epoch: int, condition: ColumnElement[bool], limit: int) -> list[AnyRow]:
    held = futures.alias("held")
    elsewhere = exists().where(held.c.lane == futures.c.lane, held.c.state == "granted", held.c.epoch != epoch)
    free = or_(lanes.c.next_seq.is_(None), ~elsewhere)
    query = (
        select(futures)
        .join(lanes, lanes.c.lane == futures.c.lane, isouter=True)
        .where(futures.c.ready, condition, free)
        .order_by(futures.c.number)
        .limit(limit)
    )
    return list(connection.execute(query))


def _mark_granted(connection: Connection, epoch: int, rows: list[AnyRow]) -> list[AnyRow]:
    numbers = [row.number for row in rows]
    values = {"state": "granted", "epoch": epoch, "ready": False}
    connection.execute(futures.update().where(futures.c.number.in_(numbers)).values(values))
    advance(connection, {row.lane for row in rows if row.lane is not None})
    return rows


def _queue_again(
    connection: Connection, which: ColumnElement[bool], names: Iterable[str | None], **values: Any
) -> None:
    # Where there is an order, `advance` then takes `ready` from all but the first.
    again = {"state": "queued", "epoch": None, "ready": True} | values
    connection.execute(futures.update().where(which).values(again))
    advance(connection, {name for name in names if name is not None})
