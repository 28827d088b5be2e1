"""The two other shapes of completions: by query, and as /api/generate; their defaults, their errors, their refusals."""

import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from scripted import Script, Scripted
from smelt.errors import Overloaded, WorkerLost
from smelt.transport.messages import Finish, Generate
from smelt.types import SamplingParams

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

QUERY, GENERATE = "/completions", "/api/generate"


async def test_the_query_alone_is_a_request_with_its_old_defaults(
    client: httpx.AsyncClient, model_server: Scripted
) -> None:
    answer = await client.post(QUERY, params={"model": "tiny", "prompt": "To be"})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["id"][:5], body["object"], body["model"]) == ("cmpl-", "text_completion", "tiny")
    choice = {"index": 0, "text": "<To be> two three", "logprobs": None, "finish_reason": "stop"}
    assert body["choices"] == [{**choice, "index": index} for index in range(10)]
    assert body["usage"]["total_tokens"] == 33
    (request,) = model_server.asked
    assert (request.prompt, request.num_samples, request.echo) == ("To be", 10, True)
    assert request.params == SamplingParams(max_tokens=500, temperature=0.8, top_k=200, seed=1337)
    await client.post(QUERY, params={"model": "tiny"})
    assert model_server.asked[-1].prompt == "\n"


async def test_each_parameter_may_be_in_the_query_or_in_the_body(
    client: httpx.AsyncClient, model_server: Scripted
) -> None:
    query = {
        "model": "tiny", "prompt": "FILE:/etc/passwd", "max_tokens": "7", "n": "2", "temperature": "0", "stop": "a,b",
        "logit_bias": '{"5": -100, "6": 1.5}', "logprobs": "1", "echo": "false", "best_of": "3", "seed": "5",
        "presence_penalty": "0.5", "frequency_penalty": "-0.5", "top_k": "3", "user": "ann",
    }  # fmt: skip
    body = {
        "model": "tiny", "prompt": "FILE:/etc/passwd", "max_tokens": 7, "n": 2, "temperature": 0, "stop": ["a", "b"],
        "logit_bias": {"5": -100, "6": 1.5}, "logprobs": 1, "echo": False, "best_of": 3, "seed": 5,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "top_k": 3, "user": "ann", "suffix": None,
    }  # fmt: skip
    names = sorted(query)
    half = ({name: query[name] for name in names[::2]}, {name: body[name] for name in names[1::2]})
    for params, content in ((query, None), ({}, body), half):
        answer = await client.post(QUERY, params=params, json=content)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][1]["logprobs"]["tokens"][0] == "<FILE:/etc/passwd>"
    first, *others = [(request.prompt, request.params, request.best_of, request.echo) for request in model_server.asked]
    assert first == (
        "FILE:/etc/passwd",
        SamplingParams(
            max_tokens=7, temperature=0.0, stop=("a", "b"), logit_bias=((5, -100.0), (6, 1.5)), num_logprobs=1,
            seed=5, presence_penalty=0.5, frequency_penalty=-0.5, top_k=3,
        ),
        3,
        False,
    )  # fmt: skip
    assert others == [first, first]


