"""Work of the ledger over real sockets: granted, done, given back; and peers that hang or say what they should not."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dialling_in import ask, collect, gone, hear, peer, waits_little, workers
from smelt.control import links
from smelt.control.workers import Workers
from smelt.errors import (
    ConnectionClosed,
    InvalidInput,
    NotFound,
    OutOfSpace,
)
from smelt.storage.futures import MAX_INLINE, Future, Ledger
from smelt.storage.transitions import Submission
from smelt.transport.failures import failure_of
from smelt.transport.messages import (
    Cancel,
    Failure,
    Finish,
    Generate,
    Grant,
    Ping,
    Pong,
    Result,
    WorkerStatus,
)
from spine import letting_in, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

__all__ = ["waits_little", "workers"]


async def test_who_watches_is_told_what_was_done(ledger: Ledger, socket_file: Path) -> None:
    told: list[tuple[str, bytes]] = []
    workers = Workers(ledger, witness=lambda row, result: told.append((row.id, result.body)))
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        done, cancelled = await do(ledger), await do(ledger)
        for work in (done, cancelled):
            assert (await hear(worker, Grant)).future_id == work
        await workers.cancel("ann", cancelled)
        for work in (cancelled, done):
            await worker.send(Result(work, worker.epoch, b"written"))
        await outcome(ledger, done)
        await until(lambda: told != [])
        assert told == [(done, b"written")]


async def do(ledger: Ledger, kind: str = "generate", body: bytes = b"do") -> str:
    return await ledger.accept(Submission("ann", kind, "f", body, None, None))


async def outcome(ledger: Ledger, future_id: str) -> Future:
    return await ledger.wait("ann", future_id, 5)


async def test_work_of_the_ledger_goes_out_and_its_result_comes_in(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    async with (
        letting_in(workers, ledger, socket_file),
        peer(workers, socket_file) as worker,
        peer(workers, socket_file, "l", "launcher") as launcher,
    ):
        text, run, refused, broken = [await do(ledger, kind) for kind in ("generate", "train", "generate", "generate")]
        granted = await hear(launcher, Grant)
        assert (granted.future_id, granted.kind, granted.owner, granted.attempt) == (run, "train", "ann", 1)
        assert [(await hear(worker, Grant)).future_id for _ in range(3)] == [text, refused, broken]
        await launcher.send(Result(run, launcher.epoch, b"trained"))
        await worker.send(Result(text, worker.epoch, b"written"))
        await worker.send(Result(refused, worker.epoch, failure=failure_of(InvalidInput("no"))))
        await worker.send(Result(broken, worker.epoch, failure=failure_of(RuntimeError("a bug"))))
        assert (await outcome(ledger, run)).result == b"trained"
        assert (await outcome(ledger, text)).result == b"written"
        failed = await outcome(ledger, refused)
        assert (failed.state, failed.category) == ("failed", "user")
        assert msgspec.msgpack.decode(failed.result or b"", type=Failure) == Failure("InvalidInput", "no")
        assert (await outcome(ledger, broken)).category == "server"


async def test_a_launcher_has_one_run_at_a_time(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file, "l", "launcher") as launcher:
        first, second = await do(ledger, "train"), await do(ledger, "train")
        assert (await hear(launcher, Grant)).future_id == first
        assert (await ledger.read("ann", second)).state == "queued"
        await launcher.send(Result(first, launcher.epoch, b""))
        assert (await hear(launcher, Grant)).future_id == second


async def test_what_a_dead_worker_held_goes_to_the_next_with_its_attempts(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    async with letting_in(workers, ledger, socket_file):
        work = await do(ledger)
        for attempt in (1, 2, 3):
            async with peer(workers, socket_file) as worker:
                granted = await hear(worker, Grant)
                assert (granted.future_id, granted.attempt) == (work, attempt)
            await gone(workers)
        assert (await outcome(ledger, work)).state == "failed"


async def test_goodbyes_and_launchers_are_no_attempts(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file):
        await do(ledger)
        await do(ledger, "train")
        for _ in range(4):
            async with (
                peer(workers, socket_file) as worker,
                peer(workers, socket_file, "l", "launcher") as launcher,
            ):
                assert (await hear(worker, Grant)).attempt == 1
                assert (await hear(launcher, Grant)).attempt == 1
                await worker.send(WorkerStatus("cpu", leaving=True))
            await gone(workers)


async def test_results_that_nobody_waits_for_are_refused_and_the_link_stays(
    workers: Workers, ledger: Ledger, socket_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "smelt.control.links")
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        await worker.send(Result("nobody's", worker.epoch, b""))
        work = await do(ledger)
        await hear(worker, Grant)
        await worker.send(Result(work, worker.epoch - 1, b"of an older epoch"))
        again = await do(ledger)
        assert (await hear(worker, Grant)).future_id == again
        await worker.send(Result(again, worker.epoch, b"fine"))
        assert (await outcome(ledger, again)).result == b"fine"
        assert (await ledger.read("ann", work)).state == "granted"
    assert "which it does not hold" in caplog.text
    assert "is not in the hands of epoch" in caplog.text


async def test_a_result_that_came_before_the_end_is_kept(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file):
        async with peer(workers, socket_file) as worker:
            work = await do(ledger)
            await hear(worker, Grant)
            await worker.send(Result(work, worker.epoch, b"just in time"))
        assert (await outcome(ledger, work)).result == b"just in time"


async def test_cancelled_work_is_told_to_who_does_it(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        work = await do(ledger)
        await hear(worker, Grant)
        assert await workers.cancel("ann", work)
        assert await hear(worker, Cancel) == Cancel(work)
        await worker.send(Result(work, worker.epoch, b"too late"))
        assert (await outcome(ledger, work)).state == "cancelled"
        assert not await workers.cancel("ann", work)
        with pytest.raises(NotFound):
            await workers.cancel("bob", work)


async def test_work_that_fits_into_no_frame_fails_alone(
    workers: Workers, ledger: Ledger, socket_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smelt.transport.streams.encode_frame", limited_to(2000))
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        large = await do(ledger, body=bytes(5000))
        failed = await outcome(ledger, large)
        assert (failed.state, failed.category) == ("failed", "user")
        with pytest.raises(InvalidInput, match="over the limit of 2,000"):
            await collect(workers.generate(Generate("r", "ann", "gpt", "x" * 5000)))
        work = await do(ledger)
        assert (await hear(worker, Grant)).future_id == work


async def test_work_whose_file_is_gone_fails_alone(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    lost, work = await do(ledger, body=bytes(MAX_INLINE + 1)), await do(ledger)
    [path] = (tmp_path / "bodies").iterdir()
    path.unlink()
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        assert (await hear(worker, Grant)).future_id == work
        failed = await outcome(ledger, lost)
        assert (failed.state, failed.category) == ("failed", "server")


def limited_to(max_bytes: int) -> Any:
    from smelt.transport.frames import encode_frame

    return lambda message: encode_frame(message, max_bytes)


async def test_a_full_disk_delays_results_and_spares_live_answers(
    workers: Workers, ledger: Ledger, socket_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, num_refused = ledger.finish, 0

    async def refuse_thrice(*arguments: Any, **options: Any) -> None:
        nonlocal num_refused
        num_refused += 1
        if num_refused <= 3:
            raise OutOfSpace("the disk is full")
        await finish(*arguments, **options)

    monkeypatch.setattr(ledger, "finish", refuse_thrice)
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        answer = asyncio.ensure_future(collect(workers.generate(ask())))
        await hear(worker, Generate)
        work = await do(ledger)
        await hear(worker, Grant)
        await worker.send(Result(work, worker.epoch, b"kept"))
        assert (await outcome(ledger, work)).result == b"kept"
        assert num_refused == 4
        await worker.send(Finish("r", "stop", 1, 0))
        assert await answer == [Finish("r", "stop", 1, 0)]


async def test_one_that_does_not_answer_pings_is_hung_up_on(
    workers: Workers, ledger: Ledger, socket_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "PING_SECONDS", 0.03)
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        for _ in range(links.MAX_UNANSWERED * 2):
            await worker.send(Pong((await hear(worker, Ping)).sent_at))
        assert len(workers.workers) == 1
        await gone(workers)  # it answers no more
        for _ in range(links.MAX_UNANSWERED):
            await hear(worker, Ping)
        with pytest.raises(ConnectionClosed):
            await worker.receive()


async def test_a_peer_that_says_what_it_should_not_is_hung_up_on(
    workers: Workers, ledger: Ledger, socket_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        await worker.send(ask())
        await gone(workers)
    assert "a worker does not send Generate" in caplog.text
