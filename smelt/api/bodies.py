"""Request bodies on their way in: capped, unpacked and hurried; knows nothing of what is in them.

A body that is wrong is refused while it comes, before it is whole: the cap holds for what is unpacked, so that a
kilobyte cannot become a gigabyte.
"""

import asyncio
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import zstandard
from starlette.types import Message, Receive

from smelt.errors import InvalidInput, SlowBody, SmeltError, TooLarge, Unavailable, UnsupportedEncoding

PIECE_BYTES = 2**18
ZSTD_SLICE_BYTES = 256
ZSTD_WINDOW_BYTES = 2**27
# A body has this long, and a second more for each so many bytes of it that have come.
PATIENCE_S = 20.0
BYTES_PER_S = 2**13
# What the bodies of all requests in hand may hold together.
MAX_HELD_BYTES = 2**30
# The same of uploads, which hold room on the disk.
MAX_HELD_UPLOAD_BYTES = 2**35

Pieces = AsyncGenerator[bytes, None]


async def inflated(packed: AsyncIterator[bytes]) -> Pieces:
    """Unpack gzip or deflate, piece by piece. InvalidInput where it is broken or cut short."""
    inflate = None
    async for chunk in packed:
        while chunk:
            if inflate is None or inflate.eof:  # a gzip file may follow the end of another
                inflate = zlib.decompressobj(_window_bits(chunk))
            piece = _inflate(inflate, chunk)
            while piece:
                yield piece
                piece = b"" if inflate.eof else _inflate(inflate, inflate.unconsumed_tail)
            chunk = inflate.unused_data
    _check_whole(inflate is not None and inflate.eof)


def _window_bits(chunk: bytes) -> int:
    """47 takes gzip and zlib. "Deflate" also comes without zlib's header, and then hardly ever begins with its 8."""
    return 47 if chunk[0] == 0x1F or chunk[0] & 0x0F == 8 else -15


def _inflate(inflate: "zlib._Decompress", chunk: bytes) -> bytes:
    try:
        return inflate.decompress(chunk, PIECE_BYTES)
    except zlib.error as error:
        raise _broken(error) from None


async def unzstd(packed: AsyncIterator[bytes]) -> Pieces:
    """Unpack zstd, piece by piece. Only what goes in bounds what comes out: 128 KiB for each 4 bytes at most."""
    unpack = None
    async for chunk in packed:
        for start in range(0, len(chunk), ZSTD_SLICE_BYTES):
            part = chunk[start : start + ZSTD_SLICE_BYTES]
            while part:
                if unpack is None or unpack.eof:
                    unpack = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()
                if piece := _unzstd(unpack, part):
                    yield piece
                part = unpack.unused_data
    _check_whole(unpack is not None and unpack.eof)


def _unzstd(unpack: "zstandard.ZstdDecompressionObj", part: bytes) -> bytes:
    try:
        return unpack.decompress(part)
    except zstandard.ZstdError as error:
        raise _broken(error) from None


def _broken(error: Exception) -> InvalidInput:
    return InvalidInput(f"the body is not what its Content-Encoding says: {error}")


def _check_whole(is_whole: bool) -> None:
    if not is_whole:
        raise InvalidInput("the body is cut short: its Content-Encoding has no end")


UNPACKERS: dict[bytes, Callable[[AsyncIterator[bytes]], Pieces]] = {
    b"gzip": inflated,
    b"deflate": inflated,
    b"zstd": unzstd,
}


class Bodies:
    """What the bodies of all requests in hand have in common: their cap, the room left for them, and one clock.

    One timer looks after all that are waited for. A timeout for each would be the dearest part of a small request.
    """

    def __init__(
        self,
        max_bytes: int,
        patience_s: float = PATIENCE_S,
        max_held_bytes: int = MAX_HELD_BYTES,
        setting: str = "max_body_mb",
    ) -> None:
        self.max_bytes = max_bytes
        self._setting = setting
        self.patience_s = patience_s
        self.num_held_bytes = 0
        self._max_held_bytes = max(max_held_bytes, max_bytes)
        self._awaited: set[Body] = set()
        self._timer: asyncio.TimerHandle | None = None

    def await_more(self, body: "Body") -> None:
        """Look after a body until `has_more`: once its deadline has passed it is told to `give_up`."""
        self._awaited.add(body)
        if self._timer is None:
            self._start_timer()

    def has_more(self, body: "Body") -> None:
        """It is not waited for any longer."""
        self._awaited.discard(body)

    def _start_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(min(1.0, self.patience_s / 4), self._look)

    def _look(self) -> None:
        self._timer = None
        now = time.monotonic()
        for body in [body for body in self._awaited if body.deadline < now]:
            body.give_up()
        if self._awaited:
            self._start_timer()

    def hold(self, num_bytes: int) -> None:
        """Take room. Unavailable where there is none."""
        if self.num_held_bytes + num_bytes > self._max_held_bytes:
            raise Unavailable("this server holds as many request bodies as it can; send it again in a moment")
        self.num_held_bytes += num_bytes

    def check_length(self, announced: bytes | None) -> None:
        """Refuse a body by its Content-Length, before any of it has come."""
        if announced is None:
            return
        if not announced.isdigit():
            raise InvalidInput(f"{announced.decode('latin-1')!r} is no Content-Length")
        if int(announced) > self.max_bytes:
            raise self.too_large()

    def too_large(self) -> TooLarge:
        """The refusal of a body beyond the cap."""
        return TooLarge(f"the body is larger than {self.max_bytes:,} bytes (unpacked), the setting {self._setting}")


