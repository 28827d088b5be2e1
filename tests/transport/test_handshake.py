"""Only who knows the key and speaks our version gets in, on either side; over TLS where others could listen."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from certificates import write_certificate
from smelt.errors import ConfigError, ConnectionClosed, TransportError
from smelt.transport.addresses import client_tls, server_tls
from smelt.transport.frames import FrameStream, decode_body, encode_frame
from smelt.transport.handshake import MAX_HANDSHAKE_BYTES, PROTOCOL_VERSION, Challenge, Hello, Refused, Welcome
from smelt.transport.messages import Ping
from smelt.transport.streams import Connection, connect, listen

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))

NEWER = f"the other side speaks protocol {PROTOCOL_VERSION + 1}, this one {PROTOCOL_VERSION}"


async def say_hello(connection: Connection) -> None:
    """A handler that shows that the connection works, and stays until the peer has gone."""
    await connection.send(Ping(1.5))
    await connection.receive()


async def test_who_has_the_key_gets_in(socket_file: Path) -> None:
    async with (
        listen(socket_file, say_hello, key=KEY),
        await connect(socket_file, "worker", "w", key=KEY) as connection,
    ):
        assert await connection.receive() == Ping(1.5)


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        (KEY, OTHER_KEY, "the key is wrong"),
        (KEY, None, "this server needs a key"),
        (None, KEY, "this server has no key: dial in without one"),
    ],
)
async def test_who_has_not_is_refused_and_takes_no_epoch(
    ours: bytes | None, theirs: bytes | None, told: str, socket_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with listen(socket_file, say_hello, key=ours):
        with pytest.raises(TransportError, match=f"the server refused the connection: {told}"):
            await connect(socket_file, "worker", "w", key=theirs)
        async with await connect(socket_file, "worker", "w", key=ours) as connection:
            assert connection.epoch == 1
    assert f"hung up on a stranger: {told}" in caplog.text


@pytest.mark.parametrize(
    "open_it",
    [
        lambda path: listen(path, say_hello, key=b"hello").__aenter__(),
        lambda path: connect(path, "worker", "w", key=b"hello"),
    ],
)
async def test_a_key_that_could_be_guessed_is_refused(
    open_it: Callable[[Path], Awaitable[object]], socket_file: Path
) -> None:
    with pytest.raises(ConfigError, match="a key of 5 bytes can be guessed"):
        await open_it(socket_file)


async def answer_as_listener(socket_file: Path, *greetings: msgspec.Struct) -> asyncio.Server:
    """A listener that says what it is told to, one frame for each that it gets after the first."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = FrameStream(reader, writer)
        for greeting in greetings:
            await stream.write(encode_frame(greeting))
            await asyncio.wait([asyncio.ensure_future(stream.read(MAX_HANDSHAKE_BYTES))])
        await stream.close()

    return await asyncio.start_unix_server(greet, socket_file)


@pytest.mark.parametrize("proof", [b"", bytes(32)])
async def test_a_listener_that_does_not_know_the_key_is_left(proof: bytes, socket_file: Path) -> None:
    async with await answer_as_listener(socket_file, Challenge(PROTOCOL_VERSION, bytes(32)), Welcome(1, proof)):
        with pytest.raises(TransportError, match="the server does not know our key"):
            await connect(socket_file, "worker", "w", key=KEY)


