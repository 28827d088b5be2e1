"""The running server of this home folder, asked over its REST by a command of the same account; prints nothing."""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

from smelt.errors import SmeltError, Unavailable

if TYPE_CHECKING:
    from smelt.settings import Settings

LOAD_SECONDS = 600.0  # a large model takes its time
KEY_SECONDS = 2.0  # until a server knows a new key


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Where it is, and a key where it asks for one."""

    url: str
    key: str | None

    def ask(self, path: str, method: str = "GET") -> Any:
        """The answer as JSON. Unavailable where nobody answers, SmeltError with what the server says is wrong."""
        until = time.monotonic() + KEY_SECONDS
        while True:
            try:
                return self._ask(path, method)
            except HTTPError as error:
                if error.code != 401 or time.monotonic() > until:
                    raise SmeltError(_said(error)) from None
            except URLError as error:
                raise Unavailable(f"the server at {self.url} does not answer: {error.reason}") from None
            time.sleep(0.1)  # it looks for new keys every half a second

    def _ask(self, path: str, method: str) -> Any:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = Request(self.url + quote(path), headers=headers, method=method)
        direct = build_opener(ProxyHandler({}))  # a proxy would not find this machine's own address
        with direct.open(request, timeout=LOAD_SECONDS) as answer:
            return json.load(answer)


@contextmanager
def running_server(settings: "Settings") -> Iterator[RunningServer | None]:
    """The server, with a key of an administrator's that lives as long as the block; None where no server runs."""
    from smelt.cluster.claims import server_url

    url = server_url(settings.home)
    if url is None:
        yield None
        return
    with _passing_key() as key:
        yield RunningServer(url, key)


@contextmanager
def _passing_key() -> Iterator[str | None]:
    """Whoever owns the home folder may make keys anyway. None where nobody needs one, so that none is made."""
    from smelt.cli.keys import database
    from smelt.control.keys import create_key, remove_key, revoke_key
    from smelt.storage.records import all_keys

    name = f"command-{secrets.token_hex(4)}"
    with database() as connection:
        text = create_key(connection, name, scopes=["admin"]) if all_keys(connection) else None
    try:
        yield text
    finally:
        if text is not None:
            with database() as connection:
                revoke_key(connection, name)
                remove_key(connection, name)


def _said(error: HTTPError) -> str:
    """The server's words, without the wrapping."""
    text = error.read().decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        return f"the server answered with {error.code}"
    wrapped = body.get("error", body.get("detail", text))
    return str(wrapped.get("message", wrapped)) if isinstance(wrapped, dict) else str(wrapped)
