"""A session of many steps: what it keeps on the disk does not grow with them."""

from pathlib import Path

import pytest
from sqlalchemy import func, select

from lane_client import FOLDER, Client, loss_body, serving, workers, working
from smelt.cluster import lanes
from smelt.control.workers import Workers
from smelt.storage.futures import Ledger
from smelt.storage.tables import futures

__all__ = ["workers"]
pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STEPS = 500
AT_ONCE = 50
MAX_REPLAY_STEPS = 10
ROW_BYTES = 1024  # that a request leaves for good: its place and its fingerprint


def kept_bytes(ledger: Ledger) -> tuple[int, int]:
    """(of requests, of results) in the ledger."""
    with ledger._engine.connect() as connection:
        lengths = (func.sum(func.length(column)) for column in (futures.c.request, futures.c.result))
        requests, results = connection.execute(select(*lengths)).one()
    return requests or 0, results or 0


async def test_the_log_the_snapshots_and_the_database_stay_small(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "MAX_REPLAY_STEPS", MAX_REPLAY_STEPS)
    database, client, sizes = tmp_path / "smelt.db", Client(ledger), []
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        await client.results([await client.open()])
        for begin in range(0, NUM_STEPS, AT_ONCE):
            submitted = []
            for number in range(begin, begin + AT_ONCE):
                submitted += [await client.loss(number, num_data=1), await client.step()]
            await client.results(submitted)
            await ledger.expire(0.0)  # as a server does after a day
            with ledger._engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            sizes.append(database.stat().st_size)
        requests, results = kept_bytes(ledger)
    one = len(loss_body(client.lane, 0, num_data=1))
    assert results == 0
    assert requests <= (3 * MAX_REPLAY_STEPS + AT_ONCE) * (one + 64), "the log behind two snapshots is forgotten"
    assert len(list((tmp_path / FOLDER / "snapshots").iterdir())) <= 3  # two, and one that is being written
    grown = sizes[-1] - sizes[len(sizes) // 2]
    assert grown <= NUM_STEPS * ROW_BYTES, "half of the steps, two rows each"
