"""Every message survives the wire, and older or newer peers understand what they can."""

from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.errors import TransportError
from smelt.transport.frames import decode_message, encode_frame
from smelt.transport.messages import (
    Cancel,
    Classified,
    Classify,
    Embed,
    Embedded,
    Failure,
    Finish,
    Generate,
    Grant,
    Lend,
    Lent,
    LoadModel,
    LogPart,
    LogWanted,
    Message,
    Ping,
    Pong,
    Render,
    Rendered,
    Result,
    SnapshotKept,
    SnapshotTaken,
    TextChunk,
    UnloadModel,
    WorkerStatus,
)
from smelt.transport.operations import LogEntry
from smelt.types import ChatExample, ChatMessage, Conversation, Grammar, SamplingParams, TokenLogprob, ToolCall

PARAMS = SamplingParams(
    max_tokens=3, temperature=0.0, top_k=5, seed=7, stop=("\n", "end"), stop_token_ids=frozenset({2})
)
GUIDED = SamplingParams(logit_bias=((5, -100.0),), num_logprobs=2, grammar=Grammar("regex", "[0-9]+"))
TALK = Conversation([ChatMessage("user", "1+1?"), ChatMessage("assistant", "2")], [{"type": "function"}], {1: 0.5})
EXAMPLES = [
    Grant("f1", 3, "alice", "model-1", 4, "optim_step", 2, b"\x00\xff"),
    Grant("f2", 3, "alice", None, None, "completion"),
    Result("f1", 3, b"bytes"),
    Result("f1", 3, failure=Failure("InvalidInput", "the learning rate is -1: give one above 0")),
    Generate("r1", "bob", "gpt", "To be", params=PARAMS),
    Generate("r2", "bob", "gpt", (5, 6, 7), is_live=False),
    Generate("r3", "bob", "gpt", messages=(ChatMessage("user", "héllo \U0001f600"),)),
    Generate("r4", "bob", "gpt", "2 + 2 = ", num_samples=2, best_of=3, echo=True, adapter="sums", params=GUIDED),
    TextChunk("r1", " or", (30, 31)),
    TextChunk("r1", "4", (3,), 1, (TokenLogprob(3, b"4", -0.5, (TokenLogprob(3, b"4", -0.5),)),)),
    Finish("r1", "stop", 5, 20),
    Finish("r2", "aborted", 3, 0, Failure("NotFound", "there is no model 'gpt'")),
    Finish("r1", "stop", 5, 20, index=1, num_cached_tokens=4, tool_calls=(ToolCall("c1", "add", '{"a": 2}'),)),
    Embed("r5", "bob", "gpt", ("to be", (5, 6))),
    Embedded("r5", b"\x00\x00\x80\x3f", 1),
    Render("r8", "bob", "gpt", (ChatExample(TALK), ChatExample(TALK, [5], {"advantages": [0.5]}, TALK))),
    Rendered("r8", b"\x00\xff"),
    Classify("r9", "bob", "news", ("to be", "not to be")),
    Classified("r9", ("no", "yes"), b"\x00\x00\x80\x3f"),
    LoadModel("r6", "gpt"),
    UnloadModel("r7", "gpt"),
    Lend("r10", 2**40),
    Lent("r10", ("gpt", "news")),
    LogWanted("s:train:0", 4, 9),
    LogPart(
        "s:train:0", 4, 7, (LogEntry(5, "optim_step", b"x"), LogEntry(6, "forward_backward", b"", failed=True)), True
    ),
    SnapshotTaken("s:train:0", 8),
    SnapshotKept("s:train:0", 7),
    Cancel("r1"),
    Ping(12.5),
    Pong(12.5),
    WorkerStatus("cpu", ("gpt",), 2, 1, leaving=True),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was(message: Message) -> None:
    arrived = decode_message(bytes(encode_frame(message)[4:]))
    assert type(arrived) is type(message)
    assert arrived == message


def test_every_message_is_tried() -> None:
    assert {type(message) for message in EXAMPLES} == set(get_args(Message))


def test_a_field_that_is_new_there_is_passed_over_here() -> None:
    body = msgspec.msgpack.encode({"type": "Cancel", "request_id": "r1", "because": "the client left"})
    assert decode_message(body) == Cancel("r1")


def test_a_field_that_is_new_here_takes_its_default() -> None:
    body = msgspec.msgpack.encode({"type": "TextChunk", "request_id": "r1", "text": "a"})
    assert decode_message(body) == TextChunk("r1", "a", ())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"GET / HTTP/1.1",
        msgspec.msgpack.encode({"type": "Shutdown"}),
        msgspec.msgpack.encode({"type": "Cancel"}),
        msgspec.msgpack.encode({"type": "Cancel", "request_id": 5}),
        msgspec.msgpack.encode(Cancel("r1")) + b"more",
        msgspec.msgpack.encode({"type": "Cancel", "request_id": b"\xff"}).replace(b"\xc4\x01\xff", b"\xa1\xff"),
        b"\x81\xa6values\x81\xa1x" + b"\x91" * 100_000,
        b"\x82\xa4type\xa4Ping\xa6values\x81\xa1x" + b"\x91" * 100_000,
        b"\x82\xa4type\xa8Generate\xa6prompt\xdd\x0f\xff\xff\xff",
    ],
    ids=["empty", "http", "unknown", "incomplete", "type", "trailing", "utf-8", "untagged", "nested", "huge-list"],
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(TransportError, match=f"a frame of {len(body):,} bytes is no message of ours"):
        decode_message(body)


@given(st.binary(max_size=200), st.sampled_from(EXAMPLES), st.integers(0, 200))
def test_noise_is_a_message_or_is_refused(noise: bytes, message: Message, position: int) -> None:
    """Also noise inside what began as a message; nothing but TransportError comes out."""
    body = bytes(encode_frame(message)[4:])
    for mangled in (noise, body[:position] + noise + body[position + len(noise) :]):
        try:
            assert isinstance(decode_message(mangled), get_args(Message))
        except TransportError:
            continue
