"""Coroutines as tests, on asyncio; folders whose paths are short enough for a socket."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder of this test's own; pytest's can be too long for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="smelt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def socket_file(short_folder: Path) -> Path:
    return short_folder / "s"
