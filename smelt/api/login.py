"""/login and /logout: an API key typed once becomes a cookie; works without JavaScript. Knows no other page."""

from urllib.parse import parse_qs, quote

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.responses import Response

from smelt.api.limits import Window
from smelt.api.sessions import Sessions, cookie_in, set_cookie
from smelt.control.keyring import KeyRing
from smelt.dashboard.rendering import render
from smelt.errors import Forbidden, InvalidInput, RateLimited, TooLarge

HOME = "/dashboard"
MAX_FORM_BYTES = 8192
# Nobody guesses 256 bits; whoever tries is slowed down all the same, each by its address.
MAX_FAILURES = 10
MAX_ADDRESSES = 10_000


class Attempts:
    """Failed logins of the last minute by address."""

    def __init__(self) -> None:
        self._failures: dict[str, Window] = {}

    def check(self, address: str) -> None:
        """RateLimited where there were too many."""
        window = self._failures.get(address)
        if window is not None and window.num_left == 0:
            wait_s = int(window.seconds_to_next) + 1
            raise RateLimited(f"too many failed logins from {address}; try again in {wait_s} s", wait_s)

    def fail(self, address: str) -> None:
        """One more."""
        if len(self._failures) >= MAX_ADDRESSES:
            self._failures = {known: window for known, window in self._failures.items() if window.seconds_to_all}
        self._failures.setdefault(address, Window(MAX_FAILURES)).take()


def router(ring: KeyRing, sessions: Sessions) -> APIRouter:
    """The two pages. The gate lets everybody through to them, and checks where their requests come from."""
    routes = APIRouter(include_in_schema=False)
    attempts = Attempts()

    @routes.get("/login")
    async def show_login(next: str = HOME) -> Response:  # noqa: A002 - the parameter's name in the address
        """The form; where nobody needs a key, what comes after it."""
        await ring.refresh()
        return _form(local_path(next)) if ring.any_made else RedirectResponse(local_path(next), 303)

    @routes.post("/login")
    async def login(request: Request) -> Response:
        """Check the key, and give the browser its cookie."""
        address = request.client.host if request.client else ""
        attempts.check(address)
        form = await _read_form(request)
        target = local_path(form.get("next", HOME))
        await ring.refresh()
        caller = ring.caller_with(form.get("key", "").strip().encode())
        if caller is None or caller.key_id is None:
            attempts.fail(address)
            return _form(target, "This key is unknown, or it was revoked.", 401)
        response = RedirectResponse(target, 303)
        cookie = set_cookie(sessions.begin(caller.key_id), secure=request.url.scheme == "https")
        response.headers.append("set-cookie", cookie)
        return response

    @routes.post("/logout")
    async def logout(request: Request) -> Response:
        """End the session here and in the browser."""
        cookie = cookie_in(request.headers.get("cookie", "").encode("latin-1"))
        session = sessions.read(cookie) if cookie else None
        if session is not None:
            if (await _read_form(request)).get("csrf_token") != session.csrf_token:
                raise Forbidden("log out with the button of a page of this server")
            sessions.end(session)
        response = RedirectResponse("/login", 303)
        response.headers.append("set-cookie", set_cookie("", secure=request.url.scheme == "https", lifetime_s=0))
        return response

    return routes


def local_path(asked: str) -> str:
    """Where to go after a login: a page of this server, or the dashboard where something else was asked for.

    Browsers take // and backslashes for the beginning of another host.
    """
    is_path = asked.startswith("/") and not asked.startswith("//") and "\\" not in asked and asked.isprintable()
    return quote(asked, safe="/?&=#%:@!$'()*+,;~-._[]") if is_path else HOME


def _form(target: str, problem: str = "", status: int = 200) -> HTMLResponse:
    return HTMLResponse(render("login.html", next=target, problem=problem), status)


async def _read_form(request: Request) -> dict[str, str]:
    """The fields of a form that a browser sent without files."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise TooLarge(f"a login form has {MAX_FORM_BYTES} bytes at most")
    try:
        fields = parse_qs(body.decode("latin-1"), max_num_fields=10)
    except ValueError as error:
        raise InvalidInput(f"this is no login form: {error}") from None
    return {name: values[0] for name, values in fields.items()}
