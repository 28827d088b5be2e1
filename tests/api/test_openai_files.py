"""OpenAI's files: uploaded to the disk with its own client, paged, read, deleted, nobody else's, and gone in time."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gated import client_of, make_key
from live import serving
from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.control.keys import LOCAL
from smelt.control.uploads import Uploads
from smelt.errors import NotFound
from smelt.storage import records
from smelt.storage.records import Upload

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

BOUNDARY = "limit"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


@pytest.fixture
def live(services: Services) -> Iterator[openai.OpenAI]:
    with serving(create_app(services)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


def part(name: str, body: str, filename: str | None = None) -> str:
    named = "" if filename is None else f'; filename="{filename}"'
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n{body}\r\n'


def form(*parts: str) -> bytes:
    return ("".join(parts) + f"--{BOUNDARY}--\r\n").encode()


async def upload(client: httpx.AsyncClient, content: bytes = b"{}\n", name: str = "a.jsonl", **fields: str) -> Any:
    fields = {"purpose": "fine-tune", **fields}
    return await client.post("/v1/files", data=fields, files={"file": (name, content)})


async def refused(client: httpx.AsyncClient, body: bytes, status: int = 400, **headers: str) -> dict[str, Any]:
    answer = await client.post("/v1/files", content=body, headers=FORM | headers)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def test_openais_client_uploads_pages_reads_and_deletes(live: openai.OpenAI) -> None:
    content = os.urandom(3_000_000)
    made = [
        live.files.create(file=(f"{n}.jsonl", content[n:]), purpose="batch" if n % 2 else "fine-tune") for n in range(5)
    ]
    assert (made[0].bytes, made[0].filename, made[0].status) == (len(content), "0.jsonl", "processed")
    assert made[0].expires_at is None
    assert made[1].expires_at == pytest.approx(time.time() + 30 * 86400, abs=60)
    assert live.files.retrieve(made[2].id) == made[2]
    assert live.files.content(made[3].id).read() == content[3:]
    assert [file.id for file in live.files.list(limit=2)] == [file.id for file in made[::-1]]
    assert [file.id for file in live.files.list(purpose="batch", order="asc")] == [made[1].id, made[3].id]
    assert live.files.delete(made[4].id).deleted
    with pytest.raises(openai.NotFoundError):
        live.files.retrieve(made[4].id)


def test_a_file_expires_when_its_owner_said(live: openai.OpenAI, services: Services) -> None:
    kept = {"anchor": "created_at", "seconds": 3600}
    file = live.files.create(file=b"x", purpose="user_data", expires_after=kept)
    assert file.expires_at == file.created_at + 3600


async def test_what_has_expired_is_not_there_and_soon_off_the_disk(
    services: Services, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = [(await upload(client)).json()["id"] for _ in range(2)]
    found = await services.uploads.find(LOCAL.owner, first)
    over = replace(found, expires=time.time() - 1)
    services.writer.write(lambda connection: records.replace(connection, over)).result(5)
    assert (await client.get(f"/v1/files/{first}")).status_code == 404
    assert [file["id"] for file in (await client.get("/v1/files")).json()["data"]] == [second]
    await services.uploads.tidy()
    assert [folder.name for folder in services.uploads.folder.iterdir()] == [second]


async def test_a_form_may_come_in_any_order_and_in_single_bytes(services: Services, client: httpx.AsyncClient) -> None:
    body = form(part("file", "one\r\n--limi\r\n", "../../etc/päss.JSONL"), part("purpose", "evals"))

    async def pieces() -> Any:
        for byte in body:
            yield bytes([byte])

    answer = await client.post("/v1/files", content=pieces(), headers=FORM)
    assert answer.status_code == 200, answer.text
    file = answer.json()
    assert (file["filename"], file["bytes"], file["purpose"]) == ("päss.JSONL", 13, "evals")
    found = await services.uploads.find(LOCAL.owner, file["id"])
    assert services.uploads.path(found) == services.settings.home / "uploads" / file["id"] / "content.jsonl"
    assert services.uploads.path(found).read_bytes() == b"one\r\n--limi\r\n"
    content = await client.get(f"/v1/files/{file['id']}/content")
    assert content.headers["content-disposition"] == "attachment; filename*=utf-8''p%C3%A4ss.JSONL"
    assert content.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("parts", "message", "param"),
    [
        ([part("purpose", "batch")], "has no file", "file"),
        ([part("file", "", "a"), part("purpose", "batch")], "empty", "file"),
        ([part("file", "x", "a")], "purpose must be one of assistants, batch, fine-tune", "purpose"),
        ([part("file", "x", "a"), part("purpose", "fun")], "purpose must be one of", "purpose"),
        ([part("file", "x", "a"), part("file", "y", "b")], "may have one file", "file"),
        ([part("other", "x", "a")], "may have one file, named 'file'", "other"),
        ([part("file", "x", "."), part("purpose", "batch")], "a file's name has", "file"),
        ([part("file", "x", "n" * 256), part("purpose", "batch")], "a file's name has 1 to 255", "file"),
        ([part("file", "x", "a"), part("purpose", "batch"), part("x", "1")], "unknown parameter x", "x"),
        (
            [part("file", "x", "a"), part("purpose", "batch"), part("expires_after[seconds]", "9999")],
            "anchor must be created_at",
            "expires_after",
        ),
        (
            [
                part("file", "x", "a"),
                part("purpose", "batch"),
                part("expires_after[anchor]", "created_at"),
                part("expires_after[seconds]", "60"),
            ],
            "from 3600 to 2592000",
            "expires_after",
        ),
    ],
)
async def test_what_is_wrong_with_a_form_is_said(
    services: Services, client: httpx.AsyncClient, parts: list[str], message: str, param: str
) -> None:
    error = await refused(client, form(*parts))
    assert message in error["message"]
    assert error["param"] == param
    assert not list(services.uploads.folder.iterdir())


async def test_a_form_that_is_none_or_too_much_is_refused(services: Services, client: httpx.AsyncClient) -> None:
    whole = form(part("file", "x", "a"), part("purpose", "batch"))
    assert "cut short" in (await refused(client, whole[:-6]))["message"]
    assert "not the form" in (await refused(client, b"{}"))["message"]
    assert "Content-Type" in (await refused(client, whole, 415, **{"content-type": "application/json"}))["message"]
    error = await refused(client, whole, **{"content-type": "multipart/form-data"})
    assert "names no boundary" in error["message"]
    assert "no name" in (await refused(client, form(f"--{BOUNDARY}\r\n\r\nx\r\n")))["message"]
    assert "65,536 bytes" in (await refused(client, form(part("purpose", "x" * 70_000)), 413))["message"]
    many = form(*[part(f"f{n}", "x") for n in range(101)])
    assert "100 fields" in (await refused(client, many, 413))["message"]
    assert not list(services.uploads.folder.iterdir())


async def test_an_upload_has_a_limit_of_its_own(services: Services) -> None:
    settings = services.settings.model_copy(update={"max_upload_mb": 2, "max_body_mb": 1})
    async with client_of(create_app(replace(services, settings=settings))) as client:
        assert (await upload(client, b"x" * 3 * 2**19)).status_code == 200
        answer = await upload(client, b"x" * 2**21)
    assert answer.status_code == 413
    assert "max_upload_mb" in answer.json()["error"]["message"]
    assert len(list(services.uploads.folder.iterdir())) == 1


async def test_files_are_their_owners_alone(services: Services) -> None:
    app = create_app(services)
    ann, bob = [make_key(services, name, owner=name, scopes=["training"]) for name in ("ann", "bob")]
    async with client_of(app, ann) as client:
        file_id = (await upload(client)).json()["id"]
        place = f"/v1/files/{file_id}"
    async with client_of(app, bob) as client:
        assert [(await client.get(path)).status_code for path in (place, f"{place}/content")] == [404, 404]
        assert (await client.delete(place)).status_code == 404
        assert (await client.get("/v1/files")).json()["data"] == []
        assert (await client.get(f"/v1/files?after={file_id}")).status_code == 404
    async with client_of(app, ann) as client:
        assert (await client.get(place)).json()["id"] == file_id


async def test_a_file_that_is_lent_outlives_its_deletion(services: Services, tmp_path: Path) -> None:
    uploads = services.uploads
    async with client_of(create_app(services)) as client:
        file_id = (await upload(client, b"kept")).json()["id"]
        found = await uploads.find(LOCAL.owner, file_id)
        for _ in range(2):
            await uploads.lend(found, tmp_path / "mine")
        assert (await client.delete(f"/v1/files/{file_id}")).json()["deleted"]
    assert (tmp_path / "mine").read_bytes() == b"kept"
    with pytest.raises(NotFound):
        await uploads.lend(found, tmp_path / "mine")


async def test_a_file_made_here_is_given_once(services: Services, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"line\n")
    made = Upload(id=f"file-{'0' * 24}", owner="ann", name="out.jsonl", purpose="batch_output", suffix="", num_bytes=0)
    assert await services.uploads.adopt(tmp_path / "out", made) == await services.uploads.adopt(tmp_path / "out", made)
    [found] = await services.uploads.page("ann", 9)
    assert found == replace(made, num_bytes=5, suffix=".jsonl")
    assert services.uploads.path(found).read_bytes() == b"line\n"
    assert [folder.name for folder in services.uploads.folder.iterdir()] == [made.id]


async def test_what_a_crash_has_left_is_removed_in_time(services: Services) -> None:
    uploads: Uploads = services.uploads
    for name in (".tmp-1", "file-1", ".tmp-2"):
        (uploads.folder / name).mkdir(parents=True)
    for name in (".tmp-1", "file-1"):
        os.utime(uploads.folder / name, (0, 0))
    await uploads.tidy()
    assert [folder.name for folder in uploads.folder.iterdir()] == [".tmp-2"]
