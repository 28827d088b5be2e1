"""Errors as HTTP: each has a status and a body in its family's shape, and says nothing that is not the client's."""

import inspect
import json

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from gated import client_of
from smelt import errors
from smelt.api import failures
from smelt.errors import SmeltError, Unavailable, WorkerLost

pytestmark = pytest.mark.anyio
ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
SECRET = "cannot open /home/ann/.smelt/smelt.db"


class Prompt(BaseModel):
    """A body with two faults in it, if one likes."""

    prompt: str
    max_tokens: int = 1


def application(error: Exception | None = None) -> FastAPI:
    app = FastAPI()
    failures.install(app)

    async def fail(body: Prompt | None = None) -> None:
        if error is not None:
            raise error

    app.get("/v1/models")(fail)
    app.get("/v1/runs")(fail)
    app.post("/v1/completions")(fail)
    app.post("/v1/runs")(fail)
    return app


def client(error: Exception | None = None) -> httpx.AsyncClient:
    app = application(error)

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {"request_id": "r1"}
        await app(scope, receive, send)

    return client_of(named)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
async def test_every_error_has_a_status_and_a_body(kind: type[SmeltError]) -> None:
    error = kind(SECRET)
    status = failures.status_of(error)
    assert 400 <= status < 600
    async with client(error) as asking:
        openai, detail = await asking.get("/v1/models"), await asking.get("/v1/runs")
    assert (openai.status_code, detail.status_code) == (status, status)
    assert set(openai.json()["error"]) == {"message", "type", "param", "code"}
    assert openai.json()["error"]["message"] == detail.json()["detail"] == failures.message_of(error, "r1")
    assert (SECRET in detail.text) == (status < 500 or isinstance(error, Unavailable))
    assert ("retry-after" in detail.headers) == (status in (429, 503))


def test_the_nearest_class_decides() -> None:
    assert failures.status_of(errors.TooLarge("x")) == 413
    assert failures.status_of(errors.DataError("x")) == 400
    assert failures.status_of(errors.NonFiniteLoss("x")) == 500
    assert failures.status_of(RuntimeError("x")) == 500


async def test_a_retry_is_announced() -> None:
    async with client(WorkerLost("the worker is gone", retry_after_s=7)) as asking:
        assert (await asking.get("/v1/models")).headers["retry-after"] == "7"


async def test_a_fault_in_the_body_is_named() -> None:
    body = {"prompt": 5, "max_tokens": "many"}
    async with client() as asking:
        openai, detail = await asking.post("/v1/completions", json=body), await asking.post("/v1/runs", json=body)
        broken = await asking.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert openai.status_code == 400
    assert openai.json()["error"] == {
        "message": "prompt: Input should be a valid string",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": None,
    }
    assert detail.status_code == 422
    assert [fault["loc"] for fault in detail.json()["detail"]] == [["body", "prompt"], ["body", "max_tokens"]]
    assert "many" not in detail.text
    assert (broken.status_code, broken.json()["error"]["param"]) == (400, None)


async def test_what_the_router_says_has_the_familys_shape_too() -> None:
    async with client() as asking:
        wrong_method = await asking.delete("/v1/models")
        assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "GET")
        assert wrong_method.json()["error"]["code"] == "method_not_allowed"
        assert (await asking.get("/v1/models/a/b")).json()["error"]["code"] == "not_found"
        assert (await asking.get("/elsewhere")).json() == {"detail": "Not Found"}


def test_a_stream_can_end_with_the_same_words() -> None:
    event = failures.openai_error(errors.InvalidInput("n must be 1", param="n"))
    assert event["error"]["param"] == "n"
    assert SECRET not in json.dumps(failures.openai_error(errors.StorageError(SECRET), "r1"))
