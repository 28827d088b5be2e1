"""What the ledger keeps for sessions: logs to replay, places that fail at once, rows beside a request."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from smelt.errors import StorageError
from smelt.storage import records
from smelt.storage.files import Files
from smelt.storage.futures import MAX_INLINE, Ledger, Logged
from smelt.storage.records import Model
from smelt.storage.transitions import Submission
from smelt.storage.writer import Operation, Writer

KINDS = ("step",)
MODEL = Model(owner="ann", id="m", created=1.0, name="gpt", path="gpt")


def step(seq: int | None, request: bytes = b"", **changes: Any) -> Submission:
    values = {"owner": "ann", "kind": "step", "fingerprint": "same", "request": request, "lane": "lane", "seq": seq}
    return Submission(**(values | changes))


async def do(ledger: Ledger, *, category: str | None = None) -> list[int | None]:
    """Finish what there is to do; its seqs."""
    epoch = await ledger.open_epoch()
    granted = await ledger.next_grants(epoch, 100, KINDS)
    for row in granted:
        await ledger.finish(row.id, epoch, b"did", category, durable=False)
    return [row.seq for row in granted]


async def log_of(ledger: Ledger, after: int, before: int) -> list[Logged]:
    return [each async for each in ledger.log("lane", after, before)]


def test_a_log_has_what_was_asked_in_its_order(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        large = b"x" * (MAX_INLINE + 1)
        for seq, request in ((2, b"b"), (1, b"a"), (4, large), (3, b"c")):
            await ledger.accept(step(seq, request))
        assert await do(ledger) == [1, 2, 3, 4]
        assert await log_of(ledger, 0, 4) == [Logged(seq, "step", bytes([96 + seq]), False) for seq in (1, 2, 3)]
        assert await log_of(ledger, 2, 100) == [Logged(3, "step", b"c", False), Logged(4, "step", large, False)]
        assert await log_of(ledger, 4, 100) == []

    loop.run(scenario())


def test_a_long_log_is_read_to_its_end(ledger: Ledger, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smelt.storage.futures.LOG_ROWS", 2)

    async def scenario() -> None:
        await asyncio.gather(*[ledger.accept(step(seq)) for seq in range(1, 8)])
        assert [each.seq for each in await log_of(ledger, 1, 7)] == [2, 3, 4, 5, 6]

    loop.run(scenario())


def test_what_was_forgotten_is_not_replayed_and_still_answers(
    ledger: Ledger, files: Files, loop: asyncio.Runner
) -> None:
    async def scenario() -> None:
        accepted = [await ledger.accept(step(seq, b"x" * (MAX_INLINE + seq))) for seq in (1, 2, 3)]
        assert await do(ledger) == [1, 2, 3]
        await ledger.accept(step(4, b"d"))
        assert await ledger.forget_log("lane", 3) == 2
        assert await ledger.forget_log("lane", 3) == 0
        assert [each.seq for each in await log_of(ledger, 2, 9)] == [3, 4]
        with pytest.raises(StorageError, match="up to seq 1 was forgotten"):
            await log_of(ledger, 0, 9)
        assert await ledger.accept(step(1, b"x" * (MAX_INLINE + 1))) == accepted[0]
        assert (await ledger.read("ann", accepted[0])).result == b"did"
        assert await ledger.forget_log("lane", 9) == 1, "what is still to be done stays"

    loop.run(scenario())


def test_a_place_that_fails_at_once_is_taken_and_passed_over(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        await ledger.accept(step(3))
        wrong = await ledger.accept(step(2, b"?", failure=b"no"))
        future = await ledger.read("ann", wrong)
        assert (future.state, future.category, future.result) == ("failed", "user", b"no")
        assert await ledger.accept(step(2)) == wrong
        await ledger.accept(step(1, failure=b"neither"))
        assert await do(ledger) == [3]
        assert await log_of(ledger, 0, 4) == [
            Logged(1, "step", b"", True),
            Logged(2, "step", b"?", True),
            Logged(3, "step", b"", False),
        ]

    loop.run(scenario())


def test_what_has_no_seq_comes_behind_all_others(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        await ledger.accept(step(0, first_seq=0))
        accepted = [await ledger.accept(step(None)) for _ in range(2)]
        assert [(await ledger.read("ann", each)).seq for each in accepted] == [1, 2]
        await ledger.accept(step(7))
        last = await ledger.accept(step(None, failure=b"no"))
        assert (await ledger.read("ann", last)).seq == 8
        first = await ledger.accept(step(None, lane="another", first_seq=1))
        assert (await ledger.read("ann", first)).seq == 1

    loop.run(scenario())


def test_a_failure_without_an_order_is_no_ones_work(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        for lane in ("samples", None):
            accepted = await ledger.accept(step(9, lane=lane, first_seq=None, failure=b"no"))
            assert (await ledger.wait("ann", accepted, 5)).state == "failed"
        await ledger.accept(step(8, lane="samples", first_seq=None))
        assert await do(ledger) == [8]

    loop.run(scenario())


def add_model(connection: Connection, future_id: str) -> None:
    records.add(connection, MODEL)


def models(engine: Engine) -> list[Model]:
    with engine.connect() as connection:
        return records.find(connection, Model, "ann")


def test_what_belongs_to_a_request_is_written_with_it_once(
    ledger: Ledger, engine: Engine, loop: asyncio.Runner
) -> None:
    async def scenario() -> None:
        accepted = {await ledger.accept(step(1), add_model) for _ in range(3)}
        assert len(accepted) == 1
        assert models(engine) == [MODEL]

    loop.run(scenario())


def test_what_cannot_be_written_fails_the_request_or_undoes_it(
    ledger: Ledger, engine: Engine, loop: asyncio.Runner
) -> None:
    def refuse(connection: Connection, future_id: str) -> bytes:
        return b"taken"

    def break_off(connection: Connection, future_id: str) -> None:
        add_model(connection, future_id)
        raise RuntimeError("a bug")

    async def scenario() -> None:
        with pytest.raises(RuntimeError):
            await ledger.accept(step(1), break_off)
        assert models(engine) == []
        refused = await ledger.accept(step(1), refuse)
        assert (await ledger.read("ann", refused)).result == b"taken"

    loop.run(scenario())


def test_only_a_durable_result_waits_for_the_disk(
    ledger: Ledger, writer: Writer, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[bool] = []
    submit: Callable[[list[Operation]], None] = writer.submit

    def note(operations: list[Operation]) -> None:
        submitted.append(any(operation.durable for operation in operations))
        submit(operations)

    async def scenario() -> None:
        for seq in (1, 2):
            await ledger.accept(step(seq))
        epoch = await ledger.open_epoch()
        first, second = await ledger.next_grants(epoch, 2, KINDS)
        monkeypatch.setattr(writer, "submit", note)
        await ledger.finish(first.id, epoch, b"", durable=False)
        await ledger.finish(second.id, epoch, b"")
        assert submitted == [False, True]

    loop.run(scenario())
