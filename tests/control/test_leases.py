"""Workers hear what runs of their machine need, and launchers what made way for it, over real sockets."""

import asyncio
from pathlib import Path

import pytest

from dialling_in import hear, peer, waits_little, workers
from smelt.control.workers import Workers
from smelt.storage.futures import Ledger
from smelt.transport.messages import Finish, Lend, Lent, LoadModel, WorkerStatus
from smelt.transport.streams import Connection
from spine import letting_in

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

__all__ = ["waits_little", "workers"]

GIB = 2**30


async def lend(worker: Connection, *unloaded: str) -> int:
    """Do as a worker does that is told to leave memory to runs; how much."""
    asked = await hear(worker, Lend)
    await worker.send(Lent(asked.request_id, unloaded))
    await worker.send(Finish(asked.request_id, "stop", 0, 0))
    return asked.num_bytes


async def needs(launcher: Connection, num_bytes: int, device: str = "cpu") -> None:
    await launcher.send(WorkerStatus(device, num_running=1, num_needed_bytes=num_bytes))


async def hears_nothing_of_it(worker: Connection, workers: Workers) -> None:
    """The next message is of what is asked now. The worker has the model "own"."""
    loading = asyncio.ensure_future(workers.load_model("own"))
    asked = await hear(worker, LoadModel)
    await worker.send(Finish(asked.request_id, "stop", 0, 0))
    await loading


async def test_workers_of_a_run_s_machine_make_way_for_as_long_as_it_is_trained(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    async with (
        letting_in(workers, ledger, socket_file),
        peer(workers, socket_file, "here:1") as one,
        peer(workers, socket_file, "here:2") as other,
        peer(workers, socket_file, "there:1", models=("own",)) as elsewhere,
        peer(workers, socket_file, "here:3", "launcher") as launcher,
    ):
        await needs(launcher, 3 * GIB)
        assert [await lend(one, "a", "b"), await lend(other)] == [3 * GIB] * 2
        assert (await hear(launcher, Lent)).unloaded == ("a", "b")
        async with peer(workers, socket_file, "here:4") as late:
            assert await lend(late) == 3 * GIB
            await launcher.send(WorkerStatus("cpu"))
            assert [await lend(worker) for worker in (one, other, late)] == [0] * 3
        await hears_nothing_of_it(elsewhere, workers)


async def test_a_launcher_that_is_gone_needs_nothing_and_a_worker_that_is_gone_holds_nothing(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    async with (
        letting_in(workers, ledger, socket_file),
        peer(workers, socket_file, "here:1") as worker,
        peer(workers, socket_file, "here:2") as dying,
    ):
        async with peer(workers, socket_file, "here:3", "launcher") as launcher:
            await needs(launcher, GIB, "auto")
            assert await lend(worker, "a") == GIB
            await hear(dying, Lend)
            await dying.close()
            assert (await hear(launcher, Lent)).unloaded == ("a",)
        assert await lend(worker) == 0


async def test_a_run_on_another_device_needs_nothing_of_this_one(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    async with (
        letting_in(workers, ledger, socket_file),
        peer(workers, socket_file, "here:1", models=("own",)) as worker,
        peer(workers, socket_file, "here:3", "launcher") as launcher,
    ):
        await needs(launcher, GIB, "cuda:0")
        assert (await hear(launcher, Lent)).unloaded == ()
        await hears_nothing_of_it(worker, workers)
