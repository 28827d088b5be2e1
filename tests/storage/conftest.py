"""The storage tests run on SQLite, and the same ones on a PostgreSQL server of their own where its programs are."""

import asyncio
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from smelt.storage.database import open_database, sqlite_url
from smelt.storage.files import Files
from smelt.storage.futures import Ledger
from smelt.storage.writer import Writer

ACCOUNT = "nobody"  # the server refuses to run as root


def as_user(command: list[str]) -> list[str]:
    return ["runuser", "-u", ACCOUNT, "--", *command] if os.geteuid() == 0 else command


def run(command: list[str]) -> None:
    done = subprocess.run(as_user(command), capture_output=True, text=True, cwd="/", check=False)
    if done.returncode:
        pytest.skip(f"PostgreSQL does not start here: {done.stderr.strip()[-300:]}")


def missing_programs() -> list[str]:
    needed = ["postgres", "initdb", "pg_ctl", *(["runuser"] if os.geteuid() == 0 else [])]
    return [name for name in needed if shutil.which(name) is None]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Path]:
    """The folder with the socket of a server that only this test session can reach."""
    if missing := missing_programs():
        pytest.skip(f"PostgreSQL is absent: no {', '.join(missing)}")
    # Not under pytest's own folder: its path would be too long for a socket, and closed to other accounts.
    folder = Path(tempfile.mkdtemp(prefix="smelt-pg-"))
    if os.geteuid() == 0:
        shutil.chown(folder, ACCOUNT)
    run(
        [
            "initdb",
            "--pgdata",
            f"{folder}/data",
            "--auth=trust",
            "--username=smelt",
            "--no-sync",
            "--no-locale",
            "-E",
            "UTF8",
        ]
    )
    # What a power cut takes is tested on SQLite; without fsync the tests are fast.
    options = f"-k {folder} -c listen_addresses= -c fsync=off -c shared_buffers=16MB -c max_connections=40"
    run(["pg_ctl", "start", "--wait", "-D", f"{folder}/data", "-l", f"{folder}/log", "-o", options])
    yield folder
    run(["pg_ctl", "stop", "--mode=immediate", "-D", f"{folder}/data"])
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "smelt.db")
    psycopg = pytest.importorskip("psycopg", reason="optional package psycopg is absent")
    socket = request.getfixturevalue("postgres_server")
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(host=str(socket), user="smelt", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"postgresql://smelt@/postgres?host={socket}&options=-csearch_path%3D{name}"


@pytest.fixture
def opened(url: str) -> Iterator[Callable[[], Engine]]:
    """Opens the database, as often as a test wants; all of it is closed at the end."""
    engines: list[Engine] = []

    def open_again() -> Engine:
        engines.append(open_database(url))
        return engines[-1]

    yield open_again
    for engine in engines:
        engine.dispose()


@pytest.fixture
def engine(opened: Callable[[], Engine]) -> Engine:
    return opened()


@pytest.fixture
def writer(engine: Engine) -> Iterator[Writer]:
    writer = Writer(engine)
    yield writer
    writer.close()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "bodies")


@pytest.fixture
def ledger(engine: Engine, writer: Writer, files: Files) -> Ledger:
    return Ledger(engine, writer, files, hole_timeout_s=0)


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner
