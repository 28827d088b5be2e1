"""Whose turn it is: the order of futures within a lane, and which of them a worker may have next.

Pure SQL on the writer's connection. A lane's `next_seq` is the lowest seq that was neither granted, settled nor
given up. A future is `ready` when it is queued and it is its turn: at once where there is no order, otherwise when
it is the lowest queued one of its lane and nothing below it is missing.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, and_, bindparam, exists, func, or_, select
from sqlalchemy.sql import ColumnElement

from smelt.errors import StaleEpoch
from smelt.storage.statements import Prepared
from smelt.storage.tables import AnyRow, epochs, futures, lanes

# After so many workers died holding it, a future has failed.
MAX_ATTEMPTS = 3


_settled = futures.alias("settled")
_successor = futures.alias("successor")
_held = futures.alias("held")
_before = futures.alias("before")
_names = lanes.c.lane.in_(bindparam("names", expanding=True))

ORDERED = select(lanes.c.lane).where(_names, lanes.c.next_seq.is_not(None))
# To the end of the run of settled futures that begins at `next_seq`.
SKIP = (
    lanes.update()
    .where(
        _names,
        exists().where(
            _settled.c.lane == lanes.c.lane, _settled.c.seq == lanes.c.next_seq, _settled.c.state != "queued"
        ),
    )
    .values(
        next_seq=select(_settled.c.seq + 1)
        .where(
            _settled.c.lane == lanes.c.lane,
            _settled.c.seq >= lanes.c.next_seq,
            _settled.c.state != "queued",
            ~exists().where(
                _successor.c.lane == _settled.c.lane,
                _successor.c.seq == _settled.c.seq + 1,
                _successor.c.state != "queued",
            ),
        )
        .order_by(_settled.c.seq)
        .limit(1)
        .scalar_subquery()
    )
)
TURNS = select(
    select(futures.c.number)
    .where(futures.c.lane == lanes.c.lane, futures.c.state == "queued", futures.c.seq <= lanes.c.next_seq)
    .order_by(futures.c.seq)
    .limit(1)
    .scalar_subquery()
).where(_names)
_turns = futures.c.number.in_(bindparam("turns", expanding=True))
SET_READY = (
    futures.update()
    .where(futures.c.lane.in_(bindparam("names", expanding=True)), or_(futures.c.ready, _turns))
    .values(ready=_turns)
)

HOLDER = Prepared(
    select(
        epochs.c.closed,
        select(func.max(futures.c.attempts))
        .where(futures.c.state == "granted", futures.c.epoch == bindparam("of_epoch"))
        .scalar_subquery()
        .label("max_attempts"),
    ).where(epochs.c.epoch == bindparam("of_epoch"))
)
_is_suspect = futures.c.attempts > 0
READY = (
    select(futures)
    .join(lanes, lanes.c.lane == futures.c.lane, isouter=True)
    .where(
        futures.c.ready,
        futures.c.kind.in_(bindparam("kinds", expanding=True)),
        or_(
            lanes.c.next_seq.is_(None),
            ~exists().where(
                _held.c.lane == futures.c.lane, _held.c.state == "granted", _held.c.epoch != bindparam("of_epoch")
            )
            & ~exists().where(
                _before.c.lane == futures.c.lane,
                _before.c.seq == futures.c.seq - 1,
                _before.c.epoch != bindparam("of_epoch"),
                _before.c.epoch == epochs.c.epoch,
                ~epochs.c.closed,
            ),
        ),
    )
    .order_by(_is_suspect.desc(), futures.c.number)
    .limit(bindparam("at_most"))
)
MARK = (
    futures.update()
    .where(futures.c.number.in_(bindparam("numbers", expanding=True)))
    .values(state="granted", epoch=bindparam("to_epoch"), ready=False)
)


def advance(connection: Connection, names: Iterable[str]) -> bool:
    """Bring `next_seq` and `ready` up to date in lanes whose futures changed; False where none of them has an order."""
    ordered = connection.execute(ORDERED, {"names": list(set(names))}).scalars().all() if names else []
    if not ordered:
        return False
    connection.execute(SKIP, {"names": ordered})
    turns = connection.execute(TURNS, {"names": ordered}).scalars().all()
    connection.execute(SET_READY, {"names": ordered, "turns": turns})
    return True


def grant(
    connection: Connection, epoch: int, limit: int, kinds: tuple[str, ...], all_kinds: tuple[str, ...] = ()
) -> list[AnyRow]:
    """Give up to `limit` ready futures of these kinds to a worker: one of each lane, then their successors.

    A lane belongs to one worker while it holds any of its futures, and stays with the one that did the last of them
    for as long as that is connected: it has in memory what they made. A future whose worker died is granted alone, so
    that it cannot take others with it again: before all others of `all_kinds`. StaleEpoch where the connection is over.
    """
    holder = HOLDER(connection, of_epoch=epoch).one_or_none()
    if holder is None or holder.closed:
        raise StaleEpoch(f"epoch {epoch} is over: the worker must connect again")
    if holder.max_attempts:
        return []
    granted: list[AnyRow] = []
    beside = tuple(kind for kind in all_kinds if kind not in kinds)
    if beside and _is_behind(connection, epoch, kinds, beside):
        return []
    has_successors = True
    while has_successors and len(granted) < limit:
        wanted = {"kinds": kinds, "of_epoch": epoch, "at_most": limit - len(granted)}
        rows = list(connection.execute(READY, wanted))
        if rows and rows[0].attempts:  # suspects come first
            is_alone = holder.max_attempts is None and not granted
            rows = rows[:1] if is_alone else []
            limit = len(rows)
        has_successors = bool(rows) and _mark_granted(connection, epoch, rows)
        granted += rows
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


def _is_behind(connection: Connection, epoch: int, kinds: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether one of other kinds whose worker died goes first: of two the older, or each would wait for the other."""
    other, own = (_suspect(connection, epoch, each) for each in (others, kinds))
    return other is not None and (own is None or other < own)


def _suspect(connection: Connection, epoch: int, kinds: tuple[str, ...]) -> int | None:
    """The number of the first ready future of these kinds whose worker died, if there is one."""
    first = connection.execute(READY, {"kinds": kinds, "of_epoch": epoch, "at_most": 1}).one_or_none()
    return None if first is None or not first.attempts else int(first.number)


def _mark_granted(connection: Connection, epoch: int, rows: list[AnyRow]) -> bool:
    """Whether there may be successors, whose turn it is now."""
    connection.execute(MARK, {"numbers": [row.number for row in rows], "to_epoch": epoch})
    return advance(connection, {row.lane for row in rows if row.lane is not None})


def _queue_again(
    connection: Connection, which: ColumnElement[bool], names: Iterable[str | None], **values: Any
) -> None:
    # Where there is an order, `advance` then takes `ready` from all but the first.
    again = {"state": "queued", "epoch": None, "ready": True} | values
    connection.execute(futures.update().where(which).values(again))
    advance(connection, {name for name in names if name is not None})
