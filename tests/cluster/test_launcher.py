"""Runs that a server grants: done, refused, cancelled, continued after any death to the same bits; real processes."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from processes import all_below, children_of, eventually, is_alive, needs_proc
from smelt.control.run_folders import Entry, read_entry, write_entry
from smelt.transport.messages import Cancel, Grant, Lent, Ping, Pong, Result, TrainRequest, WorkerStatus
from smelt.transport.streams import Connection, listen

pytestmark = [needs_proc, pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(120)]

TINY = {
    "tokenizer": "bytes",
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 2,
    "eval_iters": 1,
    "eval_interval": 20,
    "max_iters": 40,
    "device": "cpu",
    "threads": 1,
    "compile": "false",
}
FOREVER = {**TINY, "max_iters": 1_000_000, "eval_interval": 5}

Process = subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A home folder whose path is short enough for a socket."""
    made = Path(tempfile.mkdtemp(prefix="smelt-", dir="/tmp"))
    (made / "text").write_text("Once upon a time there was a small model that learned to write.\n" * 200)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[], Process]]:
    """Starts a launcher in a process group of its own, as the supervisor does; none is left at the end."""
    started: list[Process] = []

    def start_one() -> Process:
        command = [sys.executable, "-m", "smelt.cluster.launcher", "--connect", str(folder / "s")]
        environment = {**os.environ, "SMELT_HOME": str(folder)}
        started.append(subprocess.Popen(command, env=environment, process_group=0, stderr=subprocess.DEVNULL))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.wait()


class Server:
    """The other end: grants, and hears what the launcher says besides its status."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._heard: asyncio.Queue[Any] = asyncio.Queue()
        self.needs: list[tuple[str, int]] = []

    async def listen(self) -> None:
        async for message in self.connection:
            if not isinstance(message, WorkerStatus):
                self._heard.put_nowait(message)
            elif message.num_needed_bytes:
                self.needs.append((message.device, message.num_needed_bytes))
                await self.connection.send(Lent("", ("gpt",)))

    async def grant(self, name: str, folder: Path, **config: Any) -> Path:
        """Have a run trained in a folder of that name, which is given back."""
        out_dir = folder / name
        if read_entry(out_dir) is None:
            entry = Entry(id=run_id(name), owner="ann", recipe="pretrain", config={}, created=0.0, future_id=name)
            write_entry(entry, out_dir, folder / "runs")
        request = TrainRequest(run_id(name), {"data_path": str(folder / "text"), **config, "out_dir": str(out_dir)})
        body = msgspec.msgpack.encode(request)
        await self.connection.send(Grant(name, self.connection.epoch, "ann", name, 1, "train", body=body))
        return out_dir

    async def hear(self) -> Any:
        return await asyncio.wait_for(self._heard.get(), 100)

    async def result(self) -> dict[str, Any]:
        """The summary of the run that has ended."""
        heard = await self.hear()
        assert isinstance(heard, Result)
        assert heard.failure is None
        return dict(msgspec.msgpack.decode(heard.body))


def run_id(name: str) -> str:
    return f"run-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


@asynccontextmanager
async def dialled_in(folder: Path) -> AsyncIterator[Server]:
    """The launcher that dials in first."""
    admitted: asyncio.Future[Server] = asyncio.get_running_loop().create_future()

    async def serve(connection: Connection) -> None:
        assert connection.role == "launcher"
        server = Server(connection)
        admitted.set_result(server)
        await server.listen()

    async with listen(folder / "s", serve):
        yield await asyncio.wait_for(admitted, 60)


def trainer_of(launcher: Process) -> int | None:
    """The pid of the process that trains: the forkserver's child."""
    return next((pid for child in children_of(launcher.pid) for pid in children_of(child)), None)


async def first_checkpoint(out_dir: Path, after: str = "") -> str:
    """The name of the newest one, as soon as there is one after that."""

    def look() -> str:
        return max((path.name for path in out_dir.glob("checkpoints/step-*") if path.name > after), default="")

    return await asyncio.to_thread(eventually, look, "a checkpoint", 60)


def digest(out_dir: Path) -> str:
    return hashlib.sha256((out_dir / "last/model.safetensors").read_bytes()).hexdigest()


def steps(out_dir: Path) -> list[int]:
    """Of which steps there are metrics."""
    metrics = out_dir / "metrics.jsonl"
    lines = map(json.loads, metrics.read_text().splitlines() if metrics.exists() else ())
    return [line["step"] for line in lines if line["kind"] == "step"]


async def test_runs_are_done_one_after_the_other(folder: Path, start: Callable[[], Process]) -> None:
    start()
    async with dialled_in(folder) as server:
        first = await server.grant("first", folder, **TINY)
        second = await server.grant("second", folder, **TINY)
        await server.connection.send(Ping(1.5))
        assert await server.hear() == Pong(1.5)
        summaries = [await server.result(), await server.result()]
    assert [summary["out_dir"] for summary in summaries] == [str(first), str(second)]
    assert [(summary["step"], summary["stop_reason"]) for summary in summaries] == [(40, "done")] * 2
    assert digest(first) == digest(second)
    assert "step 40: " in (first / "log.txt").read_text()
    assert "the worker has unloaded gpt: this run needs the memory" in (first / "log.txt").read_text()
    assert [device for device, _ in server.needs] == ["cpu", "cpu"]
    assert min(num_bytes for _, num_bytes in server.needs) > 0
    entry = read_entry(first)
    assert entry is not None
    assert (entry.id, entry.owner) == (run_id("first"), "ann")


