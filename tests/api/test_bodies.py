"""Bodies: what arrives is what was sent, however it was packed; too large, broken and slow ones are refused."""

import asyncio
import gzip
import json
import socket
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from gated import client_of, services_in
from live import serving
from smelt.api.bodies import Bodies, Body
from smelt.api.gate import Gate
from smelt.api.sessions import Sessions
from smelt.control.keyring import KeyRing
from smelt.errors import InvalidInput, SlowBody, TooLarge, Unavailable, UnsupportedEncoding

pytestmark = pytest.mark.anyio
CAP = 2**20


def raw_deflate(body: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-15)
    return deflate.compress(body) + deflate.flush()


def two_members(body: bytes) -> bytes:
    return gzip.compress(body[: len(body) // 2]) + gzip.compress(body[len(body) // 2 :])


PACKERS = {
    "identity": (b"identity", bytes),
    "gzip": (b"gzip", gzip.compress),
    "gzip in two": (b"GZIP", two_members),
    "zlib": (b"deflate", zlib.compress),
    "deflate": (b"deflate", raw_deflate),
    "zstd": (b"zstd", zstandard.ZstdCompressor(write_checksum=True).compress),
}


def arriving(chunks: list[bytes]) -> Receive:
    """A server's receive: the chunks, then nobody."""
    messages: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages = [*messages, {"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    return receive


async def read(body: Body) -> bytes:
    whole = b""
    while True:
        message = await body()
        assert message["type"] == "http.request"
        whole += message["body"]
        if not message["more_body"]:
            return whole


def body_of(chunks: list[bytes], encoding: bytes = b"", bodies: Bodies | None = None) -> Body:
    return Body(arriving(chunks), bodies or Bodies(CAP), None, encoding)


@settings(deadline=None, max_examples=40)
@given(content=st.binary(max_size=300), size=st.integers(1, 50), name=st.sampled_from(sorted(PACKERS)))
def test_what_was_packed_arrives_unpacked(content: bytes, size: int, name: str) -> None:
    encoding, pack = PACKERS[name]
    packed = pack(content)
    chunks = [packed[start : start + size] for start in range(0, len(packed), size)]
    body = body_of(chunks, encoding)

    async def read_to_the_end() -> None:
        assert await read(body) == content
        assert (await body())["type"] == "http.disconnect"

    asyncio.run(read_to_the_end())


@pytest.mark.parametrize("name", PACKERS)
async def test_a_body_may_be_as_large_as_the_cap_and_no_larger(name: str) -> None:
    encoding, pack = PACKERS[name]
    assert len(await read(body_of([pack(bytes(CAP))], encoding))) == CAP
    body = body_of([pack(bytes(CAP + 1))], encoding)
    with pytest.raises(TooLarge, match="1,048,576 bytes"):
        await read(body)
    assert isinstance(body.failure, TooLarge)


@pytest.mark.parametrize("name", ["gzip", "zstd"])
async def test_a_bomb_is_never_unpacked_whole(name: str) -> None:
    encoding, pack = PACKERS[name]
    bomb = pack(bytes(200 * 2**20))
    assert len(bomb) < CAP
    bodies = Bodies(CAP)
    body = body_of([bomb], encoding, bodies)
    with pytest.raises(TooLarge):
        await read(body)
    assert bodies.num_held_bytes <= CAP
    body.release()
    assert bodies.num_held_bytes == 0


@pytest.mark.parametrize("name", ["gzip", "zlib", "deflate", "zstd"])
async def test_broken_packing_is_a_mistake_of_the_client(name: str) -> None:
    encoding, pack = PACKERS[name]
    packed = pack(b"some text that is long enough to be packed" * 9)
    broken = packed[: len(packed) // 2] + b"\xff\xff\xff\xff" + packed[len(packed) // 2 + 4 :]
    for content in (broken, b"\x1f\x8bgarbage", b"no packing at all"):
        with pytest.raises(InvalidInput):
            await read(body_of([content], encoding))


@pytest.mark.parametrize("name", ["gzip", "zlib", "deflate", "zstd"])
async def test_a_body_without_its_end_is_refused(name: str) -> None:
    encoding, pack = PACKERS[name]
    with pytest.raises(InvalidInput, match="cut short"):
        await read(body_of([pack(b"some text")[:-5]], encoding))


async def test_other_packings_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedEncoding, match="cannot unpack 'br'; use one of: gzip, deflate, zstd"):
        body_of([], b"br")
    with pytest.raises(UnsupportedEncoding):
        body_of([], b"gzip, gzip")


def test_a_length_is_believed_before_anything_arrives() -> None:
    with pytest.raises(TooLarge):
        Body(arriving([]), Bodies(CAP), b"%d" % (CAP + 1), b"")
    with pytest.raises(InvalidInput, match="Content-Length"):
        Body(arriving([]), Bodies(CAP), b"-1", b"")


async def test_all_bodies_together_have_a_bound() -> None:
    bodies = Bodies(100, max_held_bytes=150)
    first = body_of([bytes(100)], bodies=bodies)
    assert len(await read(first)) == 100
    with pytest.raises(Unavailable):
        await read(body_of([bytes(51)], bodies=bodies))
    first.release()
    assert len(await read(body_of([bytes(100)], bodies=bodies))) == 100


@pytest.mark.parametrize("encoding", [b"", b"gzip"])
async def test_a_body_that_does_not_come_is_not_waited_for(encoding: bytes) -> None:
    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(SlowBody, match="0 bytes so far"):
        await read(Body(receive, Bodies(CAP, patience_s=0.05), None, encoding))


# Through the gate


async def echo_length(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads its body, hides what goes wrong as frameworks do, and answers with how much it was."""
    num_bytes, status = 0, 200
    try:
        while True:
            message = await receive()
            num_bytes += len(message["body"])
            if not message["more_body"]:
                break
    except InvalidInput:
        status = 400
    body = json.dumps({"bytes": num_bytes, "headers": [name.decode() for name, _ in scope["headers"]]}).encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    with services_in(tmp_path / "home", max_body_mb=1) as services:
        yield Gate(echo_length, services.settings, KeyRing(services.database), Sessions(services.settings.home))


async def test_a_handler_sees_the_unpacked_body_and_no_sign_of_the_packing(gate: Gate) -> None:
    async with client_of(gate) as client:
        packed = gzip.compress(bytes(1000))
        answer = await client.post("/v1/completions", content=packed, headers={"content-encoding": "gzip"})
        assert answer.json()["bytes"] == 1000
        assert not {"content-encoding", "content-length"} & set(answer.json()["headers"])


async def test_a_refused_body_has_its_own_answer_whatever_the_handler_says(gate: Gate) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(2**16)

    async with client_of(gate) as client:
        for content, encoding, status in (
            (gzip.compress(bytes(CAP + 1)), "gzip", 413),
            (endless(), "identity", 413),
            (b"no packing", "gzip", 400),
            (b"...", "br", 415),
        ):
            answer = await client.post("/v1/completions", content=content, headers={"content-encoding": encoding})
            assert answer.status_code == status
            assert answer.json()["error"]["message"]
    assert gate.bodies.num_held_bytes == 0


def test_a_slow_body_is_cut_off(gate: Gate) -> None:
    gate.bodies = Bodies(CAP, patience_s=0.2)
    with serving(gate) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 100\r\n\r\n"
            client.sendall(head.encode() + b"only this")
            answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"9 bytes so far" in answer
    assert b"connection: close" in answer
