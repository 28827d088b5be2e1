"""The routes that are asked most, found by their path in one look; knows no route's work.

FastAPI asks each router in turn, twice, and wraps a handler into ten layers. A handler that reads its request itself
needs none of them: the gate tells of its errors as it does of its own.
"""

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from smelt.api.openai_desk import DirectRoute


class Shortcuts:
    """The application, past which requests go whose handlers read them themselves, where the path is no pattern."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        routes = [context.original_route for context in iter_route_contexts(app.routes)]
        self._routes = {
            (method, route.path): route
            for route in routes
            if isinstance(route, DirectRoute) and not route.param_convertors
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's start and end."""
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        response = await route.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
