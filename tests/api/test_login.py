"""Logging in: a key for a cookie, pages that send there, tokens for what changes something, and every way out."""

import re
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gated import client_of, make_key, services_in
from smelt.api.app import create_app
from smelt.api.login import local_path
from smelt.api.services import Services
from smelt.api.sessions import COOKIE, LIFETIME_S, SECRET_FILE, Sessions
from smelt.control import keyring, keys

BROWSER = {"accept": "text/html,application/xhtml+xml"}


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    monkeypatch.setattr(keyring, "MAX_AGE_S", 0.0)
    with services_in(tmp_path / "home") as services:
        yield services


async def log_in(client: httpx.AsyncClient, key: str, target: str = "/dashboard") -> httpx.Response:
    answer = await client.post("/login", data={"key": key, "next": target})
    assert answer.status_code == 303, answer.text
    return answer


async def token_of(client: httpx.AsyncClient) -> str:
    """What a page tells its scripts."""
    found = re.search('name="csrf-token" content="([0-9a-f]+)"', (await client.get("/dashboard")).text)
    assert found
    return found[1]


@pytest.mark.anyio
async def test_a_browser_is_sent_to_the_form_and_back(services: Services) -> None:
    key = make_key(services)
    async with client_of(create_app(services), **BROWSER) as client:
        away = await client.get("/dashboard/runs/x?a=1&b=2")
        assert away.status_code == 303
        form = await client.get(away.headers["location"])
        assert form.status_code == 200
        assert 'value="/dashboard/runs/x?a=1&amp;b=2"' in form.text
        assert "<script" not in form.text
        back = await log_in(client, key, "/dashboard/runs/x?a=1&b=2")
        assert back.headers["location"] == "/dashboard/runs/x?a=1&b=2"
        cookie = back.headers["set-cookie"]
        assert all(word in cookie for word in ("HttpOnly", "SameSite=Strict", "Path=/", f"Max-Age={LIFETIME_S}"))
        assert "Secure" not in cookie
        assert key not in cookie
        assert (await client.get("/dashboard")).status_code == 200
        assert (await client.get("/v1/runs")).json() == {"data": []}


@pytest.mark.anyio
async def test_over_tls_the_cookie_is_secure(services: Services) -> None:
    key = make_key(services)
    async with client_of(create_app(services)) as client:
        client.base_url = httpx.URL("https://localhost")
        assert (await log_in(client, key)).headers["set-cookie"].endswith("; Secure")


@pytest.mark.anyio
async def test_programs_are_not_sent_anywhere(services: Services) -> None:
    make_key(services)
    async with client_of(create_app(services)) as client:
        assert (await client.get("/dashboard")).status_code == 401
        assert (await client.get("/v1/runs", headers=BROWSER)).status_code == 401
        assert (await client.post("/dashboard", headers=BROWSER)).status_code == 401


@pytest.mark.anyio
async def test_where_nobody_needs_a_key_there_is_no_form(services: Services) -> None:
    async with client_of(create_app(services)) as client:
        answer = await client.get("/login?next=/docs")
        assert (answer.status_code, answer.headers["location"]) == (303, "/docs")
        assert 'name="csrf-token" content=""' in (await client.get("/dashboard")).text


@pytest.mark.anyio
async def test_a_wrong_key_is_said_and_only_so_often(services: Services) -> None:
    make_key(services)
    async with client_of(create_app(services)) as client:
        for _ in range(10):
            wrong = await client.post("/login", data={"key": "tml-<b>wrong"})
            assert (wrong.status_code, COOKIE in wrong.headers.get("set-cookie", "")) == (401, False)
            assert 'role="alert"' in wrong.text
            assert "<b>" not in wrong.text
        limited = await client.post("/login", data={"key": "tml-wrong"})
        assert limited.status_code == 429
        assert int(limited.headers["retry-after"]) > 0


@pytest.mark.anyio
async def test_a_form_may_be_anything(services: Services) -> None:
    make_key(services)
    async with client_of(create_app(services)) as client:
        for content, status in (
            (b"", 401),
            (b"&" * 99, 400),
            (b"a=1&" * 99, 400),
            (b"\xff=%ff", 401),
            (b"k" * 9000, 413),
        ):
            assert (await client.post("/login", content=content)).status_code == status


