"""What the tests of processes stand on: a ledger, a socket file, workers that are let in. For conftests to import."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from smelt.control.workers import Workers
from smelt.storage.database import open_database, sqlite_url
from smelt.storage.files import Files
from smelt.storage.futures import Ledger
from smelt.storage.writer import Writer
from smelt.transport.streams import listen


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    engine = open_database(sqlite_url(tmp_path / "smelt.db"))
    writer = Writer(engine)
    yield Ledger(engine, writer, Files(tmp_path / "bodies"))
    writer.close()
    engine.dispose()


@pytest.fixture
def socket_file() -> Iterator[Path]:
    """In a folder of this test's own; pytest's can be too long for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="smelt-", dir="/tmp"))
    yield folder / "s"
    shutil.rmtree(folder)


@asynccontextmanager
async def letting_in(workers: Workers, ledger: Ledger, address: Path) -> AsyncIterator[None]:
    """Workers may dial in while the block runs."""
    async with listen(address, workers.serve, next_epoch=ledger.open_epoch):
        yield


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what nobody announces."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.002)  # which leaves the interpreter to other threads
