"""Ranks on a local Ray cluster of two cores: what they say, a smaller world, a death, a token that is asked for."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from smelt.cluster import ray_launcher
from smelt.cluster.ray_launcher import RayRanks
from smelt.transport.messages import Result

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'smelt[ray]'"),
    pytest.mark.slow,
    pytest.mark.anyio,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # from inside Ray
]


def say_who_i_am(num_asked: int = 2) -> Result:
    """Meets the others, and says how many there are."""
    import torch

    from smelt.training.parallel import join, read_ranks

    ranks = read_ranks(num_asked)
    with join(ranks, torch.device("cpu")):
        total = int(ranks.sum_(torch.tensor(ranks.rank + 1)))
    return Result("r", 1, body=f"{ranks.world_size} ranks, sum {total}".encode())


def wait_for_a_signal() -> Result:
    try:
        signal.pause()
    except KeyboardInterrupt:
        return Result("r", 1, body=b"interrupted")
    return Result("r", 1, body=b"never")


def die() -> Result:
    os._exit(9)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of Ray on two cores, started as its operator would, with a token in a file of its own."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text("t" * 64)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    patch.setenv("RAY_AUTH_MODE", "token")
    patch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    head = ["start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(port), "--num-cpus", "2"]
    flags = ["--include-dashboard", "false", "--disable-usage-stats"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *head, *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        ray = ray_launcher._connected()
        yield f"127.0.0.1:{port}"
        ray.shutdown()
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        patch.undo()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smelt.cluster.ray_launcher.PLACE_SECONDS", 5.0)


async def outcome(ranks: RayRanks) -> Result | None:
    await ranks.start()
    return await ranks.result()


async def test_two_ranks_meet(cluster: str, home: Path) -> None:
    result = await outcome(RayRanks(say_who_i_am, 2))
    assert result is not None
    assert result.body == b"2 ranks, sum 3"


@pytest.mark.parametrize(("asked", "expected"), [(4, b"2 ranks, sum 3"), (3, b"1 ranks, sum 1")])
async def test_where_there_is_no_room_for_all_there_are_fewer(
    cluster: str, home: Path, patience: None, asked: int, expected: bytes
) -> None:
    result = await outcome(RayRanks(partial(say_who_i_am, asked), asked))
    assert result is not None
    assert result.body == expected


async def test_a_death_is_none_and_the_room_is_free_again(cluster: str, home: Path) -> None:
    assert await outcome(RayRanks(die, 2)) is None
    assert await outcome(RayRanks(die, 2)) is None


async def test_an_interruption_reaches_the_processes(cluster: str, home: Path) -> None:
    ranks = RayRanks(wait_for_a_signal, 1)
    await ranks.start()
    waiting = asyncio.create_task(ranks.result())
    while not waiting.done():
        ranks.interrupt()  # until the process is far enough to hear it
        await asyncio.sleep(1.0)
    result = await waiting
    assert result is None or result.body == b"interrupted"


def test_who_has_no_token_is_refused(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("o" * 64)
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}
    code = f"import ray; ray.init(address={cluster!r}); print(ray.cluster_resources())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "token" in (done.stdout + done.stderr).lower()
