"""Web addresses that somebody else names: fetched only from machines that the whole world can reach; knows no data.

A server that fetches what a request names could be sent to places that only it can reach: its own ports, the inner
network, a cloud's store of secrets. So each connection is made to an address that was looked at, also after a redirect,
and no name is looked up twice.
"""

import http.client
import socket
import ssl
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    Request,
    UnknownHandler,
)

from smelt.errors import DataError

# Addresses of IPv6 that only wrap one of IPv4, which may be any: translated (NAT64), 6to4, Teredo.
WRAPPERS = tuple(ip_network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether everybody on the internet means the same machine by it."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if any(address in wrapper for wrapper in WRAPPERS):
            return False
    return address.is_global and not address.is_multicast


def connect(host: str, port: int, timeout_s: float | None) -> socket.socket:
    """A connection to a public address of a host. DataError where it has others, OSError where none answers."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, place in found:
        if not is_public(ip_address(str(place[0]).partition("%")[0])):
            raise DataError(
                f"{host} is a machine of an inner network, which a server does not fetch from; upload the file, or add "
                f"it on the server itself: smelt data add NAME --from URL"
            )
    failure: OSError | None = None
    for family, kind, protocol, _, place in found:
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(timeout_s)
        try:
            connection.connect(place)
        except OSError as error:
            connection.close()
            failure = error
        else:
            return connection
    raise failure or OSError(f"{host} has no address")


class PublicConnection(http.client.HTTPConnection):
    """HTTP with a machine that everybody can reach."""

    def connect(self) -> None:
        """Connect."""
        self.sock = connect(self.host, self.port, self.timeout)


class PublicTlsConnection(http.client.HTTPSConnection):
    """The same with HTTPS."""

    def connect(self) -> None:
        """Connect, and see a certificate of the host's name."""
        plain = connect(self.host, self.port, self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


class _Http(HTTPHandler):
    def http_open(self, request: Request) -> http.client.HTTPResponse:
        return self.do_open(PublicConnection, request)


class _Https(HTTPSHandler):
    def https_open(self, request: Request) -> http.client.HTTPResponse:
        return self.do_open(PublicTlsConnection, request)


def urlopen(request: Request, timeout: float) -> Any:
    """As urllib's, without its proxies (they would look names up themselves), files and FTP."""
    opener = OpenerDirector()
    for handler in (_Http(), _Https(), HTTPRedirectHandler(), HTTPErrorProcessor(), HTTPDefaultErrorHandler()):
        opener.add_handler(handler)
    opener.add_handler(UnknownHandler())
    return opener.open(request, timeout=timeout)
