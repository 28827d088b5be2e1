"""The first words of a connection: versions, who dials in, and proof that both know the key; knows no work.

    listener -> Challenge(protocol, nonce)
    dialler  -> Hello(protocol, role, name, nonce, proof)
    listener -> Welcome(epoch, proof)  or  Refused(reason)

A proof is an HMAC over both nonces and the side that makes it, so that it serves once and cannot be turned around.
The key never travels. The fields of these four types stay as they are in every version, so that peers of different
versions can tell each other so.
"""

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec

from smelt.errors import ConfigError, TransportError
from smelt.transport.frames import FrameStream, decode_body, encode_frame

PROTOCOL_VERSION = 3
HANDSHAKE_SECONDS = 10.0
MAX_HANDSHAKE_BYTES = 4096  # of a frame: a stranger cannot make us hold more
MIN_KEY_BYTES = 16

Role = Literal["worker", "launcher"]
NextEpoch = Callable[[], Awaitable[int]]


class Challenge(msgspec.Struct, frozen=True, tag=True):
    """The listener's first frame."""

    protocol: int
    nonce: bytes


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Who dials in."""

    protocol: int
    role: str
    name: str  # for people: host and process
    nonce: bytes
    proof: bytes  # empty without a key


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The connection stands, under this epoch."""

    epoch: int
    proof: bytes  # empty without a key


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The connection is not wanted; the listener closes it."""

    reason: str


_challenge_decoder = msgspec.msgpack.Decoder(Challenge)
_hello_decoder = msgspec.msgpack.Decoder(Hello)
_verdict_decoder = msgspec.msgpack.Decoder(Welcome | Refused)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is at the dialling end, and under which epoch. Both ends hold the same."""

    role: Role
    name: str
    epoch: int


async def admit(stream: FrameStream, key: bytes | None, next_epoch: NextEpoch) -> Identity:
    """The listener's side: admit who knows the key, with the next epoch.

    TransportError says why somebody was refused; they were told, too.
    """
    async with _patience("the peer that dialled in"):
        nonce = secrets.token_bytes(32)
        await _write(stream, Challenge(PROTOCOL_VERSION, nonce))
        hello = await _read(stream, _hello_decoder)
        try:
            role = _checked_role(hello, nonce, key)
        except TransportError as refusal:
            await _write(stream, Refused(str(refusal)))
            raise
        identity = Identity(role, hello.name, await next_epoch())
        await _write(stream, Welcome(identity.epoch, _proof(key, "listener", nonce, hello.nonce)))
        return identity


async def introduce(stream: FrameStream, role: Role, name: str, key: bytes | None) -> Identity:
    """The dialler's side. TransportError where the listener refuses us, or cannot show that it knows the key."""
    async with _patience("the server"):
        challenge = await _read(stream, _challenge_decoder)
        _check_version(challenge.protocol)
        nonce = secrets.token_bytes(32)
        proof = _proof(key, "dialler", challenge.nonce, nonce)
        await _write(stream, Hello(PROTOCOL_VERSION, role, name, nonce, proof))
        verdict = await _read(stream, _verdict_decoder)
        if isinstance(verdict, Refused):
            raise TransportError(f"the server refused the connection: {verdict.reason}")
        if not hmac.compare_digest(verdict.proof, _proof(key, "listener", challenge.nonce, nonce)):
            raise TransportError("the server does not know our key: it is another server, or has another key")
        return Identity(role, name, verdict.epoch)


def check_key(key: bytes | None) -> None:
    """ConfigError for a key that could be guessed."""
    if key is not None and len(key) < MIN_KEY_BYTES:
        raise ConfigError(f"a key of {len(key)} bytes can be guessed: use {MIN_KEY_BYTES} random bytes or more")


def _checked_role(hello: Hello, nonce: bytes, key: bytes | None) -> Role:
    _check_version(hello.protocol)
    if not hmac.compare_digest(hello.proof, _proof(key, "dialler", nonce, hello.nonce)):
        raise TransportError(_wrong_key(hello, key))
    match hello.role:
        case "worker" | "launcher":
            return hello.role
    raise TransportError(f"there is no role {hello.role!r}: only worker and launcher dial in")


def _wrong_key(hello: Hello, key: bytes | None) -> str:
    if key is None:
        return "this server has no key: dial in without one"
    return "the key is wrong" if hello.proof else "this server needs a key"


def _check_version(theirs: int) -> None:
    if theirs != PROTOCOL_VERSION:
        raise TransportError(
            f"the other side speaks protocol {theirs}, this one {PROTOCOL_VERSION}: run the same smelt on both"
        )


def _proof(
    key: bytes | None, side: Literal["listener", "dialler"], listener_nonce: bytes, dialler_nonce: bytes
) -> bytes:
    """Empty without a key. The nonces' lengths are part of it, so that their border cannot be moved."""
    if key is None:
        return b""
    text = msgspec.msgpack.encode(["smelt", side, listener_nonce, dialler_nonce])
    return hmac.digest(key, text, "sha256")


async def _read(stream: FrameStream, decoder: msgspec.msgpack.Decoder[T]) -> T:
    return decode_body(await stream.read(MAX_HANDSHAKE_BYTES), decoder)


async def _write(stream: FrameStream, greeting: msgspec.Struct) -> None:
    await stream.write(encode_frame(greeting, MAX_HANDSHAKE_BYTES))


@asynccontextmanager
async def _patience(peer: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            yield
    except TimeoutError:
        raise TransportError(f"{peer} did not finish its greeting within {HANDSHAKE_SECONDS:g} s") from None
