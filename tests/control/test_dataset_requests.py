"""Datasets that are asked of a server: from which sources, made once whoever dies, whose they are, given up."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smelt.control import dataset_requests as module
from smelt.control.dataset_requests import DatasetRequests, DatasetStatus
from smelt.control.uploads import Uploads
from smelt.data.datasets import kept, open_dataset
from smelt.data.preparing_process import Order, prepare_apart
from smelt.errors import AlreadyExists, ConfigError, Forbidden, InUse, InvalidInput, NotFound
from smelt.settings import Settings, load_settings
from smelt.storage.database import open_database, sqlite_url
from smelt.storage.files import Files
from smelt.storage.futures import Ledger
from smelt.storage.writer import Writer

pytestmark = pytest.mark.anyio

LINES = "".join(f'{{"text": "This is the document number {number}."}}\n' for number in range(40)).encode()


class Server:
    """What stands in one home folder."""

    def __init__(self, home: Path) -> None:
        self.settings: Settings = load_settings(home=home)
        self.engine = open_database(sqlite_url(home / "smelt.db"))
        self.writer = Writer(self.engine)
        self.ledger = Ledger(self.engine, self.writer, Files(home / "bodies"))
        self.uploads = Uploads(home, self.engine, self.writer)
        self.requests = DatasetRequests(self.settings, self.ledger, self.uploads)

    async def upload(self, content: bytes, name: str = "lines.jsonl", owner: str = "ada") -> str:
        async with self.uploads.incoming() as incoming:
            await incoming.write(content)
            return (await self.uploads.keep(incoming, owner, name, "user_data")).id

    async def create(self, owner: str = "ada", **values: Any) -> DatasetStatus:
        small = {"name": "new", "tokenizer": "bytes", "block_size": 16}
        return await self.requests.create(small | values, owner, may_use_hub=False)

    def close(self) -> None:
        self.writer.close()
        self.engine.dispose()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "home").mkdir()
    server = Server(tmp_path / "home")
    yield server
    server.close()


class Blocked:
    """In place of the process: waits until it may go on, telling what it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Event()

    def __call__(self, order: Order, progress: Any) -> None:
        progress("tokenizing", 1, 2)
        self.begun.set()
        while not self.go.wait(0.01):
            progress("tokenizing", 1, 2)
        prepare_apart(order, progress)


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Blocked]:
    blocked = Blocked()
    monkeypatch.setattr(module, "prepare_apart", blocked)
    yield blocked
    blocked.go.set()


async def test_an_upload_becomes_a_dataset_of_its_sender(server: Server) -> None:
    file_id = await server.upload(LINES)
    asked = await server.create(file_id=file_id, val_fraction="0.25")
    assert (asked.state, asked.source, asked.owner) == ("queued", "lines.jsonl", "ada")
    async with server.requests.running():
        made = await server.requests.read("new", "ada", wait_s=30)
    assert (made.state, made.error, made.num_train_documents, made.num_val_documents) == ("ready", None, 30, 10)
    assert (made.source, made.owner, made.tokenizer, made.num_source_bytes) == (
        "lines.jsonl",
        "ada",
        "bytes",
        len(LINES),
    )
    assert await server.requests.all("ada") == await server.requests.all(None) == [made]
    rows, num_rows = await server.requests.rows("new", "ada", "val", 8, 5)
    assert (num_rows, [row.index for row in rows]) == (10, [8, 9])
    assert all(row.text.startswith("This is the document number") and not row.is_cut for row in rows)
    with pytest.raises(AlreadyExists, match="exists already"):
        await server.create(file_id=file_id)


async def test_nobody_else_sees_it_or_uses_the_file(server: Server) -> None:
    file_id = await server.upload(LINES)
    with pytest.raises(NotFound, match="no file"):
        await server.create("eve", file_id=file_id)
    await server.create(file_id=file_id)
    async with server.requests.running():
        await server.requests.read("new", "ada", wait_s=30)
    assert await server.requests.all("eve") == []
    for attempt in (
        server.requests.read("new", "eve"),
        server.requests.rows("new", "eve", "train", 0, 1),
        server.requests.remove("new", "eve"),
    ):
        with pytest.raises(NotFound, match="no dataset 'new'"):
            await attempt
    await server.requests.remove("new", "ada")
    assert await server.requests.all(None) == []


