"""The head of a request is bounded in bytes and in time, at the beginning of a connection and later on it."""

import socket
from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from live import serving
from smelt.api import protocol
from smelt.api.protocol import MAX_HEAD_BYTES, BoundedProtocol

REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    num_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        num_bytes, more = num_bytes + len(message["body"]), message["more_body"]
    body = b"%d" % num_bytes
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    with serving(count, http=BoundedProtocol) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


def all_of(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(4096), b""))


def flood(client: socket.socket, num_bytes: int = 100 * MAX_HEAD_BYTES) -> bytes:
    """Send on and on, until the other side has had enough; what it said."""
    try:
        for _ in range(num_bytes // 2**14):
            client.sendall(b"a" * 2**14)
        pytest.fail("it was all taken")
    except (BrokenPipeError, ConnectionResetError):
        pass
    try:
        return all_of(client)
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize("beginning", [b"GET /", b"GET / HTTP/1.1\r\nHost: here\r\nX: ", b"GET / HTTP/1.1\r\n"])
def test_a_head_without_end_is_cut_off(address: tuple[str, int], beginning: bytes) -> None:
    for earlier in (b"", REQUEST):
        with socket.create_connection(address, timeout=5) as client:
            if earlier:
                client.sendall(earlier)
                assert client.recv(4096).startswith(b"HTTP/1.1 200")
            client.sendall(beginning)
            flood(client)


def test_whoever_sends_too_large_a_head_is_told(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=5) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\nX: " + b"a" * MAX_HEAD_BYTES)
        assert all_of(client).startswith(b"HTTP/1.1 431")


def test_trailers_and_the_sizes_of_chunks_do_not_get_around_it(address: tuple[str, int]) -> None:
    chunked = b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
    for beginning in (chunked + b"2;extension=", chunked + b"2\r\nab\r\n0\r\nTrailer: "):
        with socket.create_connection(address, timeout=5) as client:
            client.sendall(beginning)
            flood(client)


def test_large_bodies_and_many_requests_pass(address: tuple[str, int]) -> None:
    url = f"http://{address[0]}:{address[1]}/"
    with httpx.Client() as client:
        for _ in range(3):
            assert client.post(url, content=bytes(50 * MAX_HEAD_BYTES)).text == str(50 * MAX_HEAD_BYTES)
            chunks = (bytes(1000) for _ in range(1000))
            assert client.post(url, content=chunks).text == "1000000"
        assert client.get(url, headers={"x": "a" * (MAX_HEAD_BYTES // 2)}).status_code == 200
    with socket.create_connection(address, timeout=5) as client:
        client.sendall(REQUEST * 3000)  # pipelined, more than a head may be
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 3000:
            answers += client.recv(2**16)


@pytest.mark.parametrize("sent", [b"", REQUEST[:20], REQUEST + REQUEST[:20]])
def test_a_head_that_does_not_come_is_not_waited_for(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    with serving(count, http=BoundedProtocol) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as client:
            client.sendall(sent)
            assert all_of(client).rpartition(b"HTTP/1.1 ")[2].startswith(b"408")
