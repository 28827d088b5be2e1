"""The ledger: what is accepted stays, each place is taken once, turns are kept, and only the holder may answer."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import Engine, func, select

from smelt.errors import NotFound, SeqAbandoned, SeqReused, StaleEpoch
from smelt.storage import tables
from smelt.storage.files import Files
from smelt.storage.futures import MAX_INLINE, Granted, Ledger
from smelt.storage.transitions import Submission, future_id
from smelt.storage.writer import Writer
from submissions import accept, step

STEPS = ("step",)


async def has_nothing(ledger: Ledger, epoch: int) -> bool:
    try:
        await asyncio.wait_for(ledger.next_grants(epoch, 10, STEPS), 0.05)
    except TimeoutError:
        return True
    return False


def seqs(granted: list[Granted]) -> list[int | None]:
    return [row.seq for row in granted]


def count(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(tables.futures)).scalar_one()


def test_a_request_goes_its_way(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        accepted = await ledger.accept(step(1, request=b"do"))
        assert (await ledger.read("ann", accepted)).state == "queued"
        epoch = await ledger.open_epoch()
        [granted] = await ledger.next_grants(epoch, 10, STEPS)
        assert granted == Granted(accepted, "ann", "step", "lane", 1, 0, b"do")
        assert (await ledger.read("ann", accepted)).state == "granted"
        await ledger.finish(accepted, epoch, b"did")
        future = await ledger.read("ann", accepted)
        assert (future.state, future.result, future.category) == ("done", b"did", None)

    loop.run(scenario())


def test_the_id_is_that_of_the_place(ledger: Ledger, loop: asyncio.Runner) -> None:
    assert loop.run(ledger.accept(step(7))) == future_id("lane", 7)
    assert len({future_id(lane, seq) for lane, seq in [("a", 1), ("a", 11), ("a:1", 1), ("1:a", 1), ("b", 1)]}) == 5


def test_the_same_request_again_is_the_same_future(ledger: Ledger, engine: Engine, loop: asyncio.Runner) -> None:
    assert len(set(loop.run(accept(ledger, *[1] * 32)))) == 1
    assert count(engine) == 1


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"kind": "other"}])
def test_another_request_in_its_place_is_refused(ledger: Ledger, loop: asyncio.Runner, change: dict[str, str]) -> None:
    first = loop.run(ledger.accept(step(1, request=b"first")))
    with pytest.raises(SeqReused, match="seq 1 of lane was another request"):
        loop.run(ledger.accept(step(1, **change)))
    assert loop.run(ledger.read("ann", first)).state == "queued"


def test_a_refused_one_takes_nobody_with_it(ledger: Ledger, engine: Engine, loop: asyncio.Runner) -> None:
    async def scenario() -> list[Any]:
        await accept(ledger, 1)
        mixed = [step(1, fingerprint="other") if number % 2 else step(number) for number in range(2, 22)]
        return await asyncio.gather(*map(ledger.accept, mixed), return_exceptions=True)

    outcomes = loop.run(scenario())
    assert [type(outcome) for outcome in outcomes] == [str, SeqReused] * 10
    assert count(engine) == 11


def test_without_a_lane_each_request_is_new(ledger: Ledger, engine: Engine, loop: asyncio.Runner) -> None:
    async def scenario() -> set[str]:
        return {await ledger.accept(step(None, lane=None)) for _ in range(3)}

    assert len(loop.run(scenario())) == count(engine) == 3


def test_an_unordered_lane_knows_its_requests_but_no_turns(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> list[int | None]:
        for seq in (1_000_000_000, 0, 5, 5):
            await ledger.accept(step(seq, first_seq=None))
        return seqs(await ledger.next_grants(await ledger.open_epoch(), 10, STEPS))

    assert loop.run(scenario()) == [1_000_000_000, 0, 5]


def test_an_owner_sees_only_what_is_theirs(ledger: Ledger, loop: asyncio.Runner) -> None:
    accepted = loop.run(ledger.accept(step(1)))
    for question in (ledger.read, ledger.cancel, lambda *who: ledger.wait(*who, timeout_s=0)):
        with pytest.raises(NotFound):
            loop.run(question("bob", accepted))
    for seq in (1, 2):
        with pytest.raises(NotFound):
            loop.run(ledger.accept(step(seq, owner="bob")))


def test_turns_are_kept_whatever_came_first(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        epoch = await ledger.open_epoch()
        await accept(ledger, 3, 2)
        assert await has_nothing(ledger, epoch)
        await accept(ledger, 1)
        assert seqs(await ledger.next_grants(epoch, 2, STEPS)) == [1, 2]
        assert seqs(await ledger.next_grants(epoch, 2, STEPS)) == [3]

    loop.run(scenario())


def test_lanes_take_turns(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> list[Granted]:
        await accept(ledger, *range(1, 6), lane="greedy")
        await accept(ledger, 1, lane="modest")
        return await ledger.next_grants(await ledger.open_epoch(), 3, STEPS)

    assert [(row.lane, row.seq) for row in loop.run(scenario())] == [("greedy", 1), ("modest", 1), ("greedy", 2)]


def test_a_lane_has_one_holder_at_a_time(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        ann, bob = await ledger.open_epoch(), await ledger.open_epoch()
        first, _ = await accept(ledger, 1, 2)
        assert seqs(await ledger.next_grants(ann, 1, STEPS)) == [1]
        waiting = asyncio.create_task(ledger.next_grants(bob, 1, STEPS))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await ledger.finish(first, ann, b"")
        await asyncio.sleep(0.02)
        assert not waiting.done()  # ann has in memory what the first has made
        await ledger.release(ann, died=False)
        assert seqs(await waiting) == [2]

    loop.run(scenario())


def test_a_waiting_worker_is_woken_by_a_request(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        waiting = asyncio.create_task(ledger.next_grants(await ledger.open_epoch(), 10, STEPS))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        [accepted] = await accept(ledger, 1)
        assert [row.id for row in await asyncio.wait_for(waiting, 2)] == [accepted]

    loop.run(scenario())


def test_a_worker_that_stopped_waiting_gets_nothing(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        gone, here = await ledger.open_epoch(), await ledger.open_epoch()
        assert await has_nothing(ledger, gone)
        await accept(ledger, 1)
        assert seqs(await ledger.next_grants(here, 1, STEPS)) == [1]

    loop.run(scenario())


def test_only_the_holder_may_answer(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        old, new = await ledger.open_epoch(), await ledger.open_epoch()
        [accepted] = await accept(ledger, 1)
        await ledger.next_grants(old, 1, STEPS)
        await ledger.release(old)
        assert seqs(await ledger.next_grants(new, 1, STEPS)) == [1]
        with pytest.raises(StaleEpoch, match=f"not in the hands of epoch {old}"):
            await ledger.finish(accepted, old, b"old")
        await ledger.finish(accepted, new, b"new")
        with pytest.raises(StaleEpoch):
            await ledger.finish(accepted, new, b"again")
        assert (await ledger.read("ann", accepted)).result == b"new"
        with pytest.raises(StaleEpoch, match="must connect again"):
            await ledger.next_grants(old, 1, STEPS)

    loop.run(scenario())


def test_what_a_dead_worker_held_comes_again_in_order(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> list[int | None]:
        dead, alive = await ledger.open_epoch(), await ledger.open_epoch()
        await accept(ledger, 1, 2, 3, 4)
        assert seqs(await ledger.next_grants(dead, 3, STEPS)) == [1, 2, 3]
        await ledger.release(dead)
        done = []
        for _ in range(4):
            [granted] = await ledger.next_grants(alive, 10, STEPS)
            await ledger.finish(granted.id, alive, b"")
            done.append(granted.seq)
        return done

    assert loop.run(scenario()) == [1, 2, 3, 4]


def test_poison_fails_the_third_time_and_alone(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> list[str]:
        ids = [await ledger.accept(step(1, lane=f"lane {number}")) for number in range(5)]
        poison = ids[2]
        waiting = asyncio.create_task(ledger.wait("ann", poison, 5))
        num_deaths = 0
        while not waiting.done():
            epoch = await ledger.open_epoch()
            while True:
                granted = await ledger.next_grants(epoch, 10, STEPS)
                if any(row.id == poison for row in granted):
                    break
                for row in granted:
                    await ledger.finish(row.id, epoch, b"")
            await ledger.release(epoch)
            num_deaths += 1
            await asyncio.sleep(0.05 if num_deaths == 3 else 0)
        failed = await waiting
        assert (failed.state, failed.category, failed.attempts, num_deaths) == ("failed", "server", 3, 3)
        epoch = await ledger.open_epoch()
        for _ in range(2):
            [row] = await ledger.next_grants(epoch, 10, STEPS)
            await ledger.finish(row.id, epoch, b"")
        return [(await ledger.read("ann", name)).state for name in ids]

    assert loop.run(scenario()) == ["done", "done", "failed", "done", "done"]


def test_work_of_two_kinds_whose_worker_died_comes_again_one_after_the_other(
    ledger: Ledger, loop: asyncio.Runner
) -> None:
    kinds = ("step", "sample")

    async def scenario() -> list[tuple[str, int]]:
        for kind in ("sample", "step", "sample"):
            await ledger.accept(Submission("ann", kind, "f", b""))
        dying = await ledger.open_epoch()
        for kind in kinds:
            await ledger.next_grants(dying, 10, (kind,), kinds)
        await ledger.release(dying)
        epoch, order, is_over = await ledger.open_epoch(), [], asyncio.Event()

        async def work(kind: str) -> None:
            while True:
                for row in await ledger.next_grants(epoch, 10, (kind,), kinds):
                    order.append((row.kind, row.attempts))
                    await ledger.finish(row.id, epoch, b"")
                if len(order) == 3:
                    is_over.set()

        working = [asyncio.create_task(work(kind)) for kind in kinds]
        await asyncio.wait_for(is_over.wait(), 30)
        for task in working:
            task.cancel()
        await asyncio.wait(working)
        return order

    assert loop.run(scenario()) == [("sample", 1), ("step", 1), ("sample", 1)]


def test_a_worker_that_said_goodbye_blames_nobody(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        await accept(ledger, 1)
        for _ in range(5):
            epoch = await ledger.open_epoch()
            [granted] = await ledger.next_grants(epoch, 10, STEPS)
            assert granted.attempts == 0
            await ledger.release(epoch, died=False)

    loop.run(scenario())


def test_a_request_whose_file_is_gone_takes_no_other_with_it(
    ledger: Ledger, files: Files, loop: asyncio.Runner
) -> None:
    async def scenario() -> list[bytes | None]:
        await ledger.accept(step(1, request=bytes(MAX_INLINE + 1)))
        await ledger.accept(step(2, request=b"small"))
        [path] = files.folder.iterdir()
        path.unlink()
        return [row.request for row in await ledger.next_grants(await ledger.open_epoch(), 10, STEPS)]

    assert loop.run(scenario()) == [None, b"small"]


def test_a_worker_gets_only_the_kinds_it_asks_for(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        epoch = await ledger.open_epoch()
        trains = asyncio.create_task(ledger.next_grants(epoch, 10, ("train",)))
        await accept(ledger, 1)
        await ledger.accept(step(None, lane=None, kind="generate"))
        assert not trains.done()
        await ledger.accept(step(None, lane=None, kind="train"))
        assert [row.kind for row in await trains] == ["train"]
        both = await ledger.next_grants(epoch, 10, ("step", "generate"))
        assert [row.kind for row in both] == ["step", "generate"]

    loop.run(scenario())


def test_a_lane_gives_up_what_never_came(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        epoch = await ledger.open_epoch()
        await accept(ledger, 1, 4, 5)
        assert seqs(await ledger.next_grants(epoch, 10, STEPS)) == [1]
        assert await has_nothing(ledger, epoch)
        await ledger.abandon_holes()
        assert seqs(await ledger.next_grants(epoch, 10, STEPS)) == [4, 5]
        with pytest.raises(SeqAbandoned, match="seq 2 of lane came too late"):
            await accept(ledger, 2)
        # Given up is given up, also when the others have to be done again.
        await ledger.release(epoch)
        with pytest.raises(SeqAbandoned):
            await accept(ledger, 3)
        assert seqs(await ledger.next_grants(await ledger.open_epoch(), 10, STEPS)) == [1]

    loop.run(scenario())


def test_a_hole_has_its_time(engine: Engine, writer: Writer, files: Files, loop: asyncio.Runner) -> None:
    ledger = Ledger(engine, writer, files, hole_timeout_s=60)

    async def scenario() -> None:
        epoch = await ledger.open_epoch()
        await accept(ledger, 2)
        await ledger.abandon_holes()
        await accept(ledger, 1)
        assert seqs(await ledger.next_grants(epoch, 10, STEPS)) == [1, 2]

    loop.run(scenario())


def test_a_cancelled_request_is_over_and_its_lane_goes_on(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        epoch = await ledger.open_epoch()
        first, second, third = await accept(ledger, 1, 2, 3)
        assert await ledger.cancel("ann", second)
        assert not await ledger.cancel("ann", second)
        await ledger.next_grants(epoch, 1, STEPS)
        assert await ledger.cancel("ann", first)
        with pytest.raises(StaleEpoch):
            await ledger.finish(first, epoch, b"")
        assert [row.id for row in await ledger.next_grants(epoch, 10, STEPS)] == [third]
        assert (await ledger.read("ann", second)).state == "cancelled"

    loop.run(scenario())


def test_large_bodies_lie_in_files(ledger: Ledger, files: Files, loop: asyncio.Runner) -> None:
    large = b"x" * (MAX_INLINE + 1)

    async def scenario() -> None:
        epoch = await ledger.open_epoch()
        accepted = await ledger.accept(step(1, request=large))
        [granted] = await ledger.next_grants(epoch, 1, STEPS)
        assert granted.request == large
        await ledger.finish(accepted, epoch, large[::-1] + b"y")
        assert (await ledger.read("ann", accepted)).result == large[::-1] + b"y"
        await ledger.accept(step(2, request=b"x" * MAX_INLINE))

    loop.run(scenario())
    assert len(list(files.folder.iterdir())) == 2


def test_results_expire_and_their_places_stay_taken(ledger: Ledger, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        epoch = await ledger.open_epoch()
        done, queued = await accept(ledger, 1, 2)
        await ledger.next_grants(epoch, 1, STEPS)
        await ledger.finish(done, epoch, b"result")
        assert await ledger.expire(min_age_s=60) == 0
        assert await ledger.expire(min_age_s=-1) == 1
        future = await ledger.read("ann", done)
        assert (future.state, future.result, future.expired) == ("done", None, True)
        assert not (await ledger.read("ann", queued)).expired
        assert await accept(ledger, 1) == [done]
        with pytest.raises(SeqReused):
            await ledger.accept(step(1, fingerprint="other"))

    loop.run(scenario())


def test_only_files_that_no_row_names_are_collected(
    engine: Engine, writer: Writer, files: Files, loop: asyncio.Runner
) -> None:
    now = 1e9
    files._clock = lambda: now
    ledger = Ledger(engine, writer, files)
    body = b"x" * (MAX_INLINE + 1)
    loop.run(ledger.accept(step(1, request=body)))
    files.put(b"nobody's")
    assert loop.run(ledger.collect_files()) == 0
    now += 4000
    assert loop.run(ledger.collect_files()) == 1
    assert files.read(next(files.folder.iterdir()).name) == body


def test_a_new_process_goes_on_where_the_last_one_stopped(
    opened: Callable[[], Engine], files: Files, loop: asyncio.Runner
) -> None:
    def in_a_process(scenario: Callable[[Ledger], Awaitable[Any]]) -> Any:
        engine = opened()
        writer = Writer(engine)
        try:
            return loop.run(as_coroutine(scenario(Ledger(engine, writer, files))))
        finally:
            writer.close()

    async def as_coroutine(result: Awaitable[Any]) -> Any:
        return await result

    async def first(ledger: Ledger) -> int:
        epoch = await ledger.open_epoch()
        ids = await accept(ledger, 1, 2, 3)
        await ledger.next_grants(epoch, 2, STEPS)
        await ledger.finish(ids[0], epoch, b"kept")
        return epoch

    async def second(ledger: Ledger) -> None:
        epoch = await ledger.open_epoch()
        assert epoch > old_epoch
        with pytest.raises(StaleEpoch):
            await ledger.finish(future_id("lane", 2), old_epoch, b"late")
        rows = await ledger.next_grants(epoch, 10, STEPS)
        assert [(row.seq, row.attempts) for row in rows] == [(2, 0), (3, 0)]
        assert (await ledger.read("ann", future_id("lane", 1))).result == b"kept"

    old_epoch = in_a_process(first)
    in_a_process(second)