async def test_what_is_wrong_with_a_request_is_answered(folder: Path, start: Callable[[], Process]) -> None:
    start()
    async with dialled_in(folder) as server:
        await server.grant("wrong", folder, **{**TINY, "n_head": 3})
        heard = await server.hear()
        assert (heard.failure.error, "n_head" in heard.failure.message) == ("ConfigError", True)
        await server.connection.send(Grant("torn", 1, "ann", None, None, "train", body=b"\xc1"))
        assert (await server.hear()).failure.error == "SmeltError"
        await server.grant("right", folder, **TINY)
        assert (await server.result())["step"] == 40


async def test_a_cancelled_run_stops_with_a_checkpoint(folder: Path, start: Callable[[], Process]) -> None:
    start()
    async with dialled_in(folder) as server:
        out_dir = await server.grant("cancelled", folder, **FOREVER)
        await server.grant("never begun", folder, **FOREVER)
        await first_checkpoint(out_dir)
        await server.connection.send(Cancel("never begun"))
        await server.connection.send(Cancel("cancelled"))
        summary = await server.result()
        assert summary["stop_reason"] == "interrupted"
        assert (out_dir / f"checkpoints/step-{summary['step']:08d}").is_dir()
        heard = await server.hear()
        assert (heard.future_id, heard.failure.error) == ("never begun", "TrainingError")


async def test_a_lost_connection_stops_the_run_and_the_next_grant_continues_it(
    folder: Path, start: Callable[[], Process]
) -> None:
    launcher = start()
    slowly = {**TINY, "max_iters": 1000, "eval_interval": 500}
    async with dialled_in(folder) as server:
        whole = await server.grant("whole", folder, **slowly)
        await server.result()
    async with dialled_in(folder) as server:
        parted = await server.grant("parted", folder, **slowly)
        await asyncio.to_thread(eventually, lambda: steps(parted), "the first step", 60)
        trainer = trainer_of(launcher)
        assert trainer is not None
    await asyncio.to_thread(eventually, lambda: not is_alive(trainer), "the end of the run")
    assert int((parted / "last").resolve().name.removeprefix("step-")) < 1000
    async with dialled_in(folder) as server:
        assert await server.grant("parted", folder, **slowly) == parted
        summary = await server.result()
    assert summary["stop_reason"] == "done"
    assert digest(parted) == digest(whole)
    assert steps(parted) == steps(whole)
    assert launcher.poll() is None


async def test_a_killed_trainer_is_replaced_and_continues(folder: Path, start: Callable[[], Process]) -> None:
    launcher = start()
    async with dialled_in(folder) as server:
        out_dir = await server.grant("killed", folder, **FOREVER)
        await first_checkpoint(out_dir)
        killed = trainer_of(launcher)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        await asyncio.to_thread(eventually, lambda: not is_alive(killed), "the end of the trainer")
        await first_checkpoint(out_dir, max(path.name for path in out_dir.glob("checkpoints/step-*")))
        await server.connection.send(Cancel("killed"))
        assert (await server.result())["stop_reason"] == "interrupted"


async def test_a_run_on_two_ranks_loses_one_and_ends_with_the_bits_of_an_undisturbed_one(
    folder: Path, start: Callable[[], Process]
) -> None:
    launcher = start()
    both = {**TINY, "ranks": 2, "max_iters": 1000, "eval_interval": 200}
    async with dialled_in(folder) as server:
        whole = await server.grant("whole pair", folder, **both)
        await server.result()
        broken = await server.grant("broken pair", folder, **both)
        await first_checkpoint(broken)
        ranks = [pid for child in children_of(launcher.pid) for pid in children_of(child)]
        assert len(ranks) == 2
        os.kill(max(ranks), signal.SIGKILL)
        summary = await server.result()
    assert (summary["step"], summary["stop_reason"]) == (1000, "done")
    assert digest(broken) == digest(whole)
    assert steps(broken) == steps(whole)


async def test_a_run_that_only_dies_is_given_up(folder: Path, start: Callable[[], Process]) -> None:
    launcher = start()
    async with dialled_in(folder) as server:
        await server.grant("doomed", folder, **{**FOREVER, "eval_interval": 1_000_000})
        killed = None
        for _ in range(3):
            trainer = await asyncio.to_thread(
                eventually, lambda old=killed: newer(launcher, old), "the next trainer", 60
            )
            os.kill(trainer, signal.SIGKILL)
            killed = trainer
        heard = await server.hear()
    assert heard.failure.error == "TrainingError"
    assert "processes died 3 times without getting further" in heard.failure.message


def newer(launcher: Process, old: int | None) -> int | None:
    """The trainer, when it is another one."""
    trainer = trainer_of(launcher)
    return trainer if trainer != old else None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_nobody_outlives_the_launcher(folder: Path, start: Callable[[], Process], number: signal.Signals) -> None:
    launcher = start()
    async with dialled_in(folder) as server:
        out_dir = await server.grant(f"orphan {number}", folder, **FOREVER)
        reached = await first_checkpoint(out_dir)
        below = all_below(launcher.pid)
        assert len(below) == 3, "the forkserver, its resource tracker and the trainer"
        launcher.send_signal(number)
        code = await asyncio.to_thread(launcher.wait, 30)
    await asyncio.to_thread(eventually, lambda: not [pid for pid in below if is_alive(pid)], "the end of all", 5)
    assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    assert await first_checkpoint(out_dir) >= reached
