"""Workers that wait: each is woken by its own work, asked for once with each change, and left alone otherwise."""

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from smelt.errors import StaleEpoch, StorageError
from smelt.storage.database import open_database, sqlite_url
from smelt.storage.files import Files
from smelt.storage.futures import Granted, Ledger
from smelt.storage.transitions import Submission
from smelt.storage.writer import Writer

KINDS = ("step", "sample", "generate", "train")


@pytest.fixture
def ledger(engine: Engine, writer: Writer, files: Files) -> Ledger:
    return Ledger(engine, writer, files)


@pytest.fixture
def statements(engine: Engine) -> Iterator[Counter[str]]:
    """How many began with these words."""
    counts: Counter[str] = Counter()

    def count(_connection: object, _cursor: object, text: str, *_: object) -> None:
        counts[" ".join(text.split()[:2])] += 1

    event.listen(engine, "before_cursor_execute", count)
    yield counts
    event.remove(engine, "before_cursor_execute", count)


def step(seq: int, lane: str = "lane", kind: str = "step") -> Submission:
    return Submission("ann", kind, "f", b"", lane, seq)


async def wait_for_work(ledger: Ledger, epoch: int, *kinds: str) -> "asyncio.Task[list[Granted]]":
    """One who waits, and for whom the writer had nothing."""
    waiting = asyncio.create_task(ledger.next_grants(epoch, 10, kinds, KINDS))
    await asyncio.sleep(0)
    await ledger.open_epoch()  # the writer has answered what came before
    await asyncio.sleep(0)
    return waiting


def test_a_change_asks_only_for_those_who_wait_for_its_kind(
    ledger: Ledger, loop: asyncio.Runner, statements: Counter[str]
) -> None:
    async def scenario() -> list[Granted]:
        epoch = await ledger.open_epoch()
        waiting = {kind: await wait_for_work(ledger, epoch, kind) for kind in KINDS}
        statements.clear()
        await ledger.accept(step(1))
        granted = await waiting["step"]
        await ledger.finish(granted[0].id, epoch, b"")
        assert [kind for kind, task in waiting.items() if task.done()] == ["step"]
        return granted

    assert [row.seq for row in loop.run(scenario())] == [1]
    assert statements["WITH RECURSIVE"] == 2  # what is ready: with the acceptance, and with the result
    assert statements["SELECT epochs.closed,"] == 1  # of the one that may have it


def test_who_had_all_there_was_is_not_asked_for_before_something_changes(
    ledger: Ledger, loop: asyncio.Runner, statements: Counter[str]
) -> None:
    async def scenario() -> None:
        epoch = await ledger.open_epoch()
        await ledger.accept(step(1))
        assert len(await ledger.next_grants(epoch, 10, ("step",))) == 1
        statements.clear()
        waiting = await wait_for_work(ledger, epoch, "step")
        assert statements["SELECT epochs.closed,"] == 0
        await ledger.accept(step(2))
        assert [row.seq for row in await asyncio.wait_for(waiting, 5)] == [2]

    loop.run(scenario())


