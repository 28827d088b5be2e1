"""OpenAI's uploads: parts in any order with its own client, one file of them, whatever dies; limits; nobody else's."""

import asyncio
import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gated import ask, client_of, make_key, refused
from live import serving
from processes import needs_proc
from scripted import scripted
from serving import serving as serving_smelt
from serving import write_tiny_model
from smelt import disk
from smelt.api import openai_uploads
from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.control import chunked_uploads
from smelt.control.keys import LOCAL
from smelt.errors import InvalidInput, NotFound, OutOfSpace, StorageError
from smelt.storage import records
from smelt.storage.records import ChunkedUpload, UploadPart

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

UPLOADS = "/v1/uploads"
LINES = b"".join(b'{"text": "line %d"}\n' % number for number in range(9))


@pytest.fixture
def live(services: Services) -> Iterator[openai.OpenAI]:
    with serving(create_app(services)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


async def begun(client: httpx.AsyncClient, num_bytes: int = len(LINES), **changes: Any) -> str:
    """The id of an upload."""
    body = {"filename": "a.jsonl", "purpose": "batch", "bytes": num_bytes, "mime_type": "text/jsonl", **changes}
    return str((await ask(client, UPLOADS, body))["id"])


async def sent(client: httpx.AsyncClient, upload_id: str, data: bytes) -> httpx.Response:
    return await client.post(f"{UPLOADS}/{upload_id}/parts", files={"data": ("part", data)})


async def part(client: httpx.AsyncClient, upload_id: str, data: bytes) -> str:
    """The id of a part."""
    answer = await sent(client, upload_id, data)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


async def completed(client: httpx.AsyncClient, upload_id: str, *part_ids: str) -> dict[str, Any]:
    return await ask(client, f"{UPLOADS}/{upload_id}/complete", {"part_ids": part_ids})


async def content(client: httpx.AsyncClient, file_id: str) -> bytes:
    return (await client.get(f"/v1/files/{file_id}/content")).raise_for_status().content


def folders(services: Services) -> list[str]:
    return sorted(folder.name for folder in services.uploads.folder.iterdir())


def set_over(services: Services, upload_id: str, seconds: float = 1.0) -> None:
    """Have the time of an upload be over for so long."""

    def change(connection: Any) -> None:
        upload = records.get(connection, ChunkedUpload, LOCAL.owner, upload_id)
        records.replace(connection, replace(upload, expires=time.time() - seconds))

    services.writer.write(change).result(5)


def rows(services: Services, kind: type[records.R]) -> list[records.R]:
    with services.database.connect() as connection:
        return records.of_all_owners(connection, kind)


def test_openais_client_sends_parts_beside_each_other_and_gets_a_file(live: openai.OpenAI, services: Services) -> None:
    data = random.Random(1).randbytes(3_000_000)
    begun = live.uploads.create(
        bytes=len(data),
        filename="päss.jsonl",
        mime_type="text/jsonl",
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert (begun.object, begun.status, begun.file, begun.bytes) == ("upload", "pending", None, len(data))
    assert (begun.filename, begun.purpose) == ("päss.jsonl", "fine-tune")
    assert begun.expires_at - begun.created_at == 3600
    starts = list(range(0, len(data), 400_000))
    order = random.Random(2).sample(starts, len(starts))
    with ThreadPoolExecutor(4) as threads:
        made = list(
            threads.map(lambda start: live.uploads.parts.create(begun.id, data=data[start : start + 400_000]), order)
        )
    assert {(each.object, each.upload_id) for each in made} == {("upload.part", begun.id)}
    ids = dict(zip(order, [each.id for each in made], strict=True))
    md5 = hashlib.md5(data).hexdigest()
    done = live.uploads.complete(begun.id, part_ids=[ids[start] for start in starts], md5=md5)
    assert (done.id, done.status) == (begun.id, "completed")
    assert done.file is not None
    assert done.file == live.files.retrieve(done.file.id)
    assert (done.file.bytes, done.file.filename, done.file.purpose) == (len(data), "päss.jsonl", "fine-tune")
    assert done.file.expires_at == done.file.created_at + 7200
    assert live.files.content(done.file.id).read() == data
    assert live.uploads.complete(begun.id, part_ids=[ids[start] for start in starts], md5=md5) == done
    assert folders(services) == [done.file.id], "the parts are gone"
    assert rows(services, UploadPart) == []


@pytest.mark.parametrize("part_size", [None, 70_000])
def test_openais_client_sends_a_file_in_chunks(live: openai.OpenAI, tmp_path: Path, part_size: int | None) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(random.Random(1).randbytes(200_000))
    done = live.uploads.upload_file_chunked(
        file=path,
        mime_type="text/jsonl",
        purpose="batch",
        part_size=part_size,
        md5=hashlib.md5(path.read_bytes()).hexdigest(),
    )
    assert done.file is not None
    assert done.file.expires_at == pytest.approx(time.time() + 30 * 86400, abs=60)
    assert live.files.content(done.file.id).read() == path.read_bytes()
    assert [file.id for file in live.files.list(purpose="batch")] == [done.file.id]
    asked = {"endpoint": "/v1/completions", "completion_window": "24h"}
    batch = live.batches.create(input_file_id=done.file.id, **asked)
    assert live.batches.retrieve(batch.id).input_file_id == done.file.id


def test_an_upload_is_given_up(live: openai.OpenAI, services: Services) -> None:
    upload = live.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="evals")
    made = live.uploads.parts.create(upload.id, data=b"abc")
    for _ in range(2):
        cancelled = live.uploads.cancel(upload.id)
        assert (cancelled.id, cancelled.status, cancelled.file) == (upload.id, "cancelled", None)
    assert folders(services) == []
    with pytest.raises(openai.BadRequestError, match="was cancelled; begin another upload"):
        live.uploads.parts.create(upload.id, data=b"abc")
    with pytest.raises(openai.BadRequestError, match="was cancelled"):
        live.uploads.complete(upload.id, part_ids=[made.id])


async def test_parts_are_kept_over_a_restart(tmp_path: Path) -> None:
    with scripted(tmp_path / "home") as (services, _):
        async with client_of(create_app(services)) as client:
            upload_id = await begun(client)
            second = await part(client, upload_id, LINES[50:])
    with scripted(tmp_path / "home") as (services, _):
        async with client_of(create_app(services)) as client:
            first = await part(client, upload_id, LINES[:50])
            file_id = (await completed(client, upload_id, first, second))["file"]["id"]
    with scripted(tmp_path / "home") as (services, _):
        async with client_of(create_app(services)) as client:
            assert await content(client, file_id) == LINES
            assert (await completed(client, upload_id, first, second))["file"]["id"] == file_id


async def test_a_death_before_the_commit_leaves_an_upload_that_can_be_completed(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_id = await begun(client)
    parts = [await part(client, upload_id, LINES[:50]), await part(client, upload_id, LINES[50:])]

    def die(*_: Any, **__: Any) -> None:
        raise StorageError("the database is out of reach")

    monkeypatch.setattr(chunked_uploads.records, "add", die)
    await refused(client, f"{UPLOADS}/{upload_id}/complete", {"part_ids": parts}, 503)
    before = folders(services)
    assert upload_id in before
    assert (await sent(client, upload_id, LINES)).status_code == 503
    assert len(list((services.uploads.folder / upload_id).iterdir())) == 2, "a part without a row is gone"
    monkeypatch.undo()
    assert (await client.get("/v1/files")).json()["data"] == []
    done = await completed(client, upload_id, *parts)
    assert await content(client, done["file"]["id"]) == LINES
    assert folders(services) == [done["file"]["id"]]


async def test_who_completes_at_the_same_time_gets_the_same_file(client: httpx.AsyncClient, services: Services) -> None:
    upload_id = await begun(client)
    parts = [await part(client, upload_id, LINES[:50]), await part(client, upload_id, LINES[50:])]
    done = await asyncio.gather(*[completed(client, upload_id, *parts) for _ in range(5)])
    assert all(each == done[0] for each in done)
    assert folders(services) == [done[0]["file"]["id"]]
    assert await content(client, done[0]["file"]["id"]) == LINES
    error = await refused(client, f"{UPLOADS}/{upload_id}/complete", {"part_ids": parts[::-1]})
    assert f"is completed: its file is {done[0]['file']['id']}" in error["message"]
    assert "is completed" in (await refused(client, f"{UPLOADS}/{upload_id}/cancel", {}))["message"]
    assert (await sent(client, upload_id, b"x")).status_code == 400


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_what_was_answered_is_there_after_kill_9(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(5 * 10**6)
    pieces = [data[start : start + 10**6] for start in range(0, len(data), 10**6)]
    with serving_smelt(tmp_path / "home", str(write_tiny_model(tmp_path / "tiny"))) as server:

        def client() -> openai.OpenAI:
            return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=30)

        def kill() -> None:
            os.kill(server.pid_of("api"), signal.SIGKILL)

        with client() as before:
            upload = before.uploads.create(bytes=len(data), filename="a", mime_type="a/b", purpose="batch")
            ids = {n: before.uploads.parts.create(upload.id, data=pieces[n]).id for n in (3, 0, 4)}
        kill()
        with client() as after, ThreadPoolExecutor(2) as threads:
            ids |= {n: after.uploads.parts.create(upload.id, data=pieces[n]).id for n in (1, 2)}
            part_ids = [ids[n] for n in range(5)]
            completing = threads.submit(after.uploads.complete, upload.id, part_ids=part_ids)
            kill()  # before, while or after it is completed
            done = completing.result()
            kill()
            assert done.file is not None
            assert after.files.content(done.file.id).read() == data
            assert after.uploads.complete(upload.id, part_ids=part_ids) == done
            assert [file.id for file in after.files.list()] == [done.file.id]


async def test_parts_that_vanish_while_they_are_joined_are_no_file(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where somebody cancels the upload at that moment."""
    upload_id = await begun(client)
    made = await part(client, upload_id, LINES)
    join = services.chunked_uploads._join

    def join_late(*args: Any) -> None:
        asyncio.run_coroutine_threadsafe(services.chunked_uploads.cancel(LOCAL.owner, upload_id), loop).result(10)
        join(*args)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(services.chunked_uploads, "_join", join_late)
    error = await refused(client, f"{UPLOADS}/{upload_id}/complete", {"part_ids": [made]})
    assert "was cancelled" in error["message"]
    assert folders(services) == []
    other = await begun(client)
    made = await part(client, other, LINES)
    monkeypatch.undo()
    (services.uploads.folder / other / made).unlink()
    await refused(client, f"{UPLOADS}/{other}/complete", {"part_ids": [made]}, 503)


@pytest.mark.parametrize(
    ("chosen", "more", "status", "message", "param"),
    [
        ((0,), {}, 400, "these parts have 50 bytes, and 171 were announced; name all parts", "part_ids"),
        ((0, 0, 1), {}, 400, "a part twice", "part_ids"),
        ((0, 1, 2), {}, 404, "there is no part 'part_none' of upload_", None),
        ((1, 0), {"md5": hashlib.md5(LINES).hexdigest()}, 400, "in that order the parts have the md5 ", "md5"),
        ((0, 1), {"md5": "abc"}, 400, "md5", "md5"),
        ((), {}, 400, "part_ids", "part_ids"),
        ((0, 1), {"order": 1}, 400, "unknown parameter order", "order"),
    ],
)
async def test_parts_that_are_not_the_file_are_refused_and_stay(
    client: httpx.AsyncClient,
    chosen: tuple[int, ...],
    more: dict[str, Any],
    status: int,
    message: str,
    param: str | None,
) -> None:
    upload_id = await begun(client)
    parts = [await part(client, upload_id, LINES[:50]), await part(client, upload_id, LINES[50:]), "part_none"]
    body = {"part_ids": [parts[number] for number in chosen], **more}
    error = await refused(client, f"{UPLOADS}/{upload_id}/complete", body, status)
    assert message in error["message"]
    assert error["param"] == param
    digest = hashlib.md5(LINES).hexdigest().upper()
    done = await ask(client, f"{UPLOADS}/{upload_id}/complete", {"part_ids": parts[:2], "md5": digest})
    assert await content(client, done["file"]["id"]) == LINES


@pytest.mark.parametrize(
    ("changes", "status", "message", "param"),
    [
        ({"filename": "."}, 400, "a file's name has 1 to 255", "filename"),
        ({"filename": None}, 400, "filename", "filename"),
        ({"purpose": "fun"}, 400, "purpose", "purpose"),
        ({"bytes": 0}, 400, "bytes", "bytes"),
        ({"bytes": "5"}, 400, "bytes", "bytes"),
        ({"bytes": 512 * 2**20 + 1}, 413, "536,870,912, the setting max_upload_mb", "bytes"),
        ({"mime_type": ""}, 400, "mime_type", "mime_type"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, 400, "3600", "expires_after.seconds"),
        ({"parts": 3}, 400, "unknown parameter parts", "parts"),
    ],
)
async def test_what_is_wrong_with_an_upload_is_said(
    client: httpx.AsyncClient, changes: dict[str, Any], status: int, message: str, param: str
) -> None:
    body = {"filename": "a", "purpose": "batch", "bytes": 5, "mime_type": "text/plain", **changes}
    error = await refused(client, UPLOADS, body, status)
    assert message in error["message"]
    assert error["param"] == param


async def test_what_is_unknown_is_not_found(client: httpx.AsyncClient) -> None:
    assert (await sent(client, "upload_none", b"x")).status_code == 404
    for path, body in (("complete", {"part_ids": ["part_x"]}), ("cancel", {})):
        error = await refused(client, f"{UPLOADS}/upload_none/{path}", body, 404)
        assert (error["message"], error["code"]) == ("there is no upload 'upload_none'", "not_found")


async def test_parts_have_limits(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_uploads, "MAX_PART_BYTES", 10)
    monkeypatch.setattr(chunked_uploads, "MAX_PARTS", 4)
    upload_id = await begun(client, 10)

    async def refusal(data: bytes, upload_id: str = upload_id) -> tuple[int, str]:
        answer = await sent(client, upload_id, data)
        return answer.status_code, answer.json()["error"]["message"]

    assert await refusal(b"x" * 11) == (413, "a part may have 10 bytes; send smaller ones")
    assert await refusal(b"") == (400, "the part is empty; leave it out")
    for _ in range(3):  # a client that hears no answer sends it again
        await part(client, upload_id, b"x" * 10)
    status, message = await refusal(b"x")
    assert (status, "was announced with 10 bytes, and its parts have more" in message) == (413, True)
    small = await begun(client, 9)
    assert (await refusal(b"x" * 10, small))[0] == 413
    for _ in range(4):
        await part(client, small, b"x")
    assert (await refusal(b"x", small))[1].endswith("has 4 parts, and may have no more; send larger ones")
    assert [len(list((services.uploads.folder / each).iterdir())) for each in (upload_id, small)] == [3, 4]
    no_file = await client.post(f"{UPLOADS}/{small}/parts", files={"data": (None, "x")})
    assert "send the part in `data`" in no_file.json()["error"]["message"]


async def test_an_owner_has_so_many_uploads_at_a_time(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_uploads, "MAX_PENDING", 2)
    first, second = [await begun(client) for _ in range(2)]
    body = {"filename": "a", "purpose": "batch", "bytes": 5, "mime_type": "text/plain"}
    assert "2 of your uploads are pending" in (await refused(client, UPLOADS, body, 429))["message"]
    await ask(client, f"{UPLOADS}/{first}/cancel", {})
    await begun(client)
    set_over(services, second)
    await begun(client)


async def test_a_full_disk_is_said_before_anything_is_sent(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_id = await begun(client)
    made = await part(client, upload_id, LINES)
    usage = disk.shutil.disk_usage(services.settings.home)._replace(free=100)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _folder: usage)
    body = {"filename": "a", "purpose": "batch", "bytes": 101, "mime_type": "text/plain"}
    await refused(client, UPLOADS, body, 507)
    assert (await sent(client, upload_id, LINES)).status_code == 507
    await refused(client, f"{UPLOADS}/{upload_id}/complete", {"part_ids": [made]}, 507)
    with pytest.raises(OutOfSpace):
        await services.chunked_uploads.create(LOCAL.owner, "a", "batch", 101, None)
    monkeypatch.undo()
    assert await content(client, (await completed(client, upload_id, made))["file"]["id"]) == LINES


async def test_what_has_expired_takes_nothing_more_and_is_removed(
    client: httpx.AsyncClient, services: Services
) -> None:
    over, done, kept = [await begun(client) for _ in range(3)]
    parts = {upload_id: await part(client, upload_id, LINES) for upload_id in (over, done, kept)}
    file_id = (await completed(client, done, parts[done]))["file"]["id"]
    set_over(services, over)
    for path, body in (("complete", {"part_ids": [parts[over]]}), ("cancel", {})):
        error = await refused(client, f"{UPLOADS}/{over}/{path}", body)
        assert "has expired, 60 minutes after it began; begin another upload" in error["message"]
    assert (await sent(client, over, b"x")).status_code == 400
    stray = services.uploads.folder / "upload_stray"
    for folder in (stray, stray.with_name("upload_young")):
        folder.mkdir()
    os.utime(stray, (0, 0))
    await services.chunked_uploads.tidy()
    assert folders(services) == sorted([file_id, kept, "upload_young"])
    assert [each.upload_id for each in rows(services, UploadPart)] == [kept]
    assert "has expired" in (await refused(client, f"{UPLOADS}/{over}/cancel", {}))["message"]
    for upload_id in (over, done):
        set_over(services, upload_id, 90_000.0)
    await services.chunked_uploads.tidy()
    assert [upload.id for upload in rows(services, ChunkedUpload)] == [kept]
    await refused(client, f"{UPLOADS}/{over}/cancel", {}, 404)
    assert await content(client, file_id) == LINES, "the file stays"
    with pytest.raises(NotFound):
        await services.chunked_uploads.pending("ann", kept)
    set_over(services, kept)
    with pytest.raises(InvalidInput, match="has expired"):
        await services.chunked_uploads.pending(LOCAL.owner, kept)


async def test_uploads_are_their_owners_alone(services: Services) -> None:
    app = create_app(services)
    ann, bob = [make_key(services, name, owner=name, scopes=["training"]) for name in ("ann", "bob")]
    async with client_of(app, ann) as client:
        upload_id = await begun(client)
        made = await part(client, upload_id, LINES)
    async with client_of(app, bob) as client:
        assert (await sent(client, upload_id, b"x")).status_code == 404
        await refused(client, f"{UPLOADS}/{upload_id}/complete", {"part_ids": [made]}, 404)
        await refused(client, f"{UPLOADS}/{upload_id}/cancel", {}, 404)
        own = await begun(client)
        await refused(client, f"{UPLOADS}/{own}/complete", {"part_ids": [made]}, 404)
    async with client_of(app, ann) as client:
        file_id = (await completed(client, upload_id, made))["file"]["id"]
    async with client_of(app, bob) as client:
        assert (await client.get(f"/v1/files/{file_id}")).status_code == 404
