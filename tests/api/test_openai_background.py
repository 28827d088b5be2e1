"""Answers in the background: accepted, fetched, waited for, cancelled, asked for twice, and nobody else's."""

import asyncio
from typing import Any

import httpx
import msgspec
import pytest
from starlette.types import Message, Receive, Scope, Send

from gated import client_of, make_key
from smelt.api import telemetry
from smelt.api.app import create_app
from smelt.api.metering import note_background
from smelt.api.services import Services
from smelt.storage.futures import MAX_INLINE, Granted
from smelt.storage.transitions import Submission
from smelt.transport.messages import Completion, Failure, Generate, Result
from smelt.types import TokenLogprob, ToolCall
from spine import until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"model": "tiny", "prompt": "Hello", "background": True}
HI = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "background": True}
WRITTEN = msgspec.msgpack.encode([Completion("written", "stop", 3, 4)])


async def accepted(client: httpx.AsyncClient, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = await client.post(path, json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


async def fetched(client: httpx.AsyncClient, path: str, answer_id: str, wait: float = 0) -> dict[str, Any]:
    answer = await client.get(f"{path}/{answer_id}", params={"wait": wait} if wait else {})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def granted(services: Services) -> tuple[Granted, int]:
    """(what a worker that has come is granted, its epoch)."""
    epoch = await services.ledger.open_epoch()
    (row,) = await services.ledger.next_grants(epoch, 1, ("generate",))
    return row, epoch


async def test_an_answer_is_promised_written_and_fetched(client: httpx.AsyncClient, services: Services) -> None:
    first = await accepted(client, TEXT, HELLO)
    assert first["id"].startswith("cmpl-")
    assert (first["status"], first["object"], first["model"]) == ("queued", "text_completion", "tiny")
    assert (first["choices"], first["usage"], first["error"]) == ([], None, None)
    assert (await fetched(client, TEXT, first["id"]))["status"] == "queued"
    row, epoch = await granted(services)
    assert (await fetched(client, TEXT, first["id"]))["status"] == "in_progress"
    await services.ledger.finish(row.id, epoch, WRITTEN)
    last = await fetched(client, TEXT, first["id"])
    assert (last["status"], last["created"]) == ("completed", first["created"])
    assert last["choices"] == [{"index": 0, "text": "written", "finish_reason": "stop", "logprobs": None}]
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert last["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}


async def test_the_ledger_has_the_whole_request_and_a_seed(client: httpx.AsyncClient, services: Services) -> None:
    await accepted(client, CHAT, {**HI, "max_tokens": 5, "temperature": 0.5})
    row, _ = await granted(services)
    request = msgspec.msgpack.decode(row.request, type=Generate)
    assert (request.model, request.owner, request.messages[0].content) == ("tiny", "local", "Hi")
    assert (request.params.max_tokens, request.params.temperature) == (5, 0.5)
    assert request.params.seed is not None
    assert not request.is_live


async def test_several_choices_with_log_probabilities_and_calls(client: httpx.AsyncClient, services: Services) -> None:
    asked = {"n": 2, "logprobs": True, "tools": [{"type": "function", "function": {"name": "now"}}]}
    first = await accepted(client, CHAT, {**HI, **asked})
    row, epoch = await granted(services)
    request = msgspec.msgpack.decode(row.request or b"", type=Generate)
    assert (request.num_samples, request.params.num_logprobs, len(request.tools)) == (2, 0, 1)
    answers = [
        Completion("a", "length", 3, 1, 2, (TokenLogprob(1, b"a", -0.5),)),
        Completion("", "stop", 3, 4, 3, tool_calls=(ToolCall("c1", "now", "{}"),)),
    ]
    await services.ledger.finish(row.id, epoch, msgspec.msgpack.encode(answers))
    last = await fetched(client, CHAT, first["id"])
    assert [choice["finish_reason"] for choice in last["choices"]] == ["length", "tool_calls"]
    assert last["choices"][0]["logprobs"]["content"][0]["logprob"] == -0.5
    assert last["choices"][1]["message"]["tool_calls"][0]["id"] == "c1"
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (3, 5)


def test_answers_in_the_background_are_counted(services: Services) -> None:
    def count(kind: str) -> float:
        return telemetry.tokens.labels("tiny", kind)._value.get()

    before = {kind: count(kind) for kind in ("prompt", "cached_prompt", "output")}
    request = msgspec.msgpack.encode(Generate("r", "ann", "tiny", num_samples=2, best_of=2))
    done = Result("f", 1, msgspec.msgpack.encode([Completion("a", "stop", 3, 4, 2), Completion("b", "stop", 3, 5, 3)]))
    note_background(services.abuse_checker, Granted("f", "ann", "generate", None, None, 0, request), done)
    note_background(services.abuse_checker, Granted("f", "ann", "train", None, None, 0, b"?"), done)
    failed = Result("f", 1, failure=Failure("x", "y"))
    note_background(services.abuse_checker, Granted("f", "ann", "generate", None, None, 0, request), failed)
    assert {kind: count(kind) - was for kind, was in before.items()} == {"prompt": 3, "cached_prompt": 2, "output": 9}


async def test_a_poll_waits_for_the_answer(client: httpx.AsyncClient, services: Services) -> None:
    first = await accepted(client, CHAT, HI)
    row, epoch = await granted(services)
    polling = asyncio.create_task(fetched(client, CHAT, first["id"], wait=20))
    await until(lambda: row.id in services.ledger._waiting)
    await services.ledger.finish(row.id, epoch, WRITTEN)
    answer = await polling
    assert answer["choices"][0]["message"]["content"] == "written"
    assert (await fetched(client, CHAT, first["id"], wait=20))["status"] == "completed"


async def test_a_wait_that_is_over_tells_how_things_stand(client: httpx.AsyncClient) -> None:
    first = await accepted(client, TEXT, HELLO)
    assert (await fetched(client, TEXT, first["id"], wait=0.01))["status"] == "queued"
    for wait in (-1, 61, "x", "nan", "inf"):
        refused = await client.get(f"{TEXT}/{first['id']}", params={"wait": wait})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "wait")


async def test_a_failure_is_told_with_its_reason(client: httpx.AsyncClient, services: Services) -> None:
    first = await accepted(client, TEXT, HELLO)
    row, epoch = await granted(services)
    failure = msgspec.msgpack.encode(Failure("InvalidInput", "the prompt has 99 tokens"))
    await services.ledger.finish(row.id, epoch, failure, category="user")
    answer = await fetched(client, TEXT, first["id"])
    assert (answer["status"], answer["choices"]) == ("failed", [])
    assert (answer["error"]["message"], answer["error"]["type"]) == (
        "the prompt has 99 tokens",
        "invalid_request_error",
    )


async def test_a_request_that_kills_three_workers_has_failed(client: httpx.AsyncClient, services: Services) -> None:
    first = await accepted(client, TEXT, HELLO)
    for _ in range(3):
        _, epoch = await granted(services)
        await services.ledger.release(epoch, died=True)
    answer = await fetched(client, TEXT, first["id"])
    assert answer["status"] == "failed"
    assert "3 workers" in answer["error"]["message"]


async def test_a_cancelled_answer_is_not_written(client: httpx.AsyncClient, services: Services) -> None:
    first, second = await accepted(client, TEXT, HELLO), await accepted(client, CHAT, HI)
    cancelled = await client.delete(f"{TEXT}/{first['id']}")
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    row, epoch = await granted(services)
    assert row.id == second["id"].removeprefix("chatcmpl-")
    await services.ledger.finish(row.id, epoch, WRITTEN)
    assert (await client.delete(f"{CHAT}/{second['id']}")).json()["status"] == "completed"


async def test_an_answer_that_was_not_fetched_in_time_has_expired(
    client: httpx.AsyncClient, services: Services
) -> None:
    first = await accepted(client, TEXT, HELLO)
    row, epoch = await granted(services)
    await services.ledger.finish(row.id, epoch, WRITTEN)
    assert await services.ledger.expire(0) == 1
    answer = await fetched(client, TEXT, first["id"], wait=5)
    assert (answer["status"], answer["choices"]) == ("expired", [])


async def test_the_same_key_is_the_same_answer(client: httpx.AsyncClient, services: Services) -> None:
    key = {"Idempotency-Key": "k1"}
    first = await accepted(client, TEXT, HELLO, **key)
    again = await asyncio.gather(*[accepted(client, TEXT, dict(reversed(HELLO.items())), **key) for _ in range(8)])
    assert {answer["id"] for answer in again} == {first["id"]}
    assert (await accepted(client, TEXT, HELLO, **{"Idempotency-Key": "k2"}))["id"] != first["id"]
    assert (await accepted(client, TEXT, HELLO))["id"] != first["id"]
    row, epoch = await granted(services)
    await services.ledger.finish(row.id, epoch, WRITTEN)
    repeated = await accepted(client, TEXT, HELLO, **key)
    assert (repeated["status"], repeated["choices"][0]["text"]) == ("completed", "written")


async def test_a_key_that_came_with_another_body_is_refused(client: httpx.AsyncClient) -> None:
    key = {"Idempotency-Key": "k1"}
    await accepted(client, TEXT, HELLO, **key)
    for path, body in ((TEXT, {**HELLO, "max_tokens": 5}), (CHAT, HI)):
        refused = await client.post(path, json=body, headers=key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reused")
    refused = await client.post(TEXT, json=HELLO, headers={"Idempotency-Key": "k" * 256})
    assert refused.status_code == 400


async def test_another_owners_answer_does_not_exist(services: Services) -> None:
    ann, bob = make_key(services, "ann", owner="ann"), make_key(services, "bob", owner="bob")
    app = create_app(services)
    key = {"Idempotency-Key": "k1"}
    async with client_of(app, ann) as of_ann, client_of(app, bob) as of_bob:
        first = await accepted(of_ann, TEXT, HELLO, **key)
        unknown = await of_bob.get(f"{TEXT}/cmpl-{'0' * 32}")
        for answer in (await of_bob.get(f"{TEXT}/{first['id']}"), await of_bob.delete(f"{TEXT}/{first['id']}")):
            own_id = first["id"].removeprefix("cmpl-")
            assert (answer.status_code, answer.text) == (404, unknown.text.replace("0" * 32, own_id))
        assert (await accepted(of_bob, TEXT, {**HELLO, "seed": 1}, **key))["id"] != first["id"]
        assert (await fetched(of_ann, TEXT, first["id"]))["status"] == "queued"


async def test_what_is_no_answer_of_this_api_is_not_found(client: httpx.AsyncClient, services: Services) -> None:
    text, chat = await accepted(client, TEXT, HELLO), await accepted(client, CHAT, HI)
    run = await services.ledger.accept(Submission("local", "train", "f", b"body"))
    digits = text["id"].removeprefix("cmpl-")
    for path in (
        f"{TEXT}/{chat['id']}", f"{CHAT}/{text['id']}", f"{CHAT}/chatcmpl-{digits}", f"{TEXT}/{digits}",
        f"{TEXT}/cmpl-{run}", f"{TEXT}/cmpl-", f"{TEXT}/cmpl-{'x' * 4000}",
    ):  # fmt: skip
        for method in ("GET", "DELETE"):
            answer = await client.request(method, path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")
    assert (await services.ledger.read("local", run)).state == "queued"
    assert (await fetched(client, TEXT, text["id"]))["status"] == "queued"


async def test_a_request_too_long_for_a_row_is_refused(client: httpx.AsyncClient) -> None:
    refused = await client.post(TEXT, json={**HELLO, "prompt": "x" * MAX_INLINE})
    assert refused.status_code == 413
    assert (await client.post(TEXT, json={**HELLO, "prompt": "x" * MAX_INLINE, "background": False})).status_code == 200


async def test_whoever_hangs_up_waits_no_longer(client: httpx.AsyncClient, services: Services) -> None:
    first = await accepted(client, TEXT, HELLO)
    future_id = first["id"].removeprefix("cmpl-")
    leaves: asyncio.Queue[Message] = asyncio.Queue()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "http", "method": "GET", "path": f"{TEXT}/{first['id']}", "query_string": b"wait=60",
        "headers": [(b"host", b"127.0.0.1:8000")], "scheme": "http", "http_version": "1.1", "root_path": "",
        "raw_path": b"", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    polling = asyncio.create_task(_call(create_app(services), scope, leaves.get, send))
    await until(lambda: future_id in services.ledger._waiting)
    leaves.put_nowait({"type": "http.disconnect"})
    await asyncio.wait_for(polling, 5)
    assert sent[0]["status"] == 200
    assert future_id not in services.ledger._waiting


async def _call(app: Any, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)
