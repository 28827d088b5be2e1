"""Frames arrive whole however the bytes are cut, and a stream that is wrong or ends is found out."""

import asyncio
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.errors import ConnectionClosed, TransportError
from smelt.transport.frames import MAX_FRAME_BYTES, FrameStream, decode_message, encode_frame
from smelt.transport.messages import Cancel, Message, Result, TextChunk

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

texts = st.text(max_size=40)
messages = st.one_of(
    st.builds(Cancel, texts),
    st.builds(TextChunk, texts, texts, st.lists(st.integers(0, 2**31), max_size=5).map(tuple)),
    st.builds(Result, texts, st.integers(0, 2**62), st.binary(max_size=300)),
)


async def stream_and_far_end() -> tuple[FrameStream, socket.socket]:
    """A FrameStream, and the bare socket at its other end."""
    near_end, far_end = socket.socketpair()
    far_end.setblocking(False)
    return FrameStream(*await asyncio.open_connection(sock=near_end)), far_end


async def read_all(pieces: list[bytes], num_messages: int) -> list[Message]:
    """What a FrameStream makes of pieces that arrive one by one, with time to look at each."""
    stream, far_end = await stream_and_far_end()

    async def feed() -> None:
        for piece in pieces:
            await asyncio.get_running_loop().sock_sendall(far_end, piece)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(feed())
        found = [decode_message(await stream.read(MAX_FRAME_BYTES)) for _ in range(num_messages)]
    far_end.close()
    await stream.close()
    return found


@given(st.lists(messages, max_size=6), st.data())
def test_frames_cut_anywhere_arrive_whole(sent: list[Message], data: st.DataObject) -> None:
    whole = b"".join(encode_frame(message) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert asyncio.run(read_all(pieces, len(sent))) == sent


async def test_a_frame_that_comes_byte_by_byte() -> None:
    message = Result("f1", 2, bytes(range(50)))
    assert await read_all([bytes([byte]) for byte in encode_frame(message)], 1) == [message]


async def test_a_read_that_is_cancelled_anywhere_loses_nothing() -> None:
    stream, far_end = await stream_and_far_end()
    sent = [Cancel("first"), Cancel("second")]
    found = []
    for byte in b"".join(encode_frame(message) for message in sent):
        far_end.send(bytes([byte]))
        reading = asyncio.create_task(stream.read(100))
        await asyncio.sleep(0.001)
        if reading.done():
            found.append(decode_message(reading.result()))
        reading.cancel()
    assert found == sent
    far_end.close()
    await stream.close()


def test_a_frame_begins_with_its_length() -> None:
    frame = encode_frame(Cancel("r1"))
    assert frame[:4] == (len(frame) - 4).to_bytes(4, "big")


def test_a_message_too_large_for_a_frame_is_not_sent() -> None:
    body_size = len(encode_frame(Cancel("r1"))) - 4
    assert encode_frame(Cancel("r1"), body_size)
    with pytest.raises(TransportError, match=f"a frame of {body_size} bytes is over the limit of {body_size - 1}"):
        encode_frame(Cancel("r1"), body_size - 1)


async def test_an_oversize_frame_is_refused_by_its_first_four_bytes() -> None:
    stream, far_end = await stream_and_far_end()
    far_end.send((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(TransportError, match="67,108,865 bytes is over the limit of 67,108,864"):
        await stream.read(MAX_FRAME_BYTES)
    with pytest.raises(TransportError, match="over the limit"):  # and it is not forgotten
        await stream.read(MAX_FRAME_BYTES)
    far_end.close()
    await stream.close()


@pytest.mark.parametrize(
    ("num_bytes", "told"),
    [(0, "between frames"), (2, "2 bytes before a frame's end"), (4, "27 bytes before"), (30, "1 bytes before")],
)
async def test_a_stream_that_ends_says_where(num_bytes: int, told: str) -> None:
    stream, far_end = await stream_and_far_end()
    frame = encode_frame(Cancel("r1"))
    assert len(frame) == 31
    far_end.send(frame[:num_bytes])
    far_end.close()
    with pytest.raises(ConnectionClosed, match=told):
        await stream.read(100)
    with pytest.raises(ConnectionClosed):
        await stream.write(frame)
    await stream.close()


async def test_a_write_waits_for_its_reader_and_wakes_when_the_reader_dies() -> None:
    stream, far_end = await stream_and_far_end()
    frame = encode_frame(Result("f1", 1, bytes(2**22)))
    writes = [asyncio.create_task(stream.write(frame)) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert not any(write.done() for write in writes)
    far_end.close()
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ConnectionClosed] * 3
    await stream.close()


async def test_a_reader_that_reads_nothing_cannot_hold_up_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smelt.transport.frames.CLOSE_SECONDS", 0.05)
    stream, far_end = await stream_and_far_end()
    write = asyncio.create_task(stream.write(encode_frame(Result("f1", 1, bytes(2**22)))))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        await stream.close()
    with pytest.raises(ConnectionClosed):
        await write
    far_end.close()
