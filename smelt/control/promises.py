"""Promises of operations and samples, and what became of them; knows no HTTP and opens no result.

What was done is given as the worker wrote it, as often as it is asked for. A failure is a result like any other.
"""

from dataclasses import dataclass

import msgspec

from smelt.errors import NotFound
from smelt.storage.futures import Future, Ledger
from smelt.storage.transitions import FINISHED
from smelt.transport.messages import Failure
from smelt.transport.operations import SAMPLE, TRAINING_KINDS

PROTOBUF_KINDS = ("forward_backward", SAMPLE)
KINDS = (*TRAINING_KINDS, SAMPLE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a promise: a body, JSON unless it `is_protobuf`."""

    body: bytes
    is_protobuf: bool


async def outcome(ledger: Ledger, owner: str, promise_id: str, wait_s: float) -> Outcome | None:
    """What became of a promise; None where that is open after so long a wait. NotFound where the owner has none."""
    future = await ledger.wait(owner, promise_id, wait_s, with_request=False)
    if future.kind not in KINDS:
        raise NotFound(f"there is no request {promise_id[:200]!r}")
    return _ended(future) if future.state in FINISHED else None


def _ended(future: Future) -> Outcome:
    if future.state == "done" and not future.expired and future.result is not None:
        return Outcome(future.result, future.kind in PROTOBUF_KINDS)
    message, category = _reason(future)
    return Outcome(msgspec.json.encode({"error": message, "category": category}), is_protobuf=False)


def _reason(future: Future) -> tuple[str, str]:
    """Why there is nothing to give, and whose fault it is."""
    if future.expired:
        return "result expired", "user"
    if future.state == "cancelled":
        return "it was cancelled", "user"
    if not future.result:
        return f"{future.attempts} workers died over this request; ask for less", future.category or "server"
    return msgspec.msgpack.decode(future.result, type=Failure).message, future.category or "server"
