"""One request and its answer: its id and headers on the way in, what every answer carries on the way out.

Knows no rule of who may pass.
"""

import os
import time

from starlette.responses import Response
from starlette.types import Message, Scope, Send

from smelt.api.bodies import Body
from smelt.api.failures import response_to
from smelt.api.families import Family, family_of, shape_of
from smelt.api.limits import Allowance
from smelt.control.keys import Caller
from smelt.dashboard.pages import POLICY

Headers = list[tuple[bytes, bytes]]

NOSNIFF = (b"x-content-type-options", b"nosniff")
CLOSE = (b"connection", b"close")
# A page may bring a policy of its own; this is for those that do not.
CONTENT_POLICY = (b"content-security-policy", POLICY.encode())
PAGE_HEADERS: Headers = [
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
MAX_ID_BYTES = 128
ID_BYTES = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
# What nginx writes for a client that left before it had an answer.
CLIENT_LEFT = 499
NOBODY = Caller("", None, frozenset())


class Exchange:
    """A request that is being answered. Its `send` is what the application gets in place of the server's."""

    __slots__ = (
        "_added", "_body_failed", "_send", "allowance", "began", "body", "caller", "counted", "family", "headers",
        "method", "path", "request_id", "scope", "status",
    )  # fmt: skip

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._body_failed = False
        self.began = time.perf_counter()
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # the first of a name counts
        self.request_id = request_id(self.headers.get(b"x-request-id"))
        self.family: Family | None = family_of(self.path)
        self.caller = NOBODY
        self.body: Body | None = None
        self.allowance: Allowance | None = None
        self.counted = False  # among the requests in flight
        self.status = 0
        self._added: Headers = [(b"x-request-id", self.request_id.encode()), NOSNIFF]
        scope.setdefault("state", {})["request_id"] = self.request_id

    @property
    def is_browser(self) -> bool:
        """Whether somebody wants to look at a page."""
        return self.method == "GET" and b"text/html" in self.headers.get(b"accept", b"")

    def add(self, headers: Headers) -> None:
        """The answer will carry these too, whatever it is."""
        self._added += headers

    async def send(self, message: Message) -> None:
        """Pass the application's answer on; one that it gave because its body was refused gives way to the refusal."""
        if message["type"] == "http.response.start":
            if self.body is not None and self.body.failure is not None:
                self._body_failed = True
                await self.refuse(self.body.failure)
            else:
                message = self._with_headers(message)
        if not self._body_failed:
            await self._send(message)

    async def refuse(self, error: BaseException) -> None:
        """Answer with an error. The rest of a body that was refused half-way is not waited for."""
        response = response_to(error, shape_of(self.path), self.request_id)
        if self.body is not None and self.body.failure is not None:
            self._added.append(CLOSE)
        await self.answer(response)

    async def answer(self, response: Response) -> None:
        """Answer without the application."""
        start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        await self._send(self._with_headers(start))
        await self._send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else response.body})

    def _with_headers(self, message: Message) -> Message:
        self.status = message["status"]
        headers = [*message.get("headers", ()), *self._added]
        if self.family is not None and self.family.page:
            headers += PAGE_HEADERS
            if not any(name == CONTENT_POLICY[0] for name, _ in headers):
                headers.append(CONTENT_POLICY)
        return {**message, "headers": headers}


def request_id(offered: bytes | None) -> str:
    """The client's own id where it is one, else a new one: it goes into headers and logs."""
    if offered and len(offered) <= MAX_ID_BYTES and not offered.translate(None, ID_BYTES):
        return offered.decode()
    return os.urandom(16).hex()
