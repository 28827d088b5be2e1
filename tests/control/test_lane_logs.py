"""The log of a lane in parts, and what is forgotten behind snapshots."""

import pytest

from smelt.control import lane_logs
from smelt.control.lane_logs import keep_snapshot, log_parts
from smelt.errors import StorageError
from smelt.storage.futures import Ledger
from smelt.storage.transitions import Submission
from smelt.transport.failures import error_of
from smelt.transport.messages import LogWanted, SnapshotKept, SnapshotTaken

pytestmark = pytest.mark.anyio

LANE = "s:train:0"


async def accept(ledger: Ledger, num: int) -> None:
    for seq in range(num):
        await ledger.accept(Submission("ann", "optim_step", str(seq), bytes([seq]) * 10, LANE, seq, 0))


async def test_a_log_comes_in_parts_in_its_order(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_logs, "PART_BYTES", 25)
    await accept(ledger, 7)
    parts = [part async for part in log_parts(ledger, LogWanted(LANE, 0, 6))]
    assert [[entry.seq for entry in part.entries] for part in parts] == [[1, 2], [3, 4], [5]]
    assert [part.is_last for part in parts] == [False, False, True]
    assert parts[0].entries[0].body == b"\1" * 10


async def test_a_snapshot_lets_the_log_up_to_the_one_before_be_forgotten(ledger: Ledger) -> None:
    await accept(ledger, 6)
    epoch = await ledger.open_epoch()
    for row in await ledger.next_grants(epoch, 9, ("optim_step",)):
        await ledger.finish(row.id, epoch, b"")
    assert await keep_snapshot(ledger, SnapshotTaken(LANE, 4, previous=2)) == SnapshotKept(LANE, 4)
    [part] = [part async for part in log_parts(ledger, LogWanted(LANE, 2, 6))]
    assert [entry.seq for entry in part.entries] == [3, 4, 5]
    [lost] = [part async for part in log_parts(ledger, LogWanted(LANE, 1, 6))]
    assert lost.is_last
    assert lost.failure is not None
    assert isinstance(error_of(lost.failure), StorageError)
