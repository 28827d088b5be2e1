"""Datasets over HTTP: made of a form or of JSON, listed, their rows, removed, and what each may not be asked for."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from gated import client_of, make_key
from live import with_caller
from smelt.api import datasets, failures
from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.control.dataset_requests import DatasetRequests
from smelt.control.keys import Caller

pytestmark = pytest.mark.anyio

ADA = Caller("ada", "key", frozenset({"training"}))
ROWS = "text,label\n" + "".join(f'"The news of day {number}, as it came.",{number}\n' for number in range(30))
FORM = {"name": "news", "tokenizer": "bytes", "block_size": "16", "val_fraction": "0.2"}


@pytest.fixture
def requests(services: Services) -> DatasetRequests:
    return DatasetRequests(services.settings, services.ledger, services.uploads)


@pytest.fixture
async def ada(services: Services, requests: DatasetRequests) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    failures.install(app)
    app.include_router(datasets.router(services, requests))
    async with client_of(with_caller(app, ADA)) as client, requests.running():
        yield client


async def said(answer: httpx.Response, status: int) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_a_form_with_a_file_becomes_a_dataset(ada: httpx.AsyncClient) -> None:
    sent = await ada.post("/v1/datasets", data=FORM, files={"file": ("news.csv", ROWS)})
    accepted = await said(sent, 202)
    assert (accepted["name"], accepted["source"], accepted["owner"]) == ("news", "news.csv", "ada")
    made = await said(await ada.get("/v1/datasets/news", params={"wait": 60}), 200)
    assert (made["state"], made["num_train_documents"], made["num_val_documents"]) == ("ready", 24, 6)
    assert (await said(await ada.get("/v1/datasets"), 200))["data"] == [made]
    rows = await said(await ada.get("/v1/datasets/news/rows", params={"offset": 22, "limit": 1}), 200)
    (row,) = rows.pop("data")
    assert rows == {"num_rows": 24, "has_more": True}
    assert (row["index"], row["is_cut"], row["text"][:15]) == (22, False, "The news of day")
    assert (await ada.delete("/v1/datasets/news")).status_code == 204
    assert (await said(await ada.get("/v1/datasets/news"), 404))["detail"].startswith("there is no dataset 'news'")


async def test_a_dataset_that_a_run_waits_for_stays(ada: httpx.AsyncClient, services: Services) -> None:
    await said(await ada.post("/v1/datasets", data=FORM, files={"file": ("news.csv", ROWS)}), 202)
    await said(await ada.get("/v1/datasets/news", params={"wait": 60}), 200)
    run = await services.run_requests.create({"dataset": "news", "block_size": 16}, "ada")
    assert run.id in (await said(await ada.delete("/v1/datasets/news"), 409))["detail"]
    await services.run_requests.cancel(run.id)
    assert (await ada.delete("/v1/datasets/news")).status_code == 204


async def test_json_names_a_source_or_an_upload(ada: httpx.AsyncClient) -> None:
    body = {"name": "docs", "source": "builtin:pydoc", "tokenizer": "bytes"}
    await said(await ada.post("/v1/datasets", json=body), 202)
    assert (await said(await ada.get("/v1/datasets/docs?wait=60"), 200))["state"] == "ready"
    rows = await said(await ada.get("/v1/datasets/docs/rows?limit=100"), 200)
    assert len(rows["data"]) == 100
    assert max(len(row["text"]) for row in rows["data"]) <= 4000 < max(row["num_tokens"] for row in rows["data"])
    assert (await said(await ada.get("/v1/datasets/docs/rows?limit=101"), 422))["detail"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "x"}, 400, "give either source or file_id"),
        ({"name": "x", "source": "/etc/passwd"}, 400, "neither an http"),
        ({"name": "x", "source": "hf:a/b"}, 403, "an administrator adds it"),
        ({"name": "x", "file_id": "file-1"}, 404, "there is no file"),
        ({"name": "x", "fle": "y"}, 400, "unknown key 'fle'"),
        ({"name": "../x", "source": "builtin:pydoc"}, 400, "not a name for a dataset"),
        ([1], 400, "must be a JSON object"),
    ],
)
async def test_what_is_wrong_is_named(ada: httpx.AsyncClient, body: Any, status: int, words: str) -> None:
    assert words in (await said(await ada.post("/v1/datasets", json=body), status))["detail"]


async def test_a_form_has_one_source(ada: httpx.AsyncClient, services: Services) -> None:
    sent = await ada.post("/v1/datasets", data=FORM | {"source": "builtin:pydoc"}, files={"file": ("news.csv", ROWS)})
    assert "leave them out" in (await said(sent, 400))["detail"]
    assert list(services.uploads.folder.glob("*")) == []
    without = await ada.post("/v1/datasets", files={"name": (None, "docs"), "source": (None, "builtin:pydoc")})
    assert (await said(without, 202))["source"] == "builtin:pydoc"


async def test_the_hub_is_read_for_administrators_and_nothing_for_who_may_not_train(services: Services) -> None:
    body = {"name": "hub", "source": "hf:org/name"}
    admin_key, reader_key = (make_key(services, scope, scopes=[scope]) for scope in ("admin", "inference"))
    app = create_app(services)
    async with client_of(app, admin_key) as admin:
        assert (await said(await admin.post("/v1/datasets", json=body), 202))["state"] == "queued"
        assert (await admin.delete("/v1/datasets/hub")).status_code == 204
    async with client_of(app, reader_key) as reader:
        await said(await reader.get("/v1/datasets"), 403)
