"""How futures change and are found: pure SQL, each function one step of a request's life."""

import hashlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, and_, bindparam, func, or_, select

from smelt.errors import NotFound, SeqAbandoned, SeqReused, StaleEpoch
from smelt.storage import lanes as turns
from smelt.storage.faults import Fault
from smelt.storage.statements import Prepared
from smelt.storage.tables import GRANTED, QUEUED, AnyRow, epochs, futures, lanes

State = Literal["queued", "granted", "done", "failed", "cancelled"]
FINISHED = ("done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Submission:
    """A request to be accepted.

    `lane` and `seq` are its place: the same place again, with the same `fingerprint`, is the same request. A lane
    begins with its first submission, at `first_seq`; None there means that its futures have no order. Without a
    seq it is a new request behind all others of its lane; without a lane every submission is a new request.

    `failure` is the result of one that is wrong, and still takes its place: it fails at once, and nobody works on it.
    """

    owner: str
    kind: str
    fingerprint: str
    request: bytes
    lane: str | None = None
    seq: int | None = None
    first_seq: int | None = 1
    failure: bytes | None = None


@dataclass(frozen=True, slots=True)
class Body:
    """Where a body lies: in the row, or in a file of that sha256."""

    inline: bytes | None
    file: str | None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The future in a submission's place; one that came before, or failed at once, is not `open`."""

    id: str
    seq: int | None
    is_open: bool


# Writes what belongs to a new future of that id, in its transaction; what it returns, if anything, fails the future.
Alongside = Callable[[Connection, str], bytes | None]


_queued_before = (
    select(func.min(futures.c.seq))
    .where(futures.c.lane == bindparam("at_lane"), futures.c.state == QUEUED, futures.c.seq < bindparam("at_seq"))
    .scalar_subquery()
)
FIND_PLACE = Prepared(
    select(
        lanes.c.owner, lanes.c.next_seq, futures.c.kind, futures.c.fingerprint, _queued_before.label("lowest_queued")
    )
    .join(futures, and_(futures.c.lane == lanes.c.lane, futures.c.seq == bindparam("at_seq")), isouter=True)
    .where(lanes.c.lane == bindparam("at_lane"))
)
# What `accept` knows of a new row; the rest is NULL.
COLUMNS = (
    "id", "owner", "lane", "seq", "fingerprint", "kind", "state", "ready", "attempts", "request", "request_file",
    "expired", "created", "updated",
)  # fmt: skip
INSERT = Prepared(futures.insert(), COLUMNS)
FINISH = Prepared(
    futures.update()
    .where(futures.c.id == bindparam("of_id"), futures.c.epoch == bindparam("of_epoch"), futures.c.state == GRANTED)
    .values({name: bindparam(name) for name in ("state", "result", "result_file", "category", "updated")})
)
# Of those that are wrong already.
FAILED_COLUMNS = (*COLUMNS, "category", "result")
INSERT_FAILED = Prepared(futures.insert(), FAILED_COLUMNS)
FIND = select(futures).where(futures.c.owner == bindparam("of_owner"), futures.c.id == bindparam("of_id"))


def future_id(lane: str, seq: int) -> str:
    """The id of the future in that place."""
    return hashlib.sha256(f"{seq}:{lane}".encode()).hexdigest()[:32]


def accept(
    submission: Submission, body: Body, now: float, fault: Fault, alongside: Alongside | None, connection: Connection
) -> Accepted:
    """The future in the submission's place, which is new unless it came before."""
    fault("before_insert")
    lane, seq = submission.lane, submission.seq
    ready = True
    if lane is None:
        accepted = uuid.uuid4().hex
    else:
        if seq is None:
            seq = _free_seq(connection, submission, lane)
        accepted = future_id(lane, seq)
        place = _place(connection, submission, lane, seq)
        if place.fingerprint is not None:
            _check_same(submission, seq, place)
            return Accepted(accepted, seq, is_open=False)
        if place.next_seq is not None and seq < place.next_seq:
            raise SeqAbandoned(f"seq {seq} of {lane} came too late: the lane has gone on to {place.next_seq}")
        # Released ones may be queued below `next_seq`; they come first.
        ready = place.next_seq is None or (seq == place.next_seq and place.lowest_queued is None)
    failure = submission.failure
    if failure is None and alongside is not None:
        failure = alongside(connection, accepted)
    row = {
        "id": accepted, "owner": submission.owner, "lane": lane, "seq": seq, "fingerprint": submission.fingerprint,
        "kind": submission.kind, "state": "queued", "ready": ready, "attempts": 0, "request": body.inline,
        "request_file": body.file, "expired": False, "created": now, "updated": now,
    }  # fmt: skip
    if failure is None:
        INSERT(connection, **row)
    else:
        INSERT_FAILED(connection, **row | {"state": "failed", "ready": False, "category": "user", "result": failure})
        turns.advance(connection, [] if lane is None else [lane])
    fault("after_insert_before_commit")
    return Accepted(accepted, seq, is_open=failure is None)


def _place(connection: Connection, submission: Submission, lane: str, seq: int) -> AnyRow:
    """The lane, which begins here if it is new, and what stands in that place of it."""
    where = {"at_lane": lane, "at_seq": seq}
    place = FIND_PLACE(connection, **where).one_or_none()
    if place is None:
        new = {"lane": lane, "owner": submission.owner, "next_seq": submission.first_seq}
        connection.execute(lanes.insert().values(new))
        place = FIND_PLACE(connection, **where).one()
    if place.owner != submission.owner:
        raise NotFound(f"{lane!r} does not exist")
    return place


def _free_seq(connection: Connection, submission: Submission, lane: str) -> int:
    """The seq behind all that was taken or given up."""
    place = _place(connection, submission, lane, 0)
    highest = connection.execute(select(func.max(futures.c.seq)).where(futures.c.lane == lane)).scalar_one()
    return max(-1 if highest is None else int(highest) + 1, place.next_seq or 0)


def _check_same(submission: Submission, seq: int, place: AnyRow) -> None:
    if (submission.kind, submission.fingerprint) != (place.kind, place.fingerprint):
        raise SeqReused(
            f"seq {seq} of {submission.lane} was another request ({place.kind}); "
            f"send this {submission.kind} under the next seq"
        )


def open_epoch(connection: Connection) -> int:
    """A number that no connection had before."""
    return int(connection.execute(epochs.insert().values(closed=False).returning(epochs.c.epoch)).scalar_one())


def finish(
    future_id: str, epoch: int, body: Body, category: str | None, now: float, fault: Fault, connection: Connection
) -> None:
    """Keep the result of a future that this epoch holds. StaleEpoch where it does not."""
    values = {"result": body.inline, "result_file": body.file, "category": category, "updated": now}
    values |= {"state": "failed" if category else "done", "of_id": future_id, "of_epoch": epoch}
    if FINISH(connection, **values).rowcount != 1:
        raise StaleEpoch(f"{future_id} is not in the hands of epoch {epoch}: its result is not kept")
    fault("before_result_commit")


def cancel(owner: str, future_id: str, now: float, connection: Connection) -> bool:
    """Whether the future was unfinished, and is cancelled now."""
    found = row(owner, future_id, connection)
    if found.state in FINISHED:
        return False
    cancelled = {"state": "cancelled", "ready": False, "updated": now}
    connection.execute(futures.update().where(futures.c.number == found.number).values(cancelled))
    if found.lane is not None:
        turns.advance(connection, [found.lane])
    return True


def expire(before: float, kept_kinds: Sequence[str], connection: Connection) -> int:
    """Drop results, and requests that nobody replays, of futures finished before; returns how many."""
    old = and_(
        futures.c.state.in_(FINISHED),
        ~futures.c.expired,
        futures.c.updated < before,
        futures.c.kind.not_in(kept_kinds),
    )
    # The requests of an ordered lane are the log that its session is rebuilt from.
    replayed = select(lanes.c.lane).where(lanes.c.next_seq.is_not(None))
    forgotten = or_(futures.c.lane.is_(None), futures.c.lane.not_in(replayed))
    connection.execute(futures.update().where(old, forgotten).values(request=None, request_file=None))
    nothing = {"result": None, "result_file": None, "expired": True}
    return connection.execute(futures.update().where(old).values(nothing)).rowcount


def logged(lane: str, after: int, before: int, limit: int, connection: Connection) -> Sequence[AnyRow]:
    """The first futures of a lane behind the seq `after` and before `before`, in order."""
    within = and_(futures.c.lane == lane, futures.c.seq > after, futures.c.seq < before)
    return connection.execute(select(futures).where(within).order_by(futures.c.seq).limit(limit)).all()


def forget(lane: str, before: int, connection: Connection) -> int:
    """Drop the requests of finished futures of a lane below a seq; returns how many."""
    old = and_(futures.c.lane == lane, futures.c.seq < before, futures.c.state.in_(FINISHED))
    has_request = or_(futures.c.request.is_not(None), futures.c.request_file.is_not(None))
    forgotten = futures.update().where(old, has_request).values(request=None, request_file=None)
    return connection.execute(forgotten).rowcount


def drop(owner: str, future_id: str, connection: Connection) -> None:
    """Forget what a finished future was asked and what came of it, before its time. NotFound."""
    number = row(owner, future_id, connection).number
    nothing = {"request": None, "request_file": None, "result": None, "result_file": None, "expired": True}
    this = and_(futures.c.number == number, futures.c.state.in_(FINISHED))
    connection.execute(futures.update().where(this).values(nothing))


def referenced_files(connection: Connection) -> set[str]:
    """The names of all files that futures have bodies in."""
    return {
        name
        for column in (futures.c.request_file, futures.c.result_file)
        for name in connection.execute(select(column).where(column.is_not(None))).scalars()
    }


def recent(owner: str | None, kind: str, limit: int, connection: Connection) -> Sequence[AnyRow]:
    """The owner's futures of a kind, or everybody's, newest first."""
    of_kind = select(futures).where(futures.c.kind == kind)
    if owner is not None:
        of_kind = of_kind.where(futures.c.owner == owner)
    return connection.execute(of_kind.order_by(futures.c.number.desc()).limit(limit)).all()


def row(owner: str, future_id: str, connection: Connection) -> AnyRow:
    """The owner's future. NotFound where there is none."""
    found = connection.execute(FIND, {"of_owner": owner, "of_id": future_id}).one_or_none()
    if found is None:
        raise NotFound(f"request {future_id!r} does not exist")
    return found
