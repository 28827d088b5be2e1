"""The keys that open something now, kept in memory and read again while they are asked for; knows no HTTP.

A key costs no query per request. What changes in the database, by another process too, is known within a second.
Both databases are asked in the same way, by age: SQLite's counter of changes would move with each commit of the ledger.
"""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import Engine

from smelt.control.keys import SCOPES, Caller
from smelt.storage import records
from smelt.storage.records import Key

MAX_AGE_S = 0.5
NUM_LOOKUP_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys as they were read."""

    # By the beginning of the digest, so that no comparison that could be timed decides.
    by_digest: dict[str, tuple[str, Caller]] = field(default_factory=dict)
    by_id: dict[str, Caller] = field(default_factory=dict)
    any_made: bool = False


class KeyRing:
    """Finds callers. Call `refresh` where `is_stale`, and then ask."""

    def __init__(self, database: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._keys = Keys()
        self._stale_at = -1.0
        self._refreshing = asyncio.Lock()

    @property
    def is_stale(self) -> bool:
        """Whether what we know is too old to answer by."""
        return self._clock() >= self._stale_at

    @property
    def any_made(self) -> bool:
        """Whether there is a key, if only a revoked one.

        A server on its own machine needs no key until the first is made, and from then on always: it may stand behind
        a proxy, where everybody seems local, and there revoking the last key must not open it to all.
        """
        return self._keys.any_made

    async def refresh(self) -> None:
        """Read the keys; whoever asks meanwhile waits for the same reading. StorageError: they cannot be read."""
        async with self._refreshing:
            if self.is_stale:
                began = self._clock()
                self._keys = await asyncio.to_thread(self._read)
                self._stale_at = began + MAX_AGE_S

    def caller_with(self, text: bytes) -> Caller | None:
        """Whose key that is; None for one that is unknown or revoked."""
        digest = hashlib.sha256(text).hexdigest()
        known, caller = self._keys.by_digest.get(digest[:NUM_LOOKUP_CHARACTERS], ("", None))
        return caller if hmac.compare_digest(known, digest) else None

    def caller_of(self, key_id: str) -> Caller | None:
        """Who has the key of that id; None where it is gone or revoked."""
        return self._keys.by_id.get(key_id)

    def _read(self) -> Keys:
        with self._database.connect() as connection:
            keys = records.all_keys(connection)
        callers = {key.id: _caller(key) for key in keys if key.revoked is None}
        by_digest = {
            key.digest[:NUM_LOOKUP_CHARACTERS]: (key.digest, callers[key.id]) for key in keys if key.id in callers
        }
        return Keys(by_digest, callers, any_made=bool(keys))


def _caller(key: Key) -> Caller:
    scopes = frozenset(SCOPES if "admin" in key.scopes else key.scopes)
    return Caller(key.owner, key.id, scopes, key.requests_per_minute, key.max_concurrent)
