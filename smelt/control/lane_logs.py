"""The log of a lane for the worker that goes on with it, and which part of it nobody will ask for again."""

from collections.abc import AsyncIterator

from smelt.errors import StorageError
from smelt.storage.futures import Ledger
from smelt.transport.failures import failure_of
from smelt.transport.messages import LogPart, LogWanted, SnapshotKept, SnapshotTaken
from smelt.transport.operations import LogEntry

PART_BYTES = 4 * 2**20  # of bodies in a message, unless a single one is larger: that one came in a message too


async def log_parts(ledger: Ledger, wanted: LogWanted) -> AsyncIterator[LogPart]:
    """What was asked for, in parts; the last one says so, or why there are no more."""
    entries: list[LogEntry] = []
    num_bytes = 0
    try:
        async for logged in ledger.log(wanted.lane, wanted.after, wanted.before):
            if entries and num_bytes + len(logged.request) > PART_BYTES:
                yield LogPart(wanted.lane, wanted.after, wanted.before, tuple(entries), is_last=False)
                entries, num_bytes = [], 0
            entries.append(LogEntry(logged.seq, logged.kind, logged.request, logged.failed))
            num_bytes += len(logged.request)
    except StorageError as damage:
        yield LogPart(wanted.lane, wanted.after, wanted.before, (), is_last=True, failure=failure_of(damage))
    else:
        yield LogPart(wanted.lane, wanted.after, wanted.before, tuple(entries), is_last=True)


async def keep_snapshot(ledger: Ledger, taken: SnapshotTaken) -> SnapshotKept:
    """Forget the log behind the snapshot before, for good: its worker removes older ones then."""
    await ledger.forget_log(taken.lane, taken.previous + 1, durable=True)
    return SnapshotKept(taken.lane, taken.seq)
