"""OpenAI's own client, and clients that leave, against a real server on a socket."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from live import serving
from scripted import Script, Scripted, endless, scripted, silent
from smelt.api import streaming
from smelt.api.app import create_app
from smelt.errors import Unavailable, WorkerLost
from smelt.transport.messages import Finish, Generate

pytestmark = pytest.mark.timeout(60)

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[str, Scripted]]:
    """(address, model server) of a server."""
    with scripted(tmp_path / "home") as (services, model_server), serving(create_app(services)) as address:
        yield address, model_server


@pytest.fixture
def model_server(started: tuple[str, Scripted]) -> Scripted:
    return started[1]


@pytest.fixture
def client(started: tuple[str, Scripted]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{started[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def eventually(condition: Callable[[], bool], seconds: float = 5) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def after_two(error: Exception) -> Script:
    async def script(request: Generate) -> AsyncGenerator[str | Finish, None]:
        yield "a"
        yield "b"
        raise error

    return script


def hear(chunks: openai.Stream[Any], heard: list[str]) -> None:
    for chunk in chunks:
        heard.append(chunk.choices[0].text)  # noqa: PERF401 - what came before an error counts


def test_the_client_lists_completes_and_chats(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "smelt"
    text = client.completions.create(model="tiny", prompt="Hello", max_tokens=2, seed=1, stop=["\n"])
    assert (text.choices[0].text, text.choices[0].finish_reason) == ("<Hello> two", "length")
    assert text.usage is not None
    assert text.usage.total_tokens == 5
    several = client.completions.create(model="tiny", prompt=["a", "b"])
    assert [choice.text for choice in several.choices] == ["<a> two three", "<b> two three"]
    chat = client.chat.completions.create(model="default", messages=MESSAGES, max_completion_tokens=9)
    assert chat.choices[0].message.content == "<Hi> two three"
    assert chat.choices[0].finish_reason == "stop"


def test_the_client_streams_both(client: openai.OpenAI) -> None:
    texts = client.completions.create(model="tiny", prompt="Hello", stream=True)
    assert "".join(chunk.choices[0].text for chunk in texts) == "<Hello> two three"
    options: Any = {"include_usage": True}
    *chunks, last = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, stream_options=options)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "<Hi> two three"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.completion_tokens == 3


def test_the_documentations_example_works(
    started: tuple[str, Scripted], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/openai.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    assert "http://127.0.0.1:8000/v1" in code
    exec(code.replace("http://127.0.0.1:8000", started[0]), {})
    assert capsys.readouterr().out == "<Once upon a time> two three\n<Name three colours.> two three"


def test_the_clients_own_helpers_for_streams_work(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == "<Hi> two three"


def test_mistakes_are_the_clients_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, n=2)
    assert refused.value.param == "n"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_worker_that_is_lost_is_an_error_and_never_an_answer(client: openai.OpenAI, model_server: Scripted) -> None:
    model_server.script = after_two(WorkerLost("the worker is gone; ask again"))
    with pytest.raises(openai.InternalServerError) as lost:
        client.completions.create(model="tiny", prompt="x")
    assert lost.value.status_code == 503
    assert int(lost.value.response.headers["retry-after"]) >= 1
    heard: list[str] = []
    with pytest.raises(openai.APIError, match="the worker is gone"):
        hear(client.completions.create(model="tiny", prompt="x", stream=True), heard)
    assert heard == ["a", "b"]


def test_the_client_tries_again_when_the_server_says_so(started: tuple[str, Scripted], model_server: Scripted) -> None:
    async def script(request: Generate) -> AsyncGenerator[str | Finish, None]:
        if len(model_server.asked) == 1:
            raise Unavailable("a worker is on its way", 1)
        yield "there"

    model_server.script = script
    with openai.OpenAI(base_url=f"{started[0]}/v1", api_key="none", max_retries=1) as client:
        assert client.completions.create(model="tiny", prompt="x").choices[0].text == "there"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [endless, silent])
def test_who_leaves_cancels_the_work(started: tuple[str, Scripted], stream: bool, script: Script) -> None:
    address, model_server = started
    model_server.script = script
    host, _, port = address.removeprefix("http://").partition(":")
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": stream})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        eventually(lambda: model_server.num_running == 1)
        if stream and script is endless:
            assert b"200 OK" in connection.recv(1000)
    eventually(lambda: model_server.num_running == 0)
    num_written = model_server.num_written
    assert httpx.get(f"{address}/v1/models").status_code == 200
    assert model_server.num_written == num_written


def test_a_silent_stream_is_kept_alive(started: tuple[str, Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    address, model_server = started
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.05)
    go_on = asyncio.Event()

    async def script(request: Generate) -> AsyncGenerator[str | Finish, None]:
        await go_on.wait()
        yield "late"

    model_server.script = script
    body = {"model": "tiny", "prompt": "x", "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=10) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": still here"
        asyncio.run_coroutine_threadsafe(_set(go_on), model_server.loop).result(5)
        rest = [line for line in lines if line.startswith("data: ")]
    assert '"late"' in rest[0]
    assert rest[-1] == "data: [DONE]"


def test_a_reader_that_takes_nothing_is_given_up(
    started: tuple[str, Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, model_server = started
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.1)
    monkeypatch.setattr(streaming, "SEND_SECONDS", 0.2)

    async def script(request: Generate) -> AsyncGenerator[str | Finish, None]:
        while True:
            yield "x" * 2**16

    model_server.script = script
    body = {"model": "tiny", "prompt": "x", "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=10):
        eventually(lambda: model_server.num_running == 1)
        eventually(lambda: model_server.num_running == 0)


async def _set(event: asyncio.Event) -> None:
    event.set()
