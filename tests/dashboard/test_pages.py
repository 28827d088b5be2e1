"""The pages and their files over HTTP, without a browser: what is sent, under which policy, how it is cached."""

import gzip
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from smelt.dashboard import pages

PAGES = ["/dashboard", "/dashboard/runs/run-000000000001", "/dashboard/playground", "/dashboard/models"]
PAGES += ["/dashboard/sessions", "/dashboard/sessions/0123456789abcdef", "/dashboard/datasets"]


def client_of(csrf_token: str = "") -> TestClient:
    app = FastAPI()
    app.include_router(pages.router())
    return TestClient(with_token(app, csrf_token))


def with_token(app: ASGIApp, token: str) -> ASGIApp:
    """What the gate does for a browser that has logged in."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if token and scope["type"] == "http":
            scope.setdefault("state", {})["csrf_token"] = token
        await app(scope, receive, send)

    return call


@pytest.fixture(scope="module")
def client() -> TestClient:
    return client_of()


@pytest.mark.parametrize("path", PAGES)
def test_a_page_brings_no_script_and_no_style_of_its_own_and_loads_only_from_here(
    client: TestClient, path: str
) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "unsafe-eval" not in response.headers["content-security-policy"]
    html = response.text
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=|javascript:", html)
    addresses = re.findall(r'(?:src|href|action)="([^"]*)"', html)
    assert addresses
    assert all(address.startswith(("/", "#")) and not address.startswith("//") for address in addresses)


def test_only_pages_with_charts_may_set_styles(client: TestClient) -> None:
    allows = {path: "unsafe-inline" in client.get(path).headers["content-security-policy"] for path in PAGES}
    assert [path for path, does in allows.items() if does] == [PAGES[1], PAGES[5]]


def test_an_id_from_the_address_is_escaped(client: TestClient) -> None:
    html = client.get("/dashboard/runs/%22%3E%3Cscript%3Ealert(1)%3C").text
    assert "<script>" not in html
    assert "&#34;&gt;&lt;script&gt;alert(1)&lt;" in html


def test_a_browser_that_has_logged_in_gets_its_token_and_a_way_out(client: TestClient) -> None:
    html = client_of("t0ken").get("/dashboard").text
    assert '<meta name="csrf-token" content="t0ken">' in html
    assert 'action="/logout"' in html
    assert "/logout" not in client.get("/dashboard").text


def test_the_root_leads_a_browser_to_the_dashboard_and_tells_a_program_where_to_go(client: TestClient) -> None:
    response = client.get("/", headers={"accept": "text/html,*/*"}, follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (307, "/dashboard")
    assert client.get("/").json()["runs"] == "/v1/runs"


def test_files_are_packed_typed_and_not_sent_twice(client: TestClient) -> None:
    first = client.get("/static/plotly.js")
    assert first.headers["content-type"].startswith("text/javascript")
    assert (first.headers["content-encoding"], first.headers["vary"]) == ("gzip", "Accept-Encoding")
    assert int(first.headers["content-length"]) < len(first.content) / 3
    assert "max-age=86400" in first.headers["cache-control"]
    again = client.get("/static/plotly.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    plain = client.get("/static/plotly.js", headers={"accept-encoding": "identity"})
    assert plain.content == first.content
    assert "content-encoding" not in plain.headers
    assert client.get("/static/style.css").headers["cache-control"] == "no-cache"


def test_what_is_packed_is_the_file() -> None:
    for name, file in pages.static_files().items():
        assert gzip.decompress(file.compressed) == file.body, name


@pytest.mark.parametrize("name", ["..%2fpages.py", "%2e%2e/pages.py", "../pages.py", "unknown.js", ""])
def test_nothing_but_the_known_files_is_sent(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code in (404, 405)


def test_scripts_put_text_into_pages_never_markup() -> None:
    for path in sorted(Path(pages.STATIC).glob("*.js")):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", path.read_text()), path


def test_every_file_that_a_page_or_a_script_names_is_there(client: TestClient) -> None:
    known = pages.static_files()
    named = {name for path in PAGES for name in re.findall(r"/static/([\w.]+)", client.get(path).text)}
    scripts = [file.body.decode() for name, file in known.items() if name.endswith(".js") and name != "plotly.js"]
    named |= {name for script in scripts for name in re.findall(r'from "\./([\w.]+)"', script)}
    assert named == set(known)