@pytest.mark.parametrize(
    "source",
    [
        *("", "/etc/passwd", "../x", "~/x", "file:///etc/passwd", "ftp://host/x", "builtin:bible", "http:host"),
        *("hf:", "hf:../x", "hf:a/b/c", "hf:a:b:c:d", "hf:/etc", "data\0", "gs://bucket", "http://" + "x" * 2000),
    ],
)
async def test_a_source_is_no_path(server: Server, source: str) -> None:
    with pytest.raises(InvalidInput):
        await server.requests.create({"name": "new", "source": source}, "ada", may_use_hub=True)


async def test_what_cannot_be_meant_is_refused(server: Server) -> None:
    with pytest.raises(Forbidden, match="an administrator adds it"):
        await server.create(source="hf:org/name")
    with pytest.raises(InvalidInput, match="either source or file_id"):
        await server.create()
    with pytest.raises(InvalidInput, match="either source or file_id"):
        await server.create(source="builtin:pydoc", file_id="file-x")
    with pytest.raises(InvalidInput, match="not a name for a dataset"):
        await server.create(source="builtin:pydoc", name="../x")
    with pytest.raises(InvalidInput, match=r"tokenizer '/etc' is unknown"):
        await server.create(source="builtin:pydoc", tokenizer="/etc")
    with pytest.raises(ConfigError, match="val_fraction"):
        await server.create(source="builtin:pydoc", val_fraction=2)
    assert await server.requests.all(None) == []


async def test_a_failure_says_why_until_it_is_removed(server: Server) -> None:
    await server.create(file_id=await server.upload(b'{"text": "one"}\n{"txt": 2}\n'))
    async with server.requests.running():
        failed = await server.requests.read("new", "ada", wait_s=30)
    assert failed.state == "failed"
    assert failed.error == (
        "lines.jsonl, line 2: has no 'text', only 'txt'; name it with --column; --errors skip leaves such records out"
    )
    assert await server.requests.all("ada") == [failed]
    await server.requests.remove("new", "ada")
    assert await server.requests.all("ada") == []
    with pytest.raises(NotFound):
        await server.requests.remove("new", "ada")


async def test_one_that_is_made_shows_how_far_it_is_and_can_be_given_up(server: Server, blocked: Blocked) -> None:
    await server.create(file_id=await server.upload(LINES))
    async with server.requests.running():
        await asyncio.to_thread(blocked.begun.wait, 30)
        (being_made,) = await server.requests.all("ada")
        assert (being_made.state, being_made.progress.stage, being_made.progress.num_total) == (
            "preparing",
            "tokenizing",
            2,
        )
        with pytest.raises(AlreadyExists, match="is being made already"):
            await server.create("eve", source="builtin:pydoc")
        await server.requests.remove("new", "ada")
        assert await server.requests.all(None) == []
        blocked.go.set()
        await server.create(source="builtin:pydoc", name="next", tokenizer="bytes")
        assert (await server.requests.read("next", "ada", wait_s=60)).state == "ready"
    assert [each.name for each in await server.requests.all(None)] == ["next"]


async def test_what_was_accepted_is_made_by_the_next_server_and_once(server: Server) -> None:
    await server.create(file_id=await server.upload(LINES))
    server.close()
    second = Server(server.settings.home)
    async with second.requests.running():
        made = await second.requests.read("new", "ada", wait_s=30)
    assert made.state == "ready"
    folder = second.settings.datasets / "new"
    job = open_dataset(folder).manifest.job
    request = module.DatasetRequest(
        name="new",
        source="x",
        file=None,
        tokenizer="bytes",
        val_fraction=0.1,
        block_size=16,
        column="text",
        errors="skip",
    )
    before = (folder / "dataset.json").stat().st_ino
    assert job is not None
    second.requests._make(job, "ada", request, lambda *_: None)  # as after a death before its end was written down
    with pytest.raises(AlreadyExists):
        second.requests._make("another", "ada", request, lambda *_: None)
    assert (folder / "dataset.json").stat().st_ino == before
    second.close()
    server.writer, server.engine = Writer(server.engine), server.engine  # for the fixture to close


async def test_one_that_a_run_trains_on_stays(server: Server) -> None:
    await server.create(file_id=await server.upload(LINES))
    async with server.requests.running():
        await server.requests.read("new", "ada", wait_s=30)
    with kept(server.settings.datasets / "new"), pytest.raises(InUse, match="cancel the run first"):
        await server.requests.remove("new", "ada")
    await server.requests.remove("new", "ada")
