"""Messages as frames on a byte stream: four bytes of big-endian length, then msgpack; knows no addresses or meaning.

A frame's size is checked before its body is read or sent, so a peer can make us hold one frame and no more.
"""

import asyncio
import struct
from typing import TypeVar

import msgspec

from smelt.errors import ConnectionClosed, TransportError
from smelt.transport.messages import Message

MAX_FRAME_BYTES = 64 * 2**20
CLOSE_SECONDS = 2.0  # for what was sent last to leave; a peer that does not read is left behind

_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()
_message_decoder = msgspec.msgpack.Decoder(Message)

T = TypeVar("T")


def encode_frame(message: msgspec.Struct, max_bytes: int = MAX_FRAME_BYTES) -> bytearray:
    """The frame of a message. TransportError where its body would exceed `max_bytes`."""
    frame = bytearray(_LENGTH.size)
    _encoder.encode_into(message, frame, _LENGTH.size)
    num_bytes = _checked_length(len(frame) - _LENGTH.size, max_bytes)
    _LENGTH.pack_into(frame, 0, num_bytes)
    return frame


def decode_message(body: bytes) -> Message:
    """The message of a frame's body. TransportError where it is none."""
    return decode_body(body, _message_decoder)


def decode_body(body: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """A frame's body as what the decoder expects. TransportError where it is something else."""
    try:
        return decoder.decode(body)
    except (ValueError, RecursionError) as error:  # bad msgpack, types or UTF-8; nesting without end
        raise TransportError(f"a frame of {len(body):,} bytes is no message of ours: {error}") from None


def _checked_length(num_bytes: int, max_bytes: int) -> int:
    if num_bytes > max_bytes:
        raise TransportError(f"a frame of {num_bytes:,} bytes is over the limit of {max_bytes:,}")
    return num_bytes


class FrameStream:
    """Reads and writes frames on one connection; one reader at a time, any number of writers.

    A read that is cancelled, by a timeout say, loses nothing: the next one goes on where it stopped. A frame whose
    write is cancelled leaves whole or not at all.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._num_expected: int | None = None  # of the body, while its prefix is read and the body is not
        self._write_turn = asyncio.Lock()

    async def read(self, max_bytes: int) -> bytes:
        """The body of the next frame. ConnectionClosed at the end of the stream, TransportError if it is oversize."""
        if self._num_expected is None:
            (self._num_expected,) = _LENGTH.unpack(await self._read_exactly(_LENGTH.size))
        body = await self._read_exactly(_checked_length(self._num_expected, max_bytes))
        self._num_expected = None
        return body

    async def _read_exactly(self, num_bytes: int) -> bytes:
        try:
            return await self._reader.readexactly(num_bytes)
        except asyncio.IncompleteReadError as end:
            self._writer.transport.abort()  # wakes those who wait to write to it
            is_inside = bool(end.partial) or self._num_expected is not None
            where = f"{num_bytes - len(end.partial):,} bytes before a frame's end" if is_inside else "between frames"
            raise ConnectionClosed(f"the peer is gone: the stream ended {where}") from None
        except OSError as error:
            raise ConnectionClosed(f"the peer is gone: {error}") from error

    async def write(self, frame: bytes | bytearray) -> None:
        """Send a frame once those before it are all but gone. ConnectionClosed where the peer is gone."""
        async with self._write_turn:  # one at a time: those who wait hold their own frames, the stream holds one
            await self._drain()
            self._writer.write(frame)
            await self._drain()

    async def _drain(self) -> None:
        try:
            if not self._writer.is_closing():
                await self._writer.drain()
        except OSError as error:
            raise ConnectionClosed(f"the peer is gone: {error}") from error
        if self._writer.is_closing():  # drain also returns when somebody hangs up meanwhile
            raise ConnectionClosed("the connection is closed")

    async def close(self) -> None:
        """Let what was sent leave, for CLOSE_SECONDS at most, then let go of the connection."""
        self._writer.close()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._writer.wait_closed()
        except (TimeoutError, OSError):
            self._writer.transport.abort()
