"""Bans: who may ask for nothing any more, by the operator's word or after too many broken rules; knows no rule.

A broken rule is a strike against a key and, where the key names one, its user. A `user` is only what a key says it is:
so it counts below that key alone, and nobody can have somebody else's users banned. A key that names many collects the
strikes of all.
"""

from collections import Counter
from dataclasses import dataclass
from dataclasses import replace as changed

from sqlalchemy import Connection

from smelt.errors import AlreadyExists, InvalidInput, NotFound
from smelt.storage import records
from smelt.storage.records import Ban, Key, Strike
from smelt.types import LOCAL_OWNER

NO_KEY = "local"  # stands for the key where nobody needs one
BY_HAND = "by the administrator"
MAX_CHARS = 512  # of a user's name and of a reason


@dataclass(frozen=True, slots=True)
class Limits:
    """How many strikes are too many."""

    strikes: int = 10  # of a user, or of a key where it names none
    key_strikes: int = 100  # of a key with all its users


@dataclass(frozen=True, slots=True)
class Subject:
    """Who asks: a key's id, and the user that the key names; "" for none."""

    owner: str = LOCAL_OWNER
    key_id: str = NO_KEY
    user: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """How somebody stands. `reason` is None for who is not banned; `user` None means the key itself."""

    id: str | None  # of the ban
    key: str
    owner: str
    user: str | None
    num_strikes: int
    since: float | None  # seconds since 1970
    reason: str | None


def add_strike(connection: Connection, subject: Subject, rule: str, limits: Limits) -> None:
    """Count a broken rule, and ban whom it was one too many."""
    owner, key_id = subject.owner, subject.key_id
    records.add(connection, Strike(owner=owner, key_id=key_id, user=subject.user, rule=rule))
    strikes = records.find(connection, Strike, owner, key_id=key_id)
    num_own = sum(strike.user == subject.user for strike in strikes)
    if num_own >= limits.strikes:
        _ban(connection, subject, f"{num_own} broken rules, the last one {rule!r}")
    if len(strikes) >= limits.key_strikes:
        reason = f"{len(strikes)} broken rules of its users, the last one {rule!r}"
        _ban(connection, changed(subject, user=""), reason)


def ban_by_hand(
    connection: Connection, key: str, owner: str = LOCAL_OWNER, user: str = "", reason: str = BY_HAND
) -> None:
    """Ban a key, or one of its users. NotFound where the owner has no such key; AlreadyExists for who is banned."""
    for what, value in (("user", user), ("reason", reason)):
        if len(value) > MAX_CHARS or not (value.isprintable() or not value):
            raise InvalidInput(f"a {what} has at most {MAX_CHARS} printable characters", what)
    subject = Subject(owner, _key_id(connection, key, owner), user)
    if not _ban(connection, subject, reason.strip() or BY_HAND):
        raise AlreadyExists(f"{_words(key, user)} is banned already; to see why: smelt bans ls")


def forgive(connection: Connection, key: str, owner: str = LOCAL_OWNER, user: str = "") -> None:
    """Lift a ban and forget the strikes behind it: a key's with all its users', or a user's. NotFound for neither.

    Users that are banned themselves stay so when their key is forgiven.
    """
    key_id = _key_id(connection, key, owner)
    named = {"user": user} if user else {}
    strikes = records.find(connection, Strike, owner, key_id=key_id, **named)
    bans = records.find(connection, Ban, owner, key_id=key_id, user=user)
    if not strikes and not bans:
        raise NotFound(f"{_words(key, user)} has no strikes and is not banned; who is: smelt bans ls")
    for record in (*strikes, *bans):
        records.delete(connection, type(record), owner, record.id)


def lift(connection: Connection, ban_id: str) -> None:
    """`forgive` whom a ban of that id is about. NotFound where there is none."""
    found = records.of_all_owners(connection, Ban, id=ban_id)
    if not found:
        raise NotFound(f"ban {ban_id[:80]!r} does not exist")
    forgive(connection, found[0].key_id, found[0].owner, found[0].user)


def standings(connection: Connection) -> list[Standing]:
    """Everybody with a ban or a strike: those who are banned first."""
    names = {key.id: key.name for key in records.all_keys(connection)}
    bans = {(ban.owner, ban.key_id, ban.user): ban for ban in records.of_all_owners(connection, Ban)}
    strikes = Counter((s.owner, s.key_id, s.user) for s in records.of_all_owners(connection, Strike))
    found = []
    for owner, key_id, user in sorted(bans.keys() | strikes, key=lambda who: (who not in bans, who)):
        ban = bans.get((owner, key_id, user))
        told = (ban.id, ban.created, ban.reason) if ban else (None, None, None)
        key = names.get(key_id, key_id)
        found.append(Standing(told[0], key, owner, user or None, strikes[owner, key_id, user], told[1], told[2]))
    return found


def _ban(connection: Connection, subject: Subject, reason: str) -> bool:
    """Whether that is news."""
    if records.find(connection, Ban, subject.owner, key_id=subject.key_id, user=subject.user):
        return False
    records.add(connection, Ban(owner=subject.owner, key_id=subject.key_id, user=subject.user, reason=reason))
    return True


def _key_id(connection: Connection, key: str, owner: str) -> str:
    """The id of a key by its name, or by itself for one that is gone but left strikes."""
    if found := records.find(connection, Key, owner, name=key):
        return found[0].id
    if key == NO_KEY and owner == LOCAL_OWNER:
        return NO_KEY
    if any(records.find(connection, kind, owner, **{column: key}) for kind, column in _IDS):
        return key
    known = ", ".join(found.name for found in records.find(connection, Key, owner)) or "none"
    raise NotFound(f"{owner!r} has no key {key!r}; there are: {known}")


_IDS: tuple[tuple[type[records.Record], str], ...] = ((Key, "id"), (Strike, "key_id"), (Ban, "key_id"))


def _words(key: str, user: str) -> str:
    return f"the user {user!r} of the key {key!r}" if user else f"the key {key!r}"
