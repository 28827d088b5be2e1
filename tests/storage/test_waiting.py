"""Waiting for a request: until its result or for a time, without reading its row where memory knows how it stands."""

import asyncio

import pytest
from sqlalchemy import Engine, event

from smelt.errors import NotFound
from smelt.storage import futures
from smelt.storage.futures import Ledger
from submissions import accept, step

STEPS = ("step",)


def test_who_can_do_without_the_body_waits_without_reading(
    ledger: Ledger, engine: Engine, loop: asyncio.Runner
) -> None:
    asked: list[str] = []

    async def scenario() -> None:
        epoch = await ledger.open_epoch()
        [accepted] = await accept(ledger, 1)
        await ledger.next_grants(epoch, 1, STEPS)
        event.listen(engine, "before_cursor_execute", lambda *each: asked.append(each[2]))
        waiting = [asyncio.create_task(ledger.wait("ann", accepted, 10, with_request=False)) for _ in range(2)]
        await asyncio.sleep(0)
        await ledger.finish(accepted, epoch, b"result")
        for future in await asyncio.wait_for(asyncio.gather(*waiting), 2):
            assert (future.kind, future.state, future.result) == ("step", "done", b"result")

    loop.run(scenario())
    assert asked
    assert not [text for text in asked if "futures.result_file" in text and text.startswith("SELECT")]


def test_what_is_remembered_is_as_the_rows_have_it(ledger: Ledger, engine: Engine, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        open_one, cancelled, forgotten = [await ledger.accept(step(1, lane)) for lane in ("a", "b", "c")]
        wrong = await ledger.accept(step(1, "wrong", failure=b"no"))
        await ledger.cancel("ann", cancelled)
        assert await accept(ledger, 1, lane="b") == [cancelled]  # again: it is no new one
        await ledger.forget_lane("c")
        assert await state(ledger, open_one) == "queued"
        assert await state(ledger, cancelled) == "cancelled"
        assert await state(ledger, wrong) == "failed"
        for owner, name in (("ann", forgotten), ("bob", open_one)):
            with pytest.raises(NotFound):
                await ledger.wait(owner, name, 0.01, with_request=False)

    async def state(ledger: Ledger, name: str) -> str:
        return (await ledger.wait("ann", name, 0.01, with_request=False)).state

    loop.run(scenario())


def test_more_are_open_than_are_remembered(
    ledger: Ledger, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(futures, "MAX_REMEMBERED", 2)

    async def scenario() -> None:
        epoch = await ledger.open_epoch()
        accepted = await accept(ledger, 1, 2, 3)
        assert list(ledger._open) == accepted[1:]
        waiting = [asyncio.create_task(ledger.wait("ann", name, 10, with_request=False)) for name in accepted]
        for row in await ledger.next_grants(epoch, 10, STEPS):
            await ledger.finish(row.id, epoch, b"result")
        assert [each.state for each in await asyncio.wait_for(asyncio.gather(*waiting), 5)] == ["done"] * 3
        assert not ledger._open

    loop.run(scenario())


@pytest.mark.parametrize("category", [None, "user"])
def test_who_waits_is_woken_by_the_result(ledger: Ledger, loop: asyncio.Runner, category: str | None) -> None:
    async def scenario() -> None:
        epoch = await ledger.open_epoch()
        [accepted] = await accept(ledger, 1)
        waiting = [asyncio.create_task(ledger.wait("ann", accepted, 10)) for _ in range(3)]
        await ledger.next_grants(epoch, 1, STEPS)
        await ledger.finish(accepted, epoch, b"result", category)
        for future in await asyncio.wait_for(asyncio.gather(*waiting), 2):
            assert (future.state, future.result) == ("failed" if category else "done", b"result")
        assert (await ledger.wait("ann", accepted, 0)).result == b"result"

    loop.run(scenario())


def test_waiting_ends_with_its_time(ledger: Ledger, loop: asyncio.Runner) -> None:
    [accepted] = loop.run(accept(ledger, 1))
    assert loop.run(ledger.wait("ann", accepted, 0.01)).state == "queued"
    assert not ledger._waiting
