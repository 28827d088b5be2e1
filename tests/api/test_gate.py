"""The gate: what it refuses without a key, whose key opens what, and what passes through it unhurt."""

import asyncio
import io
import json
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.routing import iter_route_contexts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from gated import client_of, make_key, services_in
from live import serving
from smelt.api import failures
from smelt.api.app import create_app, create_routes
from smelt.api.families import FAMILIES, family_of
from smelt.api.gate import Gate
from smelt.api.limits import Limits
from smelt.api.services import Services
from smelt.api.sessions import Sessions
from smelt.control import keyring, keys
from smelt.control.keyring import KeyRing

pytestmark = pytest.mark.anyio

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
PUBLIC = {
    "/healthz",
    "/api/v1/healthz",
    "/api/v1/downloads/{token}/{weights_id}/{file}",
    "/api/v1/downloads/{token}/traces/{session_id}.json",
    "/login",
    "/logout",
    "/static/{name}",
}
GUESSES = [
    *("/", "/docs", "/redoc", "/metrics", "/debug", "/admin", "/invocations", "/tokenize", "/pause", "/update_weights"),
    *("/v1", "/v1/", "//v1/models", "/v1//models", "/v1/./models", "/V1/models", "/%761/models", "/v1/models/"),
    *("/v1/models/../models", "/v1/models;a", "/v1/files", "/v1/embeddings", "/api/generate", "/api/v1/runs"),
    *("/healthz/../metrics", "/static/../metrics", "/static/%2e%2e/metrics", "/login/../metrics", "/dashboard"),
    *("/dashboard/", "/.env", "/openapi.json", "/openapi.yaml", "/server-status", "/shutdown", "/v1/fine_tuning/jobs"),
]


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with services_in(tmp_path / "home") as services:
        yield services


@pytest.fixture(autouse=True)
def read_keys_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """How old keys may be is tested with the ring; here a new key counts at once."""
    monkeypatch.setattr(keyring, "MAX_AGE_S", 0.0)


def routes_of(services: Services) -> FastAPI:
    return create_routes(services, KeyRing(services.database), Sessions(services.settings.home))


