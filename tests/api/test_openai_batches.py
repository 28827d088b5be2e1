"""OpenAI's batches: every request answered as its endpoint would, once, in time or not, cancelled, its owner's."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import httpx
import openai
import pytest

from gated import ask, client_of, make_key, refused
from live import serving
from scripted import Scripted, endless, silent
from smelt.api.app import create_app
from smelt.api.openai_batches import answering
from smelt.api.services import Services
from smelt.control.batch_course import FEED_LINES, MAX_AHEAD
from smelt.control.batch_lines import MAX_RUNNING
from smelt.control.batches import BatchRequest
from smelt.control.keys import LOCAL
from smelt.errors import Unavailable, WorkerLost
from smelt.storage import records
from smelt.storage.records import BatchJob
from smelt.transport.messages import Finish, Generate
from spine import until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
OVER = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
async def working(services: Services) -> AsyncIterator[None]:
    async with services.batches.running(answering(services)):
        yield


def request(number: int, url: str = TEXTS, **body: Any) -> dict[str, Any]:
    asked = {"model": "tiny", "prompt": f"p{number}", "max_tokens": 2} | body
    return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": asked}


async def uploaded(client: httpx.AsyncClient, lines: Iterable[Any], purpose: str = "batch") -> str:
    content = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    answer = await client.post("/v1/files", data={"purpose": purpose}, files={"file": ("in.jsonl", content)})
    return str(answer.raise_for_status().json()["id"])


async def begun(client: httpx.AsyncClient, lines: Iterable[Any], endpoint: str = TEXTS, **body: Any) -> dict[str, Any]:
    file_id = await uploaded(client, lines)
    asked = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h", **body}
    return await ask(client, "/v1/batches", asked)


async def read(client: httpx.AsyncClient, batch: dict[str, Any]) -> dict[str, Any]:
    answer = await client.get(f"/v1/batches/{batch['id']}")
    return dict(answer.raise_for_status().json())


async def ended(client: httpx.AsyncClient, batch: dict[str, Any]) -> dict[str, Any]:
    return await reached(client, batch, lambda now: now["status"] in OVER)


async def reached(
    client: httpx.AsyncClient, batch: dict[str, Any], condition: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The batch once that is so: its users have to ask, too."""
    while not condition(now := await read(client, batch)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return now


def num_done(batch: dict[str, Any]) -> int:
    return int(batch["request_counts"]["completed"])


async def told(client: httpx.AsyncClient, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of a file that came of a batch, by their custom ids."""
    if file_id is None:
        return {}
    content = (await client.get(f"/v1/files/{file_id}/content")).raise_for_status().text
    lines = [json.loads(line) for line in content.splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


@pytest.mark.usefixtures("working")
async def test_every_request_is_answered_as_its_endpoint_would(
    client: httpx.AsyncClient, services: Services, model_server: Scripted
) -> None:
    lines = [request(number) for number in range(100)]
    lines[7] = request(7, max_tokens=-1)
    lines[8] = request(8, model="unknown")
    lines[9] = request(9, stream=True)
    batch = await begun(client, lines, metadata={"for": "me"})
    assert (batch["status"], batch["completion_window"], batch["metadata"]) == ("validating", "24h", {"for": "me"})
    done = await ended(client, batch)
    assert done["status"] == "completed"
    assert done["request_counts"] == {"total": 100, "completed": 97, "failed": 3}
    assert done["model"] is None  # two of them
    assert done["usage"]["input_tokens"] == 97 * 3
    assert done["usage"]["output_tokens"] == 97 * 2
    assert done["created_at"] <= done["in_progress_at"] <= done["finalizing_at"] <= done["completed_at"]
    answers, errors = await told(client, done["output_file_id"]), await told(client, done["error_file_id"])
    assert list(answers) == [f"id-{number}" for number in range(100) if number not in (7, 8, 9)]
    response = answers["id-5"]["response"]
    assert (response["status_code"], response["body"]["object"]) == (200, "text_completion")
    assert response["body"]["choices"][0]["text"] == "<p5> two"
    assert {name: line["response"]["status_code"] for name, line in errors.items()} == {
        "id-7": 400,
        "id-8": 404,
        "id-9": 400,
    }
    assert errors["id-7"]["response"]["body"]["error"]["param"] == "max_tokens"
    assert sorted(str(asked.prompt) for asked in model_server.asked) == sorted(
        name.replace("id-", "p") for name in answers
    )
    assert not any(asked.is_live for asked in model_server.asked)
    await ask(client, TEXTS, request(0)["body"])
    assert model_server.asked[-1].is_live
    await until(lambda: not list((services.settings.home / "batches").iterdir()))
    assert await services.ledger.states(batch["id"]) == []


@pytest.mark.usefixtures("working")
async def test_chats_and_embeddings_are_answered_too(client: httpx.AsyncClient, model_server: Scripted) -> None:
    says = [{"role": "user", "content": "hello"}]
    chat = {"custom_id": "a", "method": "POST", "url": CHATS, "body": {"model": "tiny", "messages": says}}
    done = await ended(client, await begun(client, [chat], CHATS))
    answer = (await told(client, done["output_file_id"]))["a"]["response"]["body"]
    assert answer["choices"][0]["message"]["content"] == "<hello> two three"
    assert done["model"] == "tiny"
    url = "/v1/embeddings"
    embed = {"custom_id": "b", "method": "POST", "url": url, "body": {"model": "tiny", "input": ["four", "x"]}}
    done = await ended(client, await begun(client, [embed], url))
    vectors = (await told(client, done["output_file_id"]))["b"]["response"]["body"]["data"]
    assert [vector["embedding"] for vector in vectors] == [[4, -1], [1, -1]]
    assert (done["usage"]["input_tokens"], done["usage"]["output_tokens"]) == (5, 0)
    assert [asked.is_live for asked in model_server.embedded] == [False]


@pytest.mark.usefixtures("working")
async def test_a_bad_file_fails_with_the_numbers_of_its_lines(client: httpx.AsyncClient) -> None:
    lines = [
        request(1),
        b"",
        b"{not json",
        {"custom_id": "x"},
        request(1),
        request(6, url=CHATS),
        request(7) | {"method": "GET"},
        request(8) | {"body": [1]},
        request(9) | {"custom_id": ""},
        request(10) | {"more": 1},
    ]
    failed = await ended(client, await begun(client, lines))
    assert failed["status"] == "failed"
    assert failed["failed_at"] is not None
    found = [(error["line"], error["code"], error["param"]) for error in failed["errors"]["data"]]
    assert found == [
        (3, "invalid_json_line", None),
        (4, "invalid_json_line", None),
        (5, "duplicate_custom_id", "custom_id"),
        (6, "invalid_url", "url"),
        (7, "invalid_method", "method"),
        (8, "invalid_body", "body"),
        (9, "invalid_custom_id", "custom_id"),
        (10, "invalid_json_line", None),
    ]
    assert "line 5: custom_id 'id-1' is that of line 1 too" in failed["errors"]["data"][2]["message"]
    failed = await ended(client, await begun(client, [b" "]))
    assert failed["errors"]["data"][0]["code"] == "empty_file"
    failed = await ended(client, await begun(client, [b"[" * 9_000_000, request(2), b"x"]))
    assert [(error["line"], error["code"]) for error in failed["errors"]["data"]] == [
        (1, "line_too_long"),
        (3, "invalid_json_line"),
    ]


async def is_ahead(services: Services, batch: dict[str, Any]) -> None:
    while len(await services.ledger.states(batch["id"])) < MAX_AHEAD - FEED_LINES:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@pytest.mark.usefixtures("working")
async def test_only_a_few_are_under_way_at_once(
    client: httpx.AsyncClient, services: Services, model_server: Scripted
) -> None:
    model_server.script = silent
    batches = [await begun(client, [request(number) for number in range(200)]) for _ in range(2)]
    await until(lambda: model_server.num_running == MAX_RUNNING)
    for batch in batches:
        await asyncio.wait_for(is_ahead(services, batch), 30)
        assert len(await services.ledger.states(batch["id"])) <= MAX_AHEAD
    assert len(model_server.asked) == MAX_RUNNING


@pytest.mark.usefixtures("working")
async def test_a_cancelled_batch_keeps_what_it_has(client: httpx.AsyncClient, model_server: Scripted) -> None:
    async def first_ones(request: Generate) -> AsyncIterator[str | Finish]:
        if len(model_server.asked) > 3:
            await asyncio.Event().wait()
        yield "done"

    model_server.script = first_ones
    batch = await begun(client, [request(number) for number in range(300)])
    await reached(client, batch, lambda now: num_done(now) == 3)
    cancelled = await ask(client, f"/v1/batches/{batch['id']}/cancel", {})
    assert cancelled["status"] == "cancelling"
    done = await ended(client, batch)
    assert done["status"] == "cancelled"
    assert done["cancelling_at"] <= done["cancelled_at"]
    assert done["request_counts"] == {"total": 300, "completed": 3, "failed": 0}
    assert len(await told(client, done["output_file_id"])) == 3
    assert done["error_file_id"] is None
    assert model_server.num_running == 0
    assert await ask(client, f"/v1/batches/{batch['id']}/cancel", {}) == done


@pytest.mark.usefixtures("working")
async def test_what_is_not_answered_in_time_is_told_of(
    client: httpx.AsyncClient, services: Services, model_server: Scripted
) -> None:
    model_server.script = endless
    upload = await uploaded(client, [request(number) for number in range(100)])
    batch = await services.batches.create(LOCAL.owner, None, BatchRequest(TEXTS, upload, 0.5))
    done = await ended(client, {"id": batch.id})
    assert (done["status"], done["output_file_id"]) == ("expired", None)
    errors = await told(client, done["error_file_id"])
    assert len(errors) == 100
    assert errors["id-99"]["response"] is None
    assert errors["id-99"]["error"]["code"] == "batch_expired"


async def test_what_one_process_has_begun_the_next_one_ends(
    client: httpx.AsyncClient, services: Services, model_server: Scripted
) -> None:
    async def some(request: Generate) -> AsyncIterator[str | Finish]:
        if len(model_server.asked) > 20:
            await asyncio.Event().wait()
        yield f"<{request.prompt}>"

    async def all_of_them(request: Generate) -> AsyncIterator[str | Finish]:
        yield f"<{request.prompt}>"

    model_server.script = some
    async with services.batches.running(answering(services)):
        batch = await begun(client, [request(number) for number in range(150)])
        await reached(client, batch, lambda now: num_done(now) == 20)
    answered = {asked.prompt for asked in model_server.asked[:20]}
    model_server.script, model_server.asked = all_of_them, []
    (services.settings.home / "batches" / "batch_never_accepted").mkdir()
    async with services.batches.running(answering(services)):
        done = await ended(client, batch)
        await until(lambda: not list((services.settings.home / "batches").iterdir()))
    assert done["request_counts"] == {"total": 150, "completed": 150, "failed": 0}
    answers = await told(client, done["output_file_id"])
    texts = {name: line["response"]["body"]["choices"][0]["text"] for name, line in answers.items()}
    assert texts == {f"id-{number}": f"<p{number}>" for number in range(150)}
    assert len(model_server.asked) == 130
    assert answered.isdisjoint(asked.prompt for asked in model_server.asked)


@pytest.mark.usefixtures("working")
async def test_a_request_is_tried_again_but_not_for_ever(
    client: httpx.AsyncClient, model_server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smelt.control.batch_lines.LONGEST_PAUSE_S", 0.01)
    num_tries: dict[object, int] = {}

    async def frail(request: Generate) -> AsyncIterator[str | Finish]:
        num_tries[request.prompt] = num_tries.get(request.prompt, 0) + 1
        if request.prompt == "p1" or (request.prompt == "p2" and num_tries["p2"] < 3):
            raise WorkerLost("it is gone")
        if request.prompt == "p3" and num_tries["p3"] < 10:
            raise Unavailable("not now")
        yield "well"

    model_server.script = frail
    done = await ended(client, await begun(client, [request(number) for number in range(5)]))
    assert done["request_counts"] == {"total": 5, "completed": 4, "failed": 1}
    assert num_tries == {"p0": 1, "p1": 3, "p2": 3, "p3": 10, "p4": 1}
    [error] = (await told(client, done["error_file_id"])).values()
    assert (error["custom_id"], error["response"]["status_code"]) == ("id-1", 503)


async def test_what_is_wrong_with_a_batch_is_said(client: httpx.AsyncClient, services: Services) -> None:
    file_id = await uploaded(client, [request(1)])
    asked = {"input_file_id": file_id, "endpoint": TEXTS, "completion_window": "24h"}
    for change, param in (
        ({"endpoint": "/v1/responses"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "169h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {f"k{n}": "v" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"more": 1}, "more"),
    ):
        assert (await refused(client, "/v1/batches", asked | change))["param"] == param
    other = await uploaded(client, [request(1)], "fine-tune")
    error = await refused(client, "/v1/batches", asked | {"input_file_id": other})
    assert "purpose fine-tune" in error["message"]
    await refused(client, "/v1/batches", asked | {"input_file_id": "file-no"}, 404)
    assert (await client.get("/v1/batches/batch_no")).status_code == 404
    for number in range(50):
        record = BatchJob(owner=LOCAL.owner, id=f"b{number}", endpoint="", input_file_id="", key_id=None, deadline=0)
        services.writer.write(lambda connection, record=record: records.add(connection, record)).result(5)
    assert "50 of your batches" in (await refused(client, "/v1/batches", asked, 429))["message"]


async def test_a_batch_that_is_asked_for_again_is_the_same(client: httpx.AsyncClient) -> None:
    asked = {"input_file_id": await uploaded(client, [request(1)]), "endpoint": TEXTS, "completion_window": "24h"}
    key = {"Idempotency-Key": "mine"}
    batches = [(await client.post("/v1/batches", json=asked, headers=key)).json() for _ in range(2)]
    assert batches[0] == batches[1]
    other = await client.post("/v1/batches", json=asked | {"metadata": {"a": "b"}}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert len((await client.get("/v1/batches")).json()["data"]) == 1


async def test_batches_are_their_owners_alone(services: Services) -> None:
    app = create_app(services)
    ann, bob = [make_key(services, name, owner=name, scopes=["inference"]) for name in ("ann", "bob")]
    async with client_of(app, ann) as client:
        batch = await begun(client, [request(1)])
    async with client_of(app, bob) as client:
        place = f"/v1/batches/{batch['id']}"
        assert (await client.get(place)).status_code == 404
        assert (await client.post(f"{place}/cancel")).status_code == 404
        assert (await client.get("/v1/batches")).json()["data"] == []
        asked = {"input_file_id": batch["input_file_id"], "endpoint": TEXTS, "completion_window": "24h"}
        await refused(client, "/v1/batches", asked, 404)


async def test_the_input_may_be_deleted_meanwhile(client: httpx.AsyncClient, services: Services) -> None:
    batch = await begun(client, [request(1)])
    await client.delete(f"/v1/files/{batch['input_file_id']}")
    async with services.batches.running(answering(services)):
        assert (await ended(client, batch))["request_counts"]["completed"] == 1


async def test_the_output_expires_when_its_owner_said(client: httpx.AsyncClient, services: Services) -> None:
    async with services.batches.running(answering(services)):
        kept = {"anchor": "created_at", "seconds": 7200}
        done = await ended(client, await begun(client, [request(1)], output_expires_after=kept))
    file = (await client.get(f"/v1/files/{done['output_file_id']}")).json()
    assert (file["purpose"], file["filename"]) == ("batch_output", f"{done['id']}_output.jsonl")
    assert file["expires_at"] == pytest.approx(time.time() + 7200, abs=60)


def test_openais_client_drives_a_batch(services: Services) -> None:
    url = serving(create_app(services), lifespan="on")
    with url as base, openai.OpenAI(base_url=f"{base}/v1", api_key="none") as client:
        lines = "".join(json.dumps(request(number)) + "\n" for number in range(30))
        file = client.files.create(file=("in.jsonl", lines.encode()), purpose="batch")
        batches = [
            client.batches.create(input_file_id=file.id, endpoint=TEXTS, completion_window="24h") for _ in range(3)
        ]
        assert [batch.id for batch in client.batches.list(limit=2)] == [batch.id for batch in batches[::-1]]
        batch = batches[0]
        while batch.status not in OVER:
            time.sleep(0.02)  # as its users do
            batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 30
        assert batch.output_file_id is not None
        answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        assert [answer["response"]["body"]["choices"][0]["text"] for answer in answers] == [
            f"<p{n}> two" for n in range(30)
        ]
        assert client.batches.cancel(batches[2].id).status in ("cancelling", "cancelled", "completed", "finalizing")