class Body:
    """The `receive` of a request with a body. `failure` is why it was refused, for handlers may hide the error."""

    __slots__ = (
        "_arriving", "_bodies", "_is_late", "_num_arrived", "_num_given", "_pieces", "_receive", "_task", "deadline",
        "failure",
    )  # fmt: skip

    def __init__(self, receive: Receive, bodies: Bodies, length: bytes | None, encoding: bytes) -> None:
        self.failure: SmeltError | None = None
        self.deadline = time.monotonic() + bodies.patience_s
        self._receive = receive
        self._bodies = bodies
        self._task: asyncio.Task[Any] | None = None  # that waits for more
        self._is_late = False
        self._arriving = True
        self._num_arrived = 0
        self._num_given = 0
        self._pieces: Pieces | None = None
        bodies.check_length(length)
        if encoding not in (b"", b"identity"):
            self._pieces = _unpacker(encoding)(self._chunks())

    def give_up(self) -> None:
        """Nobody waits for this body any longer: it took too long."""
        assert self._task is not None
        self._is_late = True
        self._task.cancel()

    async def __call__(self) -> Message:
        """The next message of the request, as ASGI has it."""
        if self._pieces is None and not self._arriving:
            return await self._receive()
        try:
            return await (self._next() if self._pieces is None else self._next_unpacked())
        except SmeltError as error:
            self.failure = error
            raise

    def release(self) -> None:
        """The request has ended, and with it what was held of its body."""
        self._bodies.num_held_bytes -= self._num_given

    async def _next(self) -> Message:
        message = await self._arrival()
        if message["type"] == "http.request":
            self._give(message.get("body", b""))
        return message

    async def _next_unpacked(self) -> Message:
        assert self._pieces is not None
        piece = await anext(self._pieces, b"")
        if not piece:
            self._pieces = None
            return {"type": "http.request", "body": b"", "more_body": False}
        self._give(piece)
        await asyncio.sleep(0)  # to unpack takes its time, and others shall not wait for all of it
        return {"type": "http.request", "body": piece, "more_body": True}

    async def _chunks(self) -> Pieces:
        """The body as it comes, still packed, and no longer than it might be unpacked."""
        while self._arriving:
            message = await self._arrival()
            if message["type"] != "http.request":
                return
            if self._num_arrived > self._bodies.max_bytes:
                raise self._bodies.too_large()
            yield message.get("body", b"")

    async def _arrival(self) -> Message:
        """The next message, or SlowBody; as with asyncio.timeout, a cancellation from elsewhere stays one."""
        self._task = task = asyncio.current_task()
        assert task is not None
        num_cancelling = task.cancelling()
        self._bodies.await_more(self)
        try:
            message = await self._receive()
        except asyncio.CancelledError:
            if self._is_late and task.uncancel() <= num_cancelling:
                raise SlowBody(f"the body came too slowly: {self._num_arrived:,} bytes so far; send it again") from None
            raise
        finally:
            self._bodies.has_more(self)
        num_bytes = len(message.get("body", b""))
        self._num_arrived += num_bytes
        self.deadline += num_bytes / BYTES_PER_S
        self._arriving = message["type"] == "http.request" and message.get("more_body", False)
        return message

    def _give(self, piece: bytes) -> None:
        if self._num_given + len(piece) > self._bodies.max_bytes:
            raise self._bodies.too_large()
        self._bodies.hold(len(piece))
        self._num_given += len(piece)


def _unpacker(encoding: bytes) -> Callable[[AsyncIterator[bytes]], Pieces]:
    unpacker = UNPACKERS.get(encoding.strip().lower())
    if unpacker is None:
        known = ", ".join(name.decode() for name in UNPACKERS)
        raise UnsupportedEncoding(f"cannot unpack {encoding.decode('latin-1')!r}; use one of: {known}")
    return unpacker
