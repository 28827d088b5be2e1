"""A ledger on SQLite, and a socket file for workers to dial."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from smelt.storage.database import open_database, sqlite_url
from smelt.storage.files import Files
from smelt.storage.futures import Ledger
from smelt.storage.writer import Writer


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
