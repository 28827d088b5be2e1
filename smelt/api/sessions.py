"""Logins of browsers: a cookie that was signed here and stands for a key, until either ends; knows no page.

The secret lies in a file of the home folder and not in the database, so that a copy of the database logs nobody in.
A cookie dies with its key, after half a day, and when its owner logs out.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smelt.disk import write_once

COOKIE = "smelt_session"
LIFETIME_S = 12 * 3600
SECRET_FILE = "session.secret"
NUM_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Session:
    """One login. `csrf_token` has to come with whatever a page of ours asks to change."""

    key_id: str
    expires: int  # seconds since 1970
    nonce: str
    csrf_token: str


class Sessions:
    """Makes and reads cookies. Who has logged out is remembered until the cookie would have ended anyway."""

    def __init__(self, home: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = home / SECRET_FILE
        self._clock = clock
        self._secret: bytes | None = None
        self._ended: dict[str, int] = {}

    def begin(self, key_id: str) -> str:
        """The value of a new cookie."""
        words = f"{key_id}.{int(self._clock()) + LIFETIME_S}.{secrets.token_hex(16)}"
        return f"{words}.{self._signature('session', words)}"

    def read(self, cookie: str) -> Session | None:
        """The session of a cookie; None for one that was not made here, or is over."""
        words, _, signature = cookie.rpartition(".")
        if words.count(".") != 2 or not _same(signature, self._signature("session", words)):
            return None
        key_id, expires, nonce = words.split(".")
        if int(expires) <= self._clock() or nonce in self._ended:
            return None
        return Session(key_id, int(expires), nonce, self._signature("csrf", words))

    def end(self, session: Session) -> None:
        """Log out: nobody comes in with this cookie any more, a copy of it included."""
        now = self._clock()
        self._ended = {nonce: expires for nonce, expires in self._ended.items() if expires > now}
        self._ended[session.nonce] = session.expires

    def _signature(self, purpose: str, words: str) -> str:
        self._secret = self._secret or read_secret(self._file)
        return hmac.new(self._secret, f"{purpose}:{words}".encode(), hashlib.sha256).hexdigest()


def _same(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode(), right.encode())


def read_secret(file: Path) -> bytes:
    """The secret of this home folder, which is made where there is none. Two that make it at once get the same."""
    write_once(file, secrets.token_bytes(NUM_SECRET_BYTES))
    return file.read_bytes()


def cookie_in(header: bytes | None) -> str | None:
    """Our cookie among those that a browser sent."""
    if header is None or COOKIE.encode() not in header:
        return None
    for part in header.decode("latin-1").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return None


def set_cookie(value: str, *, secure: bool, lifetime_s: int = LIFETIME_S) -> str:
    """The header that gives a browser its cookie. Scripts cannot read it, and other sites' pages cannot send it."""
    return f"{COOKIE}={value}; Path=/; Max-Age={lifetime_s}; HttpOnly; SameSite=Strict" + ("; Secure" if secure else "")