async def test_a_listener_that_returns_our_own_proof_is_left(socket_file: Path) -> None:
    async def mirror(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = FrameStream(reader, writer)
        await stream.write(encode_frame(Challenge(PROTOCOL_VERSION, bytes(32))))
        hello = decode_body(await stream.read(MAX_HANDSHAKE_BYTES), msgspec.msgpack.Decoder(Hello))
        await stream.write(encode_frame(Welcome(1, hello.proof)))
        await stream.close()

    async with await asyncio.start_unix_server(mirror, socket_file):
        with pytest.raises(TransportError, match="the server does not know our key"):
            await connect(socket_file, "worker", "w", key=KEY)


async def test_a_listener_of_another_version_is_left(socket_file: Path) -> None:
    async with await answer_as_listener(socket_file, Challenge(PROTOCOL_VERSION + 1, b"")):
        with pytest.raises(TransportError, match=NEWER):
            await connect(socket_file, "worker", "w")


async def test_a_listener_that_says_nothing_is_left(socket_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    monkeypatch.setattr("smelt.transport.handshake.HANDSHAKE_SECONDS", 0.05)
    async with await asyncio.start_unix_server(say_nothing, socket_file):
        with pytest.raises(TransportError, match="the server did not finish its greeting within 0.05 s"):
            await connect(socket_file, "worker", "w")


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (Hello(PROTOCOL_VERSION + 1, "worker", "w", b"", b""), NEWER),
        (Hello(PROTOCOL_VERSION, "king", "w", b"", b""), "there is no role 'king'"),
    ],
)
async def test_a_dialler_that_does_not_fit_is_told_why(hello: Hello, reason: str, socket_file: Path) -> None:
    async with listen(socket_file, say_hello):
        stream = FrameStream(*await asyncio.open_unix_connection(socket_file))
        await stream.read(MAX_HANDSHAKE_BYTES)
        await stream.write(encode_frame(hello))
        refused = decode_body(await stream.read(MAX_HANDSHAKE_BYTES), msgspec.msgpack.Decoder(Refused))
        with pytest.raises(ConnectionClosed):
            await stream.read(1)
        await stream.close()
    assert refused.reason.startswith(reason)


@pytest.mark.parametrize(
    ("garbage", "told"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "a frame of 1,195,725,856 bytes is over the limit of 4,096"),
        (b"\x00\x00\x00\x04junk", "a frame of 4 bytes is no message of ours"),
        (b"\x00\x00\x00\x00", "a frame of 0 bytes is no message of ours"),
        (b"", "did not finish its greeting within 0.05 s"),
        (b"\x00\x00\x00\x09half", "did not finish its greeting within 0.05 s"),
    ],
)
async def test_a_stranger_cannot_hold_the_line(
    garbage: bytes, told: str, socket_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smelt.transport.handshake.HANDSHAKE_SECONDS", 0.05)
    async with listen(socket_file, say_hello):
        stream = FrameStream(*await asyncio.open_unix_connection(socket_file))
        await stream.read(MAX_HANDSHAKE_BYTES)
        await stream.write(garbage)
        with pytest.raises(ConnectionClosed):
            await stream.read(1)
        await stream.close()
    assert told in caplog.text


async def test_tls_with_a_certificate_of_our_own(tmp_path: Path) -> None:
    certificate, private_key = write_certificate(tmp_path / "tls", "127.0.0.1")
    tls = server_tls(certificate, private_key)
    async with (
        listen("127.0.0.1:0", say_hello, key=KEY, tls=tls) as address,
        await connect(address, "worker", "w", key=KEY, tls=client_tls(certificate)) as connection,
    ):
        assert connection._stream._writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        assert await connection.receive() == Ping(1.5)
        with pytest.raises(TransportError, match="the key is wrong"):
            await connect(address, "worker", "w", key=OTHER_KEY, tls=client_tls(certificate))


async def test_the_end_of_a_listener_is_noticed_through_tls(tmp_path: Path) -> None:
    certificate, private_key = write_certificate(tmp_path / "tls", "127.0.0.1")
    async with listen("127.0.0.1:0", say_hello, tls=server_tls(certificate, private_key)) as address:
        connection = await connect(address, "worker", "w", tls=client_tls(certificate))
        assert await connection.receive() == Ping(1.5)
    with pytest.raises(ConnectionClosed):
        await connection.receive()
    await connection.close()


@pytest.mark.parametrize("wrong", ["another certificate", "another host", "no TLS"])
async def test_a_server_that_cannot_prove_who_it_is_is_left(wrong: str, tmp_path: Path) -> None:
    shown, private_key = write_certificate(tmp_path / "shown", "127.0.0.2" if wrong == "another host" else "127.0.0.1")
    other, _ = write_certificate(tmp_path / "other", "127.0.0.1")
    trusted = client_tls(other if wrong == "another certificate" else shown)
    tls: ssl.SSLContext | None = None if wrong == "no TLS" else server_tls(shown, private_key)
    async with listen("127.0.0.1:0", say_hello, key=KEY, tls=tls) as address:
        with pytest.raises(TransportError, match="cannot reach a server at"):
            await connect(address, "worker", "w", key=KEY, tls=trusted)
