"""Which names this server answers to and which web pages may call it; knows no key and no route.

A page of any site can make its visitor's browser send requests here, and a site's name can be pointed at 127.0.0.1
to read the answers. So the Host header has to name us, and an Origin has to be ours or a listed one.
"""

import ipaddress
import socket
from functools import lru_cache
from urllib.parse import urlsplit

from smelt.errors import ConfigError, Forbidden, WrongHost
from smelt.settings import Settings

Headers = list[tuple[bytes, bytes]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
PREFLIGHT_HEADERS: Headers = [
    (b"access-control-allow-methods", b"GET, POST, PUT, PATCH, DELETE"),
    (b"access-control-allow-headers", b"authorization, content-type, x-api-key, x-request-id"),
    (b"access-control-max-age", b"600"),
    (b"content-length", b"0"),
]
EXPOSED = b"x-request-id, retry-after, x-ratelimit-limit-requests, x-ratelimit-remaining-requests"


class Hosts:
    """Checks of the headers Host and Origin. ConfigError for an origin in the settings that no browser would send."""

    def __init__(self, settings: Settings) -> None:
        own = (settings.host, f"[{settings.host}]", socket.gethostname())
        self._names = {name.lower() for name in (*LOCAL_NAMES, *own, *settings.allowed_hosts)}
        self._origins = {_checked_origin(origin).encode() for origin in settings.cors_origins}
        self._knows = lru_cache(maxsize=1024)(self._look_up)

    def check_host(self, host: bytes | None) -> None:
        """WrongHost where a request was meant for somebody else."""
        if host is None or not self._knows(host):
            name = "no name" if host is None else repr(host.decode("latin-1"))
            raise WrongHost(f"this server does not answer to {name}; list it in the setting allowed_hosts")

    def cors_headers(self, origin: bytes | None, host: bytes) -> Headers:
        """What the answer to a page of that origin needs. Forbidden where such a page may not ask at all.

        The scheme is left out of the comparison: a proxy that ends TLS before us changes it.
        """
        if origin is None or origin.partition(b"://")[2].lower() == host.lower():
            return []
        if origin in self._origins:
            headers = (b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED)
            return [*headers, (b"vary", b"origin")]
        name = origin.decode("latin-1")
        raise Forbidden(f"pages of {name!r} may not call this server; list the origin in the setting cors_origins")

    def _look_up(self, host: bytes) -> bool:
        """A number cannot be pointed elsewhere as a name can, so it is ours however the request got here."""
        name = _without_port(host.decode("latin-1").lower())
        return name in self._names or _is_number(name)


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isascii() and port.isdigit() else host


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True


def _checked_origin(origin: str) -> str:
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}" or "*" in origin:
        raise ConfigError(f"cors_origins: {origin!r} is no origin; write one such as https://chat.example.org")
    return origin
