"""Hosts and origins: our names, any number, and what the settings list."""

from pathlib import Path

import pytest

from smelt.api.hosts import Hosts
from smelt.errors import ConfigError, Forbidden, WrongHost
from smelt.settings import load_settings


def hosts(tmp_path: Path, **settings: object) -> Hosts:
    return Hosts(load_settings(home=tmp_path, **settings))


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000", "10.1.2.3:80", "[fe80::1]:1"],
)
def test_our_own_names_and_numbers_are_answered(tmp_path: Path, host: str) -> None:
    hosts(tmp_path).check_host(host.encode())


@pytest.mark.parametrize(
    "host",
    [
        *(None, b"", b"evil.example", b"evil.example:8000", b"[evil]", b"\xff\xfe", b"1.2.3.4.5", b"localhost:8000:80"),
        *(b"localhost.evil.example", b"127.0.0.1.evil.example", b"localhost@evil.example", b"127.0.0.1 evil.example"),
    ],
)
def test_other_names_are_refused(tmp_path: Path, host: bytes | None) -> None:
    with pytest.raises(WrongHost, match="allowed_hosts"):
        hosts(tmp_path).check_host(host)


def test_listed_names_and_the_address_to_serve_on_are_answered(tmp_path: Path) -> None:
    checks = hosts(tmp_path, allowed_hosts=("models.example",), host="box.example")
    for host in (b"models.example", b"Models.Example:443", b"box.example:8000"):
        checks.check_host(host)
    with pytest.raises(WrongHost):
        checks.check_host(b"sub.models.example")


def test_a_page_of_ours_may_ask_through_a_proxy_that_ends_tls(tmp_path: Path) -> None:
    checks = hosts(tmp_path, allowed_hosts=("models.example",))
    assert checks.cors_headers(None, b"models.example") == []
    assert checks.cors_headers(b"https://models.example", b"models.example") == []
    for origin in (b"https://models.example:444", b"null", b"", b"https://evil.example", b"models.example"):
        with pytest.raises(Forbidden, match="cors_origins"):
            checks.cors_headers(origin, b"models.example")


def test_listed_origins_are_exact(tmp_path: Path) -> None:
    checks = hosts(tmp_path, cors_origins=("https://chat.example",))
    headers = dict(checks.cors_headers(b"https://chat.example", b"localhost"))
    assert headers[b"access-control-allow-origin"] == b"https://chat.example"
    for origin in (b"http://chat.example", b"https://chat.example.evil", b"https://chat.example:8443"):
        with pytest.raises(Forbidden):
            checks.cors_headers(origin, b"localhost")


@pytest.mark.parametrize(
    "origin", ["*", "chat.example", "https://*.example", "https://chat.example/", "ftp://x", "null"]
)
def test_an_origin_that_no_browser_sends_is_a_mistake(tmp_path: Path, origin: str) -> None:
    with pytest.raises(ConfigError, match="is no origin"):
        hosts(tmp_path, cors_origins=(origin,))
