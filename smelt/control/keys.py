"""API keys: who a caller is, and keys made, revoked and asked for before a server shows itself; knows no HTTP.

The text of a key is 256 random bits behind a prefix, and is shown once; the database has its sha256. Nothing slower
than a hash is needed where nobody could guess the text in the first place.
"""

import hashlib
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import replace as changed

from sqlalchemy import Connection

from smelt.errors import ConfigError, InvalidInput, NotFound
from smelt.settings import Settings
from smelt.storage import records
from smelt.storage.database import open_database
from smelt.storage.records import Key
from smelt.transport.addresses import is_loopback
from smelt.types import LOCAL_OWNER

PREFIX = "tml-"  # what Tinker's client insists on; the others take any text
# What a key may open. "admin" opens everything.
SCOPES = ("inference", "training", "admin")
DEFAULT_SCOPES = ("inference", "training")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request. A limit of None is none."""

    owner: str
    key_id: str | None  # None: nobody had to show a key
    scopes: frozenset[str]
    requests_per_minute: int | None = None
    max_concurrent: int | None = None


# Whoever asks from this machine, while no key was ever made.
LOCAL = Caller(LOCAL_OWNER, None, frozenset(SCOPES))


def digest_of(text: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def create_key(
    connection: Connection,
    name: str,
    owner: str = LOCAL_OWNER,
    scopes: Iterable[str] = DEFAULT_SCOPES,
    requests_per_minute: int | None = None,
    max_concurrent: int | None = None,
) -> str:
    """Make a key and give its text, which is nowhere else. AlreadyExists where the owner has one of that name."""
    text = PREFIX + secrets.token_urlsafe(32)
    key = Key(
        owner=_checked("owner", owner),
        name=_checked("name", name),
        digest=digest_of(text),
        scopes=_checked_scopes(scopes),
        requests_per_minute=requests_per_minute,
        max_concurrent=max_concurrent,
    )
    records.add(connection, key)
    return text


def revoke_key(connection: Connection, name: str, owner: str = LOCAL_OWNER) -> None:
    """From now on the key opens nothing; its row stays, so that it is known to have been. NotFound where it is not."""
    key = _named(connection, name, owner)
    if key.revoked is None:
        records.replace(connection, changed(key, revoked=time.time()))


def key_of(connection: Connection, owner: str, key_id: str) -> Key:
    """The owner's key of that id. NotFound."""
    return records.get(connection, Key, owner, key_id)


def remove_key(connection: Connection, name: str, owner: str = LOCAL_OWNER) -> None:
    """Forget a revoked key, which frees its name. InvalidInput while it still opens something."""
    key = _named(connection, name, owner)
    if key.revoked is None:
        raise InvalidInput(f"the key {name!r} is in use; revoke it first: smelt keys revoke {name}")
    records.delete(connection, Key, owner, key.id)


def check_exposed(settings: Settings) -> None:
    """ConfigError where other machines would reach a server that no key protects."""
    if is_loopback(settings.host):
        return
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = open_database(settings.database_url)
    with engine.connect() as connection:
        live = [key for key in records.all_keys(connection) if key.revoked is None]
    engine.dispose()
    if not live:
        raise ConfigError(
            f"{settings.host} can be reached from other machines, and there is no API key: make one with "
            "`smelt keys create NAME`, or serve on 127.0.0.1"
        )


def _named(connection: Connection, name: str, owner: str) -> Key:
    found = records.find(connection, Key, owner, name=name)
    if not found:
        known = ", ".join(key.name for key in records.find(connection, Key, owner)) or "none"
        raise NotFound(f"{owner!r} has no key {name!r}; there are: {known}")
    return found[0]


def _checked(what: str, value: str) -> str:
    if not value.strip() or not value.isprintable() or len(value) > 100:
        raise InvalidInput(f"{value!r} cannot be the {what} of a key: write 1 to 100 printable characters")
    return value


def _checked_scopes(scopes: Iterable[str]) -> list[str]:
    asked = set(scopes)
    if unknown := asked - set(SCOPES):
        raise InvalidInput(f"unknown scope {min(unknown)!r}; a key may have: {', '.join(SCOPES)}")
    if not asked:
        raise InvalidInput(f"a key needs a scope: {', '.join(SCOPES)}")
    return [scope for scope in SCOPES if scope in asked]
