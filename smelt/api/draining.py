"""Draining: how an ASGI application lets its answers finish before it goes; knows no route and no signal.

Whoever posts waits for an answer, and gets it. A GET that is still open follows something (a run's events, a long
poll), and so does one kind of POST; it is told that its client has left, and the client asks the next server.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

FOLLOWING = ("GET", "HEAD")
LONG_POLL = "/api/v1/retrieve_future"


class Draining:
    """The application, with a way to end those of its requests that would never end by themselves."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._has_begun = asyncio.Event()

    def begin(self) -> None:
        """The server is going: let nobody follow anything any longer."""
        self._has_begun.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and (scope["method"] in FOLLOWING or scope["path"] == LONG_POLL):
            receive = self._until_it_begins(receive)
        await self._app(scope, receive, send)

    def _until_it_begins(self, receive: Receive) -> Receive:
        async def receive_or_leave() -> Message:
            message = asyncio.ensure_future(receive())
            begun = asyncio.ensure_future(self._has_begun.wait())
            try:
                await asyncio.wait([message, begun], return_when=asyncio.FIRST_COMPLETED)
                return message.result() if message.done() else {"type": "http.disconnect"}
            finally:
                message.cancel()
                begun.cancel()

        return receive_or_leave
