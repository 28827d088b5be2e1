"""The gate: one pure-ASGI layer in front of every route, pages included; knows no route's work.

What is not declared is refused, and everything is decided before a body is read. Pure ASGI, because Starlette's
BaseHTTPMiddleware hides from a handler that its client has left.
"""

import hmac
import time
from urllib.parse import quote

import structlog
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from smelt.api import telemetry
from smelt.api.bodies import MAX_HELD_UPLOAD_BYTES, Bodies, Body
from smelt.api.exchange import CLIENT_LEFT, Exchange
from smelt.api.families import SAFE_METHODS, Family
from smelt.api.hosts import PREFLIGHT_HEADERS, Hosts
from smelt.api.limits import Limits
from smelt.api.sessions import Sessions, cookie_in
from smelt.api.telemetry import RequestLine
from smelt.control.keyring import KeyRing
from smelt.control.keys import LOCAL, Caller
from smelt.errors import Forbidden, InvalidInput, NotFound, SmeltError, Unauthorized
from smelt.settings import Settings
from smelt.transport.addresses import is_loopback

MAX_HEADERS = 100
# HTTP itself says whether there is a body: one of these headers announces it.
LENGTH, CHUNKED = b"content-length", b"transfer-encoding"


class Gate:
    """Lets through what may pass, with `caller`, `request_id` and `csrf_token` in the request's state."""

    def __init__(self, app: ASGIApp, settings: Settings, ring: KeyRing, sessions: Sessions) -> None:
        self._app = app
        self._ring = ring
        self._sessions = sessions
        self._hosts = Hosts(settings)
        self._log: structlog.typing.FilteringBoundLogger = structlog.get_logger()
        self._is_exposed = not is_loopback(settings.host)
        self.limits = Limits()
        self.bodies = Bodies(settings.max_body_mb * 2**20)
        self.uploads = Bodies(
            settings.max_upload_mb * 2**20, max_held_bytes=MAX_HELD_UPLOAD_BYTES, setting="max_upload_mb"
        )
        telemetry.in_flight.set_function(lambda: self.limits.num_in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's start and end."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            telemetry.request_log.flush()
        elif scope["type"] == "http":
            await self._serve(Exchange(scope, send), receive)
        else:
            await send({"type": "websocket.close", "code": 1008})  # no route speaks it

    async def _serve(self, exchange: Exchange, receive: Receive) -> None:
        """See a request through to its end, whatever that is, and write it down."""
        try:
            await self._pass(exchange, receive)
        except SmeltError as error:
            await self._refuse(exchange, error)
        except Exception as error:  # noqa: BLE001 - the application's bug; the server must live, and the log has it
            await self._report(exchange, error)
        finally:
            _leave(self.limits, exchange)
            _write_down(exchange)

    async def _pass(self, exchange: Exchange, receive: Receive) -> None:
        """Everything that may refuse a request, the cheapest first, and then the application."""
        self._check_origin(exchange)
        if exchange.method == "OPTIONS" and b"access-control-request-method" in exchange.headers:
            exchange.add(PREFLIGHT_HEADERS)
            await exchange.answer(Response(status_code=204))
            return
        await self._identify(exchange)
        self._count(exchange)
        receive = self._with_body(exchange, receive)
        await self._app(exchange.scope, receive, exchange.send)

    def _check_origin(self, exchange: Exchange) -> None:
        host = exchange.headers.get(b"host")
        if len(exchange.scope["headers"]) > MAX_HEADERS:
            raise InvalidInput(f"a request may have {MAX_HEADERS} headers")
        self._hosts.check_host(host)
        exchange.add(self._hosts.cors_headers(exchange.headers.get(b"origin"), host or b""))

    async def _identify(self, exchange: Exchange) -> None:
        """Find out who asks, and whether the route is theirs. What no family declares is nobody's."""
        family = exchange.family
        if family is None or not family.public:
            if self._ring.is_stale:
                await self._ring.refresh()
            exchange.caller = self._caller(exchange)
            _check_scopes(exchange, family)
        exchange.scope["state"]["caller"] = exchange.caller

    @property
    def needs_key(self) -> bool:
        """Whether somebody without a key is nobody here."""
        return self._is_exposed or self._ring.any_made

    def _caller(self, exchange: Exchange) -> Caller:
        if not self.needs_key:
            return LOCAL
        text = presented_key(exchange.headers)
        caller = self._ring.caller_with(text) if text is not None else self._logged_in(exchange)
        if caller is not None:
            return caller
        if text is not None:
            raise Unauthorized("this API key is unknown, or it was revoked")
        raise Unauthorized(
            "this server needs an API key: send `Authorization: Bearer KEY`, and make one with `smelt keys create NAME`"
        )

    def _logged_in(self, exchange: Exchange) -> Caller | None:
        """Who has logged in with this browser. A page of another site can use the cookie, but cannot know the token."""
        cookie = cookie_in(exchange.headers.get(b"cookie"))
        session = self._sessions.read(cookie) if cookie else None
        caller = self._ring.caller_of(session.key_id) if session else None
        if session is None or caller is None:
            return None
        given = exchange.headers.get(b"x-csrf-token", b"")
        if exchange.method not in SAFE_METHODS and not hmac.compare_digest(given, session.csrf_token.encode()):
            raise Forbidden("a request from a page must carry the page's token in the header x-csrf-token")
        exchange.scope["state"]["csrf_token"] = session.csrf_token
        return caller

    def _count(self, exchange: Exchange) -> None:
        if exchange.family is None or not exchange.family.always:
            self.limits.enter()
            exchange.counted = True
        allowance = self.limits.allowance(exchange.caller)
        if allowance is not None:
            try:
                allowance.enter()
                exchange.allowance = allowance
            finally:
                exchange.add(allowance.headers())

    def _with_body(self, exchange: Exchange, receive: Receive) -> Receive:
        headers = exchange.headers
        length = headers.get(LENGTH)
        if length is None and CHUNKED not in headers:
            return receive
        encoding = headers.get(b"content-encoding", b"")
        bodies = self.uploads if exchange.family is not None and exchange.family.uploads else self.bodies
        exchange.body = Body(receive, bodies, length, encoding)
        if encoding:
            kept = [
                (name, value) for name, value in exchange.scope["headers"] if name not in (LENGTH, b"content-encoding")
            ]
            exchange.scope["headers"] = kept
        return exchange.body

    async def _refuse(self, exchange: Exchange, error: SmeltError) -> None:
        if exchange.status:
            await self._report(exchange, error)
        elif isinstance(error, Unauthorized) and exchange.is_browser and exchange.family and exchange.family.page:
            query = exchange.scope["query_string"].decode("latin-1")
            asked = exchange.path + (f"?{query}" if query else "")
            await exchange.answer(RedirectResponse(f"/login?next={quote(asked, safe='')}", 303))
        else:
            await exchange.refuse(error)

    async def _report(self, exchange: Exchange, error: Exception) -> None:
        """A bug: the log has it whole, the client its number. An answer that has begun breaks off."""
        place = {"method": exchange.method, "path": exchange.path, "request_id": exchange.request_id}
        self._log.error("failed", **place, exc_info=error)
        if not exchange.status:
            await exchange.refuse(error)


def presented_key(headers: dict[bytes, bytes]) -> bytes | None:
    """The API key of a request, in either of two headers. InvalidInput where both are there and differ."""
    key = headers.get(b"x-api-key")
    authorization = headers.get(b"authorization", b"")
    if authorization[:7].lower() != b"bearer ":
        return key
    bearer = authorization[7:].strip()
    if key is not None and key != bearer:
        raise InvalidInput("the request carries two different API keys, in Authorization and in x-api-key; send one")
    return bearer


def _check_scopes(exchange: Exchange, family: Family | None) -> None:
    if family is None:
        raise NotFound(f"nothing is at {exchange.path!r}; /docs lists what is there")
    scopes = family.scopes_for(exchange.method)
    if scopes.isdisjoint(exchange.caller.scopes):
        needed = " or ".join(sorted(scopes))
        raise Forbidden(f"this API key's scopes do not open {exchange.path}; it would need: {needed}")


def _leave(limits: Limits, exchange: Exchange) -> None:
    """Give back what the request held."""
    if exchange.counted:
        limits.leave()
    if exchange.allowance is not None:
        exchange.allowance.leave()
    if exchange.body is not None:
        exchange.body.release()


def _write_down(exchange: Exchange) -> None:
    seconds = time.perf_counter() - exchange.began
    status = exchange.status or CLIENT_LEFT
    telemetry.count_request(exchange.method, telemetry.route_of(exchange.scope), status, seconds)
    if exchange.family is not None and exchange.family.public and status < 400:
        return  # a health check each second is no news
    milliseconds, key = round(seconds * 1000, 2), exchange.caller.key_id
    line = RequestLine(exchange.method, exchange.path, status, milliseconds, key, exchange.request_id)
    telemetry.request_log.write(line)
