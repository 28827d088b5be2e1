"""Whose turn it is: the order of futures within a lane, and which of them a worker may have next.

Pure SQL on the writer's connection. A lane's `next_seq` is the lowest seq that was neither granted, settled nor
given up. A future is `ready` when it is queued and it is its turn: at once where there is no order, otherwise when
it is the lowest queued one of its lane and nothing below it is missing.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, exists, false, func, or_, select, true

from smelt.errors import StaleEpoch
from smelt.storage.statements import Prepared, is_among, listed
from smelt.storage.tables import GRANTED, QUEUED, AnyRow, epochs, futures, lanes

# After so many workers died holding it, a future has failed.
MAX_ATTEMPTS = 3


_settled = futures.alias("settled")
_successor = futures.alias("successor")
_held = futures.alias("held")
_before = futures.alias("before")

_is_settled = and_(_settled.c.lane == lanes.c.lane, _settled.c.state != QUEUED)
_has_settled_successor = exists().where(
    _successor.c.lane == _settled.c.lane, _successor.c.seq == _settled.c.seq + 1, _successor.c.state != QUEUED
)
_of_names = and_(is_among(lanes.c.lane, "names"), lanes.c.next_seq.is_not(None))
# To the end of the run of settled futures that begins at `next_seq`.
SKIP = Prepared(
    lanes.update()
    .where(_of_names, exists().where(_is_settled, _settled.c.seq == lanes.c.next_seq))
    .values(
        next_seq=select(_settled.c.seq + 1)
        .where(_is_settled, _settled.c.seq >= lanes.c.next_seq, ~_has_settled_successor)
        .order_by(_settled.c.seq)
        .limit(1)
        .scalar_subquery()
    )
)
TURNS = Prepared(
    select(
        select(futures.c.number)
        .where(futures.c.lane == lanes.c.lane, futures.c.state == QUEUED, futures.c.seq <= lanes.c.next_seq)
        .order_by(futures.c.seq)
        .limit(1)
        .scalar_subquery()
    ).where(_of_names)
)
SET_READY = Prepared(
    futures.update().where(is_among(futures.c.number, "numbers"), ~futures.c.ready).values(ready=true())
)
# All of lanes that have an order.
HOLD_BACK = Prepared(
    futures.update()
    .where(
        futures.c.ready,
        futures.c.state == QUEUED,
        futures.c.lane.in_(select(lanes.c.lane).where(_of_names)),
    )
    .values(ready=false())
)

_is_suspect = and_(futures.c.ready, futures.c.attempts > 0)
HOLDER = Prepared(
    select(
        epochs.c.closed,
        select(func.max(futures.c.attempts))
        .where(futures.c.state == GRANTED, futures.c.epoch == bindparam("of_epoch"))
        .scalar_subquery()
        .label("max_attempts"),
        exists().where(_is_suspect).label("are_suspects"),
    ).where(epochs.c.epoch == bindparam("of_epoch"))
)
# From one kind to the next in their index: however many wait, it looks at one of each.
_kind = select(func.min(futures.c.kind).label("kind")).where(futures.c.ready).cte("kinds", recursive=True)
_next_kind = select(func.min(futures.c.kind)).where(futures.c.ready, futures.c.kind > _kind.c.kind).scalar_subquery()
_kinds = _kind.union_all(select(_next_kind).where(_kind.c.kind.is_not(None)))
READY_KINDS = Prepared(select(_kinds.c.kind).where(_kinds.c.kind.is_not(None)))
# The lane is not another connection's: it holds none of it, and has not done the last of it.
_is_free = or_(
    lanes.c.next_seq.is_(None),
    ~exists().where(_held.c.lane == futures.c.lane, _held.c.state == GRANTED, _held.c.epoch != bindparam("of_epoch"))
    & ~exists().where(
        _before.c.lane == futures.c.lane,
        _before.c.seq == futures.c.seq - 1,
        _before.c.epoch != bindparam("of_epoch"),
        _before.c.epoch == epochs.c.epoch,
        ~epochs.c.closed,
    ),
)
MARK = Prepared(
    futures.update()
    .where(is_among(futures.c.number, "numbers"))
    .values(state="granted", epoch=bindparam("to_epoch"), ready=False)
)


@dataclass(frozen=True, slots=True)
class Wish:
    """A worker's wish for up to `limit` futures of these kinds.

    `all_kinds` has those too that its connection wishes for beside this.
    """

    epoch: int
    limit: int
    kinds: tuple[str, ...]
    all_kinds: tuple[str, ...]


def advance(connection: Connection, names: Collection[str]) -> bool:
    """Bring `next_seq` up to date in lanes whose futures changed, and make ready whose turn it is; whether one is."""
    if not names:
        return False
    of_names = listed(names)
    SKIP(connection, names=of_names)
    turns = [turn for (turn,) in TURNS(connection, names=of_names) if turn is not None]
    if turns:
        SET_READY(connection, numbers=listed(turns))
    return bool(turns)


def grant_each(
    connection: Connection, wishes: Sequence[Wish | None], *, only_ready: bool
) -> list[list[AnyRow] | StaleEpoch]:
    """What each of these workers is granted. With `only_ready` none is looked at of whose kinds nothing is ready."""
    ready = {kind for (kind,) in READY_KINDS(connection)} if only_ready else set()
    return [
        _grant_or_refuse(connection, wish) if wish and not (only_ready and ready.isdisjoint(wish.kinds)) else []
        for wish in wishes
    ]


def _grant_or_refuse(connection: Connection, wish: Wish) -> list[AnyRow] | StaleEpoch:
    try:
        return grant(connection, wish)
    except StaleEpoch as stale:
        return stale


def grant(connection: Connection, wish: Wish) -> list[AnyRow]:
    """Give a worker what is ready: one future of each lane, then their successors.

    A lane belongs to one worker while it holds any of its futures, and stays with the one that did the last of them
    for as long as that is connected: it has in memory what they made. A future whose worker died is granted alone, so
    that it cannot take others with it again: before all others of `all_kinds`. StaleEpoch where the connection is over.
    """
    holder = HOLDER(connection, of_epoch=wish.epoch).one_or_none()
    if holder is None or holder.closed:
        raise StaleEpoch(f"epoch {wish.epoch} is over: the worker must connect again")
    if holder.max_attempts:
        return []
    if holder.are_suspects and (suspect := _suspect(connection, wish)) is not None:
        if holder.max_attempts is not None or suspect.kind not in wish.kinds:
            return []
        _mark_granted(connection, wish.epoch, [suspect])
        return [suspect]
    granted: list[AnyRow] = []
    has_successors = True
    while has_successors and len(granted) < wish.limit:
        at_most = wish.limit - len(granted)
        rows = _ready(wish.kinds, suspects=False)(connection, of_epoch=wish.epoch, at_most=at_most).all()
        has_successors = _mark_granted(connection, wish.epoch, rows)
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


@lru_cache(maxsize=256)
def _ready(kinds: tuple[str, ...], suspects: bool) -> Prepared:
    """Those of some kinds that a connection may have, the oldest first: suspects, or all others."""
    return Prepared(
        select(futures)
        .join(lanes, lanes.c.lane == futures.c.lane, isouter=True)
        .where(
            futures.c.ready,
            futures.c.attempts > 0 if suspects else futures.c.attempts == 0,
            or_(*[futures.c.kind == kind for kind in kinds]),
            _is_free,
        )
        .order_by(futures.c.number)
        .limit(bindparam("at_most"))
    )


def _suspect(connection: Connection, wish: Wish) -> AnyRow | None:
    """The oldest ready future of all the connection's kinds whose worker died; of two each would wait for the other."""
    kinds = tuple(dict.fromkeys((*wish.kinds, *wish.all_kinds)))
    return _ready(kinds, suspects=True)(connection, of_epoch=wish.epoch, at_most=1).one_or_none()


def _mark_granted(connection: Connection, epoch: int, rows: Sequence[AnyRow]) -> bool:
    """Whether there are successors, whose turn it is now."""
    if rows:
        MARK(connection, numbers=listed(row.number for row in rows), to_epoch=epoch)
    return advance(connection, {row.lane for row in rows if row.lane is not None})


def _queue_again(
    connection: Connection, which: ColumnElement[bool], names: Iterable[str | None], **values: Any
) -> None:
    again = {"state": "queued", "epoch": None, "ready": True} | values
    connection.execute(futures.update().where(which).values(again))
    ordered = {name for name in names if name is not None}
    HOLD_BACK(connection, names=listed(ordered))
    advance(connection, ordered)