async def test_what_is_wrong_by_query_is_told_in_its_shape(client: httpx.AsyncClient, model_server: Scripted) -> None:
    wrong: list[tuple[dict[str, str], Any, str]] = [
        ({"max_tokens": "many"}, None, "max_tokens"),
        ({"max_tokens": "-1"}, None, "max_tokens"),
        ({"n": "17"}, None, "n"),
        ({"n": "1.5"}, None, "n"),
        ({"temperature": "nan"}, None, "temperature"),
        ({"temperature": "warm"}, None, "temperature"),
        ({"logit_bias": "{"}, None, "logit_bias"),
        ({"logit_bias": "[" * 10_000}, None, "logit_bias"),
        ({"logit_bias": '{"a": 1}'}, None, "logit_bias"),
        ({"stop": "a,b,c,d,e"}, None, "stop"),
        ({"stop": ""}, None, "stop"),
        ({"echo": "perhaps"}, None, "echo"),
        ({"logprobs": "6"}, None, "logprobs"),
        ({"suffix": "end"}, None, "suffix"),
        ({"colour": "blue"}, None, "colour"),
        ({"n": "1"}, {"n": 1}, "n"),
        ({}, {"n": "1"}, "n"),
        ({}, ["a"], "JSON object"),
    ]  # fmt: skip
    for query, body, word in wrong:
        answer = await client.post(QUERY, params={"model": "tiny", "prompt": "x", **query}, json=body)
        assert answer.status_code == 400, (query, answer.text)
        assert set(answer.json()) == {"Status Code", "Error"}
        assert answer.json()["Status Code"] == 400
        assert word in answer.json()["Error"]
    assert not model_server.asked
    for content, status in ((b"{", 400), (b'{"prompt": NaN}', 400), (b"[" * 100_000, 400)):
        answer = await client.post(QUERY, content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["Status Code"]) == (status, status)
    assert (await client.post(QUERY, data={"model": "tiny"})).status_code == 415
    assert (await client.post(f"{QUERY}?model=tiny&model=tiny")).status_code == 400
    assert (await client.post(QUERY)).json()["Error"] == "model is missing"
    assert (await client.get(QUERY)).json() == {"Status Code": 405, "Error": "Method Not Allowed"}
    assert (await client.post(QUERY, params={"model": "out-x/../../y"})).json()["Status Code"] == 404


async def test_a_generated_text_begins_with_its_prompt(client: httpx.AsyncClient, model_server: Scripted) -> None:
    answer = await client.post(GENERATE, json={"prompt": "To be", "top_p": 0.5})
    assert answer.json() == {"text": "<To be> two three", "success": True}
    (request,) = model_server.asked
    assert (request.model, request.prompt, request.echo) == ("tiny", "To be", True)
    assert request.params == SamplingParams(max_tokens=100, temperature=0.8, top_k=200, top_p=0.5)
    await client.post(GENERATE, json={"model": "gpt", "prompt": None, "temperature": 0, "seed": 3})
    assert (model_server.asked[1].prompt, model_server.asked[1].params.temperature) == ("", 0)


async def test_what_is_wrong_in_generate_is_told_in_its_shape(client: httpx.AsyncClient) -> None:
    for body in (
        {"n": 2}, {"stream": True}, {"background": True}, {"echo": False}, {"prompt": ["a", "b"]}, {"prompt": [1]},
        {"max_tokens": -1}, {"max_tokens": "many"}, {"colour": 1}, {"temperature": 3},
    ):  # fmt: skip
        answer = await client.post(GENERATE, json={"prompt": "x", **body})
        assert (answer.status_code, answer.json()["success"]) == (400, False)
        assert next(iter(body)) in answer.json()["error"]
    answer = await client.post(GENERATE, json={"model": "gpt-9"})
    assert (answer.status_code, answer.json()["success"]) == (404, False)
    answer = await client.post(GENERATE, content=json.dumps({}), headers={"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["success"]) == (415, False)


def failing(error: Exception) -> Script:
    async def script(request: Generate) -> AsyncGenerator[str | Finish, None]:
        raise error
        yield ""

    return script


@pytest.mark.parametrize("path", [QUERY, GENERATE])
async def test_what_goes_wrong_has_a_status(client: httpx.AsyncClient, model_server: Scripted, path: str) -> None:
    for error, status in ((Overloaded("full", 7), 429), (WorkerLost("gone"), 503), (RuntimeError("secret"), 500)):
        model_server.script = failing(error)
        answer = await client.post(path, json={"model": "tiny", "prompt": "x"})
        assert answer.status_code == status
        assert "secret" not in answer.text
        assert ("retry-after" in answer.headers) == (status != 500)
    assert model_server.num_running == 0