def test_who_had_as_much_as_it_wanted_is_asked_for_again(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> list[list[Granted]]:
        epoch = await ledger.open_epoch()
        for seq in (1, 2, 3):
            await ledger.accept(step(seq))
        return [await asyncio.wait_for(ledger.next_grants(epoch, limit, ("step",)), 5) for limit in (2, 1)]

    assert [[row.seq for row in rows] for rows in loop.run(scenario())] == [[1, 2], [3]]


def test_what_comes_while_the_writer_looks_is_not_missed(ledger: Ledger, writer: Writer, loop: asyncio.Runner) -> None:
    may_go_on = threading.Event()

    async def scenario() -> list[list[Granted]]:
        epochs = [await ledger.open_epoch() for _ in range(2)]
        writer.write(lambda _: may_go_on.wait(10))
        waiting = [asyncio.create_task(ledger.next_grants(epoch, 1, ("step",))) for epoch in epochs]
        await asyncio.sleep(0)  # both are asked for, behind what holds the writer up
        accepted = [asyncio.create_task(ledger.accept(step(1, lane))) for lane in "ab"]
        await asyncio.sleep(0)
        may_go_on.set()
        await asyncio.gather(*accepted)
        return await asyncio.wait_for(asyncio.gather(*waiting), 5)

    assert [len(rows) for rows in loop.run(scenario())] == [1, 1]


@pytest.mark.parametrize("is_looking", [True, False], ids=["while the writer looks", "while it waits"])
def test_who_waits_hears_that_its_connection_is_over(
    ledger: Ledger, writer: Writer, loop: asyncio.Runner, is_looking: bool
) -> None:
    may_go_on = threading.Event()

    async def scenario() -> None:
        over, other = await ledger.open_epoch(), await ledger.open_epoch()
        still_waits = await wait_for_work(ledger, other, "step")
        if is_looking:
            writer.write(lambda _: may_go_on.wait(10))
            waiting = asyncio.create_task(ledger.next_grants(over, 1, ("step",)))
            await asyncio.sleep(0)
        else:
            waiting = await wait_for_work(ledger, over, "step")
        release = asyncio.create_task(ledger.release(over))
        await asyncio.sleep(0)
        may_go_on.set()
        await release
        with pytest.raises(StaleEpoch, match="must connect again"):
            await asyncio.wait_for(waiting, 5)
        assert not still_waits.done()

    loop.run(scenario())


def test_who_waits_hears_that_the_database_is_closed(ledger: Ledger, writer: Writer, loop: asyncio.Runner) -> None:
    may_go_on = threading.Event()

    async def scenario() -> None:
        epoch = await ledger.open_epoch()
        writer.write(lambda _: may_go_on.wait(10))
        waiting = asyncio.create_task(ledger.next_grants(epoch, 1, ("step",)))
        await asyncio.sleep(0)
        accepted = asyncio.create_task(ledger.accept(step(1, kind="train")))
        await asyncio.sleep(0)
        may_go_on.set()
        writer.close()
        await accepted
        with pytest.raises(StorageError, match="going down"):
            await asyncio.wait_for(waiting, 5)

    loop.run(scenario())


def test_names_of_lanes_may_have_any_letters(ledger: Ledger, loop: asyncio.Runner) -> None:
    names = ["a'b", 'a"b', "a\\b", "ä\u2028", "a,b", "[]", "%s"]

    async def scenario() -> list[tuple[str | None, int | None]]:
        for name in names:
            for seq in (1, 2):
                await ledger.accept(step(seq, name))
        rows = await ledger.next_grants(await ledger.open_epoch(), 100, ("step",))
        return [(row.lane, row.seq) for row in rows]

    assert loop.run(scenario()) == [(name, seq) for seq in (1, 2) for name in names]


def test_no_request_has_a_whole_table_read(tmp_path: Path, loop: asyncio.Runner) -> None:
    engine = open_database(sqlite_url(tmp_path / "smelt.db"))
    asked: dict[str, Any] = {}

    def note(_connection: object, _cursor: object, text: str, parameters: object, *_: object) -> None:
        asked[text] = parameters

    async def scenario(ledger: Ledger) -> None:
        dying, epoch = await ledger.open_epoch(), await ledger.open_epoch()
        for seq in (1, 2):
            await ledger.accept(step(seq))
        await ledger.next_grants(dying, 1, ("step",))
        await ledger.release(dying)
        event.listen(engine, "before_cursor_execute", note)
        waiting = await wait_for_work(ledger, epoch, "generate")
        await ledger.accept(step(3))
        for _ in range(2):  # a suspect, and the others
            for row in await ledger.next_grants(epoch, 10, ("step",)):
                await ledger.finish(row.id, epoch, b"")
        event.remove(engine, "before_cursor_execute", note)
        waiting.cancel()

    with closing(Writer(engine)) as writer:
        loop.run(scenario(Ledger(engine, writer, Files(tmp_path / "bodies"))))
    plans = {}
    with engine.connect() as connection:
        for text, parameters in asked.items():
            if not text.startswith("BEGIN"):
                rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", parameters)
                plans[text] = [row.detail for row in rows]
    engine.dispose()
    assert len(plans) >= 12
    tables = re.compile("SCAN (futures|lanes|epochs|settled|successor|held|before)(?! USING INDEX ix_futures_suspect)")
    assert {text: plan for text, plan in plans.items() if any(map(tables.match, plan))} == {}
    oldest_first = next(plan for text, plan in plans.items() if "attempts = " in text)
    assert not any("TEMP B-TREE" in detail for detail in oldest_first), "it reads on when it has enough"
