"""Which machines may be fetched from for somebody else: by their address, also after a redirect."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from urllib.error import URLError
from urllib.request import Request

import pytest

from smelt.data import public_web
from smelt.data.public_web import is_public, urlopen
from smelt.errors import DataError


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:1.1.1.1"])
def test_the_world_can_reach(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1"),
        *("64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
    ],
)
def test_only_some_can_reach(address: str) -> None:
    assert not is_public(ip_address(address))


class Page(BaseHTTPRequestHandler):
    """/text is a file; /to-PLACE leads there."""

    def do_GET(self) -> None:
        if self.path.startswith("/to-"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to-"))
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"text")

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "127.1"])
def test_this_machine_is_not_fetched_from(host: str, port: int) -> None:
    with pytest.raises(DataError, match="inner network"):
        urlopen(Request(f"http://{host}:{port}/text"), timeout=5)


@pytest.fixture
def one_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_web, "is_public", lambda address: str(address) == "127.0.0.1")


@pytest.mark.usefixtures("one_is_public")
def test_public_machines_are_fetched_from_and_redirects_looked_at(port: int) -> None:
    with urlopen(Request(f"http://127.0.0.1:{port}/text"), timeout=5) as answer:
        assert answer.read() == b"text"
    with urlopen(Request(f"http://127.0.0.1:{port}/to-/text"), timeout=5) as answer:
        assert answer.read() == b"text"
    with pytest.raises(DataError, match="inner network"):
        urlopen(Request(f"http://127.0.0.1:{port}/to-http://127.0.0.2:{port}/text"), timeout=5)
    for elsewhere in ("ftp://127.0.0.1/x", "file:///etc/passwd"):
        with pytest.raises(URLError):
            urlopen(Request(f"http://127.0.0.1:{port}/to-{elsewhere}"), timeout=5)


@pytest.mark.usefixtures("one_is_public")
def test_a_proxy_of_the_environment_is_not_asked(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.2:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with urlopen(Request(f"http://127.0.0.1:{port}/text"), timeout=5) as answer:
        assert answer.read() == b"text"