@pytest.mark.anyio
async def test_what_changes_something_needs_the_pages_token(services: Services) -> None:
    key = make_key(services)
    async with client_of(create_app(services)) as client:
        await log_in(client, key)
        token = await token_of(client)
        for given in ({}, {"x-csrf-token": "0" * 64}, {"x-csrf-token": ""}):
            refused = await client.post("/v1/runs/x/cancel", headers=given)
            assert (refused.status_code, "x-csrf-token" in refused.text) == (403, True)
        assert (await client.post("/v1/runs/x/cancel", headers={"x-csrf-token": token})).status_code == 404
        # A key in a header was sent on purpose, cookie or not.
        assert (await client.post("/v1/runs/x/cancel", headers={"x-api-key": key})).status_code == 404
        foreign = {"x-csrf-token": token, "origin": "https://evil.example"}
        assert (await client.post("/v1/runs/x/cancel", headers=foreign)).status_code == 403


@pytest.mark.anyio
async def test_a_token_is_of_one_session(services: Services) -> None:
    key = make_key(services)
    app = create_app(services)
    async with client_of(app) as client, client_of(app) as other:
        await log_in(client, key)
        await log_in(other, key)
        theirs = {"x-csrf-token": await token_of(other)}
        assert (await client.post("/v1/runs/x/cancel", headers=theirs)).status_code == 403


@pytest.mark.anyio
async def test_logging_out_ends_copies_of_the_cookie_too(services: Services) -> None:
    key = make_key(services)
    app = create_app(services)
    async with client_of(app) as client:
        await log_in(client, key)
        token, copy = await token_of(client), client.cookies[COOKIE]
        assert (await client.post("/logout", data={"csrf_token": "wrong"})).status_code == 403
        assert (await client.get("/dashboard")).status_code == 200
        out = await client.post("/logout", data={"csrf_token": token})
        assert (out.status_code, out.headers["location"]) == (303, "/login")
        assert COOKIE not in client.cookies
        assert (await client.get("/dashboard", headers={"cookie": f"{COOKIE}={copy}"})).status_code == 401


@pytest.mark.anyio
async def test_a_revoked_key_takes_its_cookies_with_it(services: Services) -> None:
    key = make_key(services)
    async with client_of(create_app(services)) as client:
        await log_in(client, key)
        assert (await client.get("/v1/runs")).status_code == 200
        services.writer.write(lambda connection: keys.revoke_key(connection, "laptop")).result(5)
        assert (await client.get("/v1/runs")).status_code == 401


def test_a_login_outlives_the_server_and_not_half_a_day(tmp_path: Path) -> None:
    now = [1000.0]
    first = Sessions(tmp_path, lambda: now[0])
    cookie = first.begin("key")
    session = Sessions(tmp_path, lambda: now[0]).read(cookie)
    assert session == first.read(cookie)
    assert session is not None
    assert session.key_id == "key"
    assert stat.S_IMODE((tmp_path / SECRET_FILE).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [SECRET_FILE]
    now[0] += LIFETIME_S
    assert first.read(cookie) is None


def test_a_cookie_that_was_changed_or_made_elsewhere_is_nothing(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    cookie = sessions.begin("key")
    (tmp_path / "other").mkdir()
    for position in range(len(cookie)):
        changed = "0" if cookie[position] != "0" else "1"
        assert sessions.read(cookie[:position] + changed + cookie[position + 1 :]) is None
    for other in (Sessions(tmp_path / "other").begin("key"), "", "...", "a.b.c.d", "é.1.2.3"):
        assert sessions.read(other) is None


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/runs/x?a=1#b", "/docs", "/dashboard/runs/%C3%A9"])
def test_pages_of_ours_are_gone_back_to(path: str) -> None:
    assert local_path(path) == path


@given(st.text(alphabet=st.sampled_from("/\\.:@h\t\n\r evil%25é\x00"), max_size=12))
def test_nobody_is_sent_elsewhere(asked: str) -> None:
    target = local_path(asked)
    joined = httpx.URL("http://127.0.0.1:8000/login").join(target)
    assert (joined.host, joined.port, joined.scheme) == ("127.0.0.1", 8000, "http")
    assert target.startswith("/")
    assert not target.startswith(("//", "/\\"))
    assert target.isascii()
    assert target.isprintable()
    assert "\\" not in target