def probes() -> FastAPI:
    """Routes that show what reaches a handler; the families of the real ones claim their paths."""
    app = FastAPI()
    failures.install(app)

    @app.get("/v1/models")
    async def whoami(request: Request) -> dict[str, Any]:
        caller = request.state.caller
        return {"owner": caller.owner, "key": caller.key_id, "scopes": sorted(caller.scopes)}

    @app.post("/v1/completions")
    async def count(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @app.get("/v1/runs")
    async def fail() -> None:
        raise RuntimeError("the secret is in /home/ann/smelt.db")

    @app.get("/v1/runs/broken")
    async def fail_late() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"so far so good"
            raise RuntimeError("and then not")

        return StreamingResponse(pieces())

    return app


def gated(services: Services, app: Callable[[Scope, Receive, Send], Awaitable[None]] | None = None) -> Gate:
    ring, sessions = KeyRing(services.database), Sessions(services.settings.home)
    return Gate(app or probes(), services.settings, ring, sessions)


# Who may come in


async def test_every_route_refuses_without_a_key(services: Services) -> None:
    make_key(services)
    app = routes_of(services)
    mounted = {route.path for route in iter_route_contexts(app.routes)} | set(app.openapi()["paths"])
    assert len(mounted) > 15
    async with client_of(create_app(services)) as client:
        for path in mounted - PUBLIC:
            address = re.sub(r"{\w+}", "x", path)
            for method in METHODS:
                answer = await client.request(method, address, content=b"" if method in ("GET", "HEAD") else b"{}")
                assert answer.status_code == 401, (method, address)
                assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_guessed_paths_are_refused_too(services: Services) -> None:
    make_key(services)
    async with client_of(create_app(services)) as client:
        for path in GUESSES:
            for method in METHODS:
                url = httpx.URL("http://127.0.0.1:8000").copy_with(raw_path=path.encode())
                answer = await client.request(method, url)
                assert answer.status_code in (401, 403, 404), (method, path, answer.status_code)


def test_every_route_belongs_to_a_family(services: Services) -> None:
    paths = {route.path for route in iter_route_contexts(routes_of(services).routes)}
    assert not [path for path in paths if family_of(path) is None]
    assert {path for path in paths if family_of(path).public} == PUBLIC


async def test_a_route_that_no_family_declares_is_nobodys(services: Services) -> None:
    app = routes_of(services)
    called = []
    app.get("/v1/secrets")(lambda: called.append(1))
    async with client_of(gated(services, app), make_key(services, scopes=["admin"])) as client:
        assert (await client.get("/v1/secrets")).status_code == 404
        assert (await client.get("/health")).status_code == 200
    assert not called


async def test_a_socket_is_refused(services: Services) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await gated(services)({"type": "websocket", "path": "/v1/models"}, None, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_on_this_machine_nobody_needs_a_key_until_one_is_made(services: Services) -> None:
    async with client_of(gated(services)) as client, client_of(gated(services), "not-needed") as with_placeholder:
        anybody = {"owner": "local", "key": None, "scopes": sorted(keys.SCOPES)}
        assert (await client.get("/v1/models")).json() == anybody
        assert (await with_placeholder.get("/v1/models")).json() == anybody
        make_key(services)
        refusal = await client.get("/v1/models")
        assert refusal.status_code == 401
        assert refusal.json()["error"]["code"] == "invalid_api_key"
        assert "smelt keys create" in refusal.json()["error"]["message"]
        assert (await with_placeholder.get("/v1/models")).status_code == 401


async def test_to_revoke_the_last_key_does_not_open_the_server(services: Services) -> None:
    key = make_key(services)
    async with client_of(gated(services), key) as client:
        assert (await client.get("/v1/models")).status_code == 200
        services.writer.write(lambda connection: keys.revoke_key(connection, "laptop")).result(5)
        assert (await client.get("/v1/models")).status_code == 401
        services.writer.write(lambda connection: keys.remove_key(connection, "laptop")).result(5)
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_server_for_others_never_goes_without_a_key(tmp_path: Path) -> None:
    with services_in(tmp_path / "exposed", host="0.0.0.0") as services:
        async with client_of(gated(services)) as client:
            assert (await client.get("/v1/models")).status_code == 401


async def test_a_key_is_taken_in_either_header(services: Services) -> None:
    key = make_key(services, owner="ann", scopes=["inference"])
    async with client_of(gated(services)) as client:
        for headers in ({"authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key} "}, {"x-api-key": key}):
            answer = await client.get("/v1/models", headers=headers)
            assert (answer.json()["owner"], answer.json()["scopes"]) == ("ann", ["inference"])
        same = {"authorization": f"Bearer {key}", "x-api-key": key}
        assert (await client.get("/v1/models", headers=same)).status_code == 200
        two = await client.get("/v1/models", headers=same | {"x-api-key": "tml-other"})
        assert (two.status_code, "two different" in two.text) == (400, True)
        for headers in ({"authorization": key}, {"authorization": f"Basic {key}"}, {"x-api-key": key + "A"}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 401
        assert (await client.get(f"/v1/models?api_key={key}")).status_code == 401


@pytest.mark.parametrize("scope", keys.SCOPES)
@pytest.mark.parametrize("path", sorted(FAMILIES))
async def test_scopes_open_their_families_and_no_others(services: Services, scope: str, path: str) -> None:
    family = FAMILIES[path]
    async with client_of(gated(services), make_key(services, scopes=[scope])) as client:
        status = (await client.get(path)).status_code
        assert (status != 403) == (family.public or scope == "admin" or scope in family.scopes)


async def test_health_is_answered_whatever_happens_to_the_keys(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeyRing, "refresh", None)
    async with client_of(create_app(services)) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}


# Where requests come from


async def test_a_foreign_host_or_origin_is_refused_on_this_machine_too(services: Services) -> None:
    async with client_of(gated(services)) as client:
        rebound = await client.get("/v1/models", headers={"host": "evil.example:8000"})
        assert (rebound.status_code, "allowed_hosts" in rebound.text) == (421, True)
        for method in METHODS:
            answer = await client.request(method, "/v1/models", headers={"origin": "https://evil.example"})
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
        assert (await client.get("/v1/models", headers={"origin": "null"})).status_code == 403
        assert (await client.get("/v1/models", headers={"origin": "http://127.0.0.1:8000"})).status_code == 200


async def test_listed_origins_get_cors_and_preflights_need_no_key(tmp_path: Path) -> None:
    origin = "https://chat.example"
    with services_in(tmp_path / "cors", cors_origins=(origin,)) as services:
        key = make_key(services)
        async with client_of(gated(services), origin=origin) as client:
            asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
            preflight = await client.options("/v1/completions", headers=asked)
            assert (preflight.status_code, preflight.content) == (204, b"")
            assert preflight.headers["access-control-allow-origin"] == origin
            assert "authorization" in preflight.headers["access-control-allow-headers"]
            refused = await client.get("/v1/models")
            assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin)
            answer = await client.get("/v1/models", headers={"x-api-key": key})
            assert (answer.status_code, answer.headers["vary"]) == (200, "origin")
            assert "access-control-allow-credentials" not in answer.headers
            other = await client.options("/v1/completions", headers=asked | {"origin": "https://evil.example"})
            assert other.status_code == 403


# How much


async def test_a_key_has_so_many_requests_per_minute(services: Services) -> None:
    key = make_key(services, requests_per_minute=3)
    async with client_of(gated(services), key) as client, client_of(gated(services), make_key(services, "b")) as other:
        answers = [await client.get("/v1/models") for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
        assert left == ["2", "1", "0", "0", "0"]
        assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"3"}
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert answers[-1].json()["error"]["type"] == "rate_limit_error"
        free = await other.get("/v1/models")
        assert (free.status_code, "x-ratelimit-limit-requests" in free.headers) == (200, False)


async def test_a_key_has_so_many_requests_at_once(services: Services) -> None:
    begun, end = anyio.Event(), anyio.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await end.wait()
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    gate = gated(services, wait)
    async with client_of(gate, make_key(services, max_concurrent=1)) as client:
        first = asyncio.create_task(client.get("/v1/models"))
        await begun.wait()
        second = await client.get("/v1/models")
        assert (second.status_code, second.headers["retry-after"]) == (429, "1")
        end.set()
        assert (await first).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200
    assert gate.limits.num_in_flight == 0


async def test_too_many_requests_are_turned_away_before_their_body_and_health_is_not(services: Services) -> None:
    gate = gated(services, create_routes(services, KeyRing(services.database), Sessions(services.settings.home)))
    gate.limits = Limits(max_in_flight=0)

    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async with client_of(gate) as client:
        answer = await client.post("/v1/runs", content=body())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert (await client.get("/healthz")).status_code == 200


# What passes through


async def test_a_request_has_an_id(services: Services) -> None:
    async with client_of(gated(services)) as client:
        assert (await client.get("/v1/models", headers={"x-request-id": "mine-1.a"})).headers[
            "x-request-id"
        ] == "mine-1.a"
        ids = {
            (await client.get("/v1/models", headers={"x-request-id": offered})).headers["x-request-id"]
            for offered in ("", "a b", "<script>", "a" * 129)
        }
        assert len(ids) == 4
        assert all(re.fullmatch("[0-9a-f]{32}", made) for made in ids)


async def test_a_bug_shows_nothing_of_the_inside(services: Services, log_file: io.StringIO) -> None:
    async with client_of(gated(services)) as client:
        answer = await client.get("/v1/runs", headers={"x-request-id": "find-me"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "find-me")
        assert "find-me" in answer.json()["detail"]
        assert not re.search(r"secret|/home|RuntimeError|Traceback", answer.text)
    lines = [json.loads(line) for line in log_file.getvalue().splitlines()]
    report, request = (line for line in lines if "request_id" in line)
    assert (report["event"], report["request_id"], request["status"]) == ("failed", "find-me", 500)
    assert "RuntimeError: the secret" in report["exception"]


async def test_pages_forbid_what_they_do_not_need(services: Services) -> None:
    async with client_of(create_app(services)) as client:
        for path in ("/dashboard", "/dashboard/playground", "/docs", "/dashboard/runs/x"):
            page = await client.get(path)
            assert page.status_code == 200, path
            policy = page.headers["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "frame-ancestors 'none'" in policy
            assert ("unsafe-inline" in policy) == (path == "/dashboard/runs/x")
            assert page.headers["x-content-type-options"] == "nosniff"
            assert page.headers["referrer-policy"]
        assert (await client.get("/healthz")).headers["x-content-type-options"] == "nosniff"


def test_handlers_learn_that_their_client_has_left(services: Services) -> None:
    left = threading.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    with serving(gated(services, wait)) as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", content=b"{}", timeout=0.5)
        assert left.wait(5)


def test_a_stream_arrives_piece_by_piece_and_a_bug_breaks_it_off(services: Services) -> None:
    with serving(gated(services)) as address:
        with httpx.stream("GET", f"{address}/v1/runs/broken") as answer:
            pieces = answer.iter_raw()
            assert next(pieces) == b"so far so good"
            with pytest.raises(httpx.RemoteProtocolError):
                next(pieces)
        assert httpx.get(f"{address}/v1/models").status_code == 200


HEADER_NAMES = st.sampled_from(
    [
        *(b"host", b"origin", b"authorization", b"x-api-key", b"cookie", b"x-csrf-token", b"x-request-id", b"accept"),
        *(b"content-length", b"content-encoding", b"transfer-encoding", b"access-control-request-method", b"range"),
    ]
)
SIGNS = st.sampled_from(
    [b"Bearer ", b"127.0.0.1:8000", b"smelt_session=", b"gzip", b"http://127.0.0.1:8000", b"\xff", b".", b"[", b"9"]
)
HEADERS = st.lists(
    st.tuples(HEADER_NAMES, st.lists(SIGNS | st.binary(max_size=9), max_size=4).map(b"".join)), max_size=6
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with services_in(tmp_path_factory.mktemp("fuzzed") / "home") as services:
        make_key(services)
        yield Gate(probes(), services.settings, KeyRing(services.database), Sessions(services.settings.home))


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    headers=HEADERS,
    path=st.text(max_size=20).map(lambda text: "/" + text) | st.sampled_from(sorted(FAMILIES)),
    method=st.sampled_from(METHODS) | st.text(min_size=1, max_size=5),
    body=st.binary(max_size=20),
)
def test_no_headers_make_the_gate_fail(
    fuzzed: Gate, headers: list[tuple[bytes, bytes]], path: str, method: str, body: bytes
) -> None:
    statuses: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
            assert all(b"\n" not in value and b"\r" not in value for _, value in message["headers"])

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"next=%ff",
        "headers": [(b"host", b"localhost"), *headers], "scheme": "http", "client": ("127.0.0.1", 1), "root_path": "",
        "server": ("127.0.0.1", 8000), "http_version": "1.1",
    }  # fmt: skip
    fuzzed._ring = KeyRing(fuzzed._ring._database)  # locks belong to an event loop
    asyncio.run(fuzzed(scope, receive, send))
    assert len(statuses) == 1
    assert 200 <= statuses[0] < 500
