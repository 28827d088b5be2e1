"""OpenAI's embeddings by raw HTTP: shapes, encodings, and what is refused."""

import base64
import struct
from typing import Any

import httpx
import pytest

from scripted import WIDTH, Scripted
from smelt.api.openai_types import MAX_INPUTS, MAX_PROMPT_CHARS
from smelt.api.services import Services
from smelt.errors import InvalidInput, Overloaded

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

PATH = "/v1/embeddings"


async def test_vectors_have_openais_shape(client: httpx.AsyncClient, served: tuple[Services, Scripted]) -> None:
    answer = await client.post(PATH, json={"model": "default", "input": ["abc", "de"], "dimensions": WIDTH})
    vector = {"object": "embedding", "index": 0, "embedding": [3.0, -1.0]}
    assert answer.json() == {
        "object": "list",
        "data": [vector, {**vector, "index": 1, "embedding": [2.0, -1.0]}],
        "model": "tiny",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }
    (request,) = served[1].embedded
    assert (request.model, request.owner, request.inputs) == ("tiny", "local", ("abc", "de"))


async def test_inputs_of_all_sorts(client: httpx.AsyncClient, served: tuple[Services, Scripted]) -> None:
    for given, inputs in (("a", ("a",)), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))):
        answer = await client.post(PATH, json={"model": "tiny", "input": given, "encoding_format": "base64"})
        assert served[1].embedded[-1].inputs == inputs
        data = answer.json()["data"]
        assert len(data) == len(inputs)
        assert struct.unpack("<2f", base64.b64decode(data[0]["embedding"])) == (len(inputs[0]), -1.0)


async def test_what_is_wrong_is_refused_by_name(client: httpx.AsyncClient) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        *(({"input": value}, "input") for value in (
            None, 5, "", [], [""], ["a", ""], [[]], [1, "a"], ["a"] * (MAX_INPUTS + 1), "x" * (MAX_PROMPT_CHARS + 1))),
        ({}, "input"),
        ({"input": "a", "dimensions": WIDTH + 1}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "colour": 1}, "colour"),
        ({"input": "a", "model": 1}, "model"),
    ]  # fmt: skip
    for body, param in wrong:
        answer = await client.post(PATH, json={"model": "tiny", **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), body
    answer = await client.post(PATH, json={"model": "gpt-9", "input": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_what_goes_wrong_has_a_status(client: httpx.AsyncClient, served: tuple[Services, Scripted]) -> None:
    async def fail(_request: Any) -> Any:
        raise error

    served[1].embed = fail  # type: ignore[method-assign]
    for error, status in ((InvalidInput("too long"), 400), (Overloaded("full", 7), 429)):
        answer = await client.post(PATH, json={"model": "tiny", "input": "a"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (status, str(error))
        assert answer.headers.get("retry-after") == (None if status == 400 else "7")
