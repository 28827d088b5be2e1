"""The gate: one pure-ASGI layer in front of every route, pages included; knows no route's work.

Pure, because Starlette's BaseHTTPMiddleware hides from a handler that its client has left.
"""

import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smelt.api.services import Services
from smelt.control.keys import LOCAL


class Gate:
    """Lets through what may pass, with `caller` and `request_id` in the request's state."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's start and end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope["state"] = {**scope.get("state", {}), "caller": LOCAL, "request_id": request_id}

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_named)
