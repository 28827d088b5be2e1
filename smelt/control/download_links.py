"""Tokens that let whoever has them fetch one file, for a while; knows no HTTP and no file.

They are signed with a secret of the home folder, so that nothing has to be remembered of them.
"""

import hashlib
import hmac
import time
from pathlib import Path

from smelt.errors import NotFound
from smelt.transport.keys import make_key

SECRET_FILE = "downloads.key"
VALID_S = 3600.0


class DownloadLinks:
    """Makes and reads tokens. The secret is made with the first one."""

    def __init__(self, home: Path) -> None:
        self._file = home / SECRET_FILE

    def make(self, thing: str, name: str, now: float | None = None) -> tuple[str, float]:
        """A token for a file of something, and when it expires."""
        expires = int((time.time() if now is None else now) + VALID_S)
        return f"{expires}-{self._sign(expires, thing, name)}", float(expires)

    def check(self, token: str, thing: str, name: str) -> None:
        """NotFound where the token is not for that file, or its time is over."""
        text, _, signature = token.partition("-")
        expires = int(text) if text.isdecimal() and len(text) < 16 else 0
        is_ours = hmac.compare_digest(signature.encode(), self._sign(expires, thing, name).encode())
        if not is_ours or expires <= time.time():
            raise NotFound("this address is not valid, or not any more; ask for another one")

    def _sign(self, expires: int, thing: str, name: str) -> str:
        message = "\0".join([str(expires), thing, name]).encode()
        return hmac.new(make_key(self._file), message, hashlib.sha256).hexdigest()
