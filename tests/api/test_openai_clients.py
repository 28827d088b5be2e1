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
import pydantic
import pytest

from live import serving
from scripted import Script, Scripted, endless, scripted, silent, words
from smelt.api import streaming
from smelt.api.app import create_app
from smelt.errors import Overloaded, Unavailable, WorkerLost
from smelt.transport.messages import Finish, Generate
from smelt.types import Grammar, ToolCall

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
    assert [model.id for model in client.models.list()] == ["tiny", "default", "gpt"]
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


def test_the_client_passes_every_parameter_on(client: openai.OpenAI, model_server: Scripted) -> None:
    drawing: Any = {
        "n": 2, "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"7": -100}, "stop": ["\n"],
        "seed": 5, "temperature": 0.5, "top_p": 0.9, "max_tokens": 3, "user": "ann",
        "extra_body": {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "stop_token_ids": [2]},
    }  # fmt: skip
    text = client.completions.create(model="tiny", prompt=["a", "b"], best_of=3, echo=True, logprobs=2, **drawing)
    assert [choice.index for choice in text.choices] == [0, 1, 2, 3]
    assert text.choices[0].logprobs is not None
    assert text.choices[0].logprobs.tokens == ["<a>", " two", " three"]
    assert text.choices[0].logprobs.top_logprobs is not None
    assert set(text.choices[0].logprobs.top_logprobs[0]) == {"<a>", "x", "xx"}
    assert text.usage is not None
    assert text.usage.prompt_tokens_details is not None
    assert text.usage.prompt_tokens_details.cached_tokens == 4
    chat = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        logprobs=True,
        top_logprobs=1,
        response_format={"type": "json_object"},
        **drawing,
    )
    assert len(chat.choices) == 2
    assert chat.choices[1].logprobs is not None
    assert chat.choices[1].logprobs.content is not None
    assert chat.choices[1].logprobs.content[0].top_logprobs[0].token == "x"
    first, *_, last = model_server.asked
    assert (first.best_of, first.echo, first.params.num_prompt_logprobs) == (3, True, 2)
    for request in (first, last):
        params = request.params
        assert (params.top_k, params.min_p, params.repetition_penalty, params.ignore_eos) == (4, 0.1, 1.1, True)
        assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0.5, -0.5, ((7, -100.0),))
        assert (request.num_samples, params.stop_token_ids, params.seed) == (2, frozenset({2}), 5)
    assert last.params.grammar == Grammar("json")


class Shade(pydantic.BaseModel):
    name: str
    share: float


async def a_shade(request: Generate) -> AsyncGenerator[str | Finish, None]:
    yield '{"name": "red",'
    yield ' "share": 0.5}'


def test_the_client_parses_what_it_asked_for(client: openai.OpenAI, model_server: Scripted) -> None:
    model_server.script = a_shade
    chat = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Shade)
    assert chat.choices[0].message.parsed == Shade(name="red", share=0.5)
    grammar = model_server.asked[0].params.grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.text)["required"]) == ("json_schema", ["name", "share"])


async def calling(request: Generate) -> AsyncGenerator[str | Finish, None]:
    yield "Let me see."
    calls = (ToolCall("call_1", "add", '{"a": 2}'), ToolCall("call_2", "now", "{}"))
    yield Finish("r", "stop", 3, 9, tool_calls=calls)


TOOLS: Any = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now"}},
]


def test_the_client_calls_tools_and_streams_them(client: openai.OpenAI, model_server: Scripted) -> None:
    model_server.script = calling
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice="auto")
    (choice,) = chat.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, tools=TOOLS) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    for message in (choice.message, streamed.message):
        assert message.content == "Let me see."
        assert message.tool_calls is not None
        calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls]  # type: ignore[union-attr]
        assert calls == [("call_1", "add", '{"a": 2}'), ("call_2", "now", "{}")]
    model_server.script = words
    result: Any = {"role": "tool", "tool_call_id": "call_1", "content": "4"}
    after: Any = [*MESSAGES, choice.message, result]
    assert client.chat.completions.create(model="tiny", messages=after).choices[0].message.content == "<4> two three"
    assert model_server.asked[-1].messages[1].tool_calls[0] == ToolCall("call_1", "add", '{"a": 2}')


def test_the_client_streams_several_choices_with_log_probabilities(client: openai.OpenAI) -> None:
    texts = dict.fromkeys(range(4), "")
    ends = {}
    tokens = 0
    for chunk in client.completions.create(model="tiny", prompt=["a", "b"], n=2, logprobs=1, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        ends[choice.index] = choice.finish_reason
        tokens += len(choice.logprobs.tokens or ()) if choice.logprobs else 0
    assert list(texts.values()) == ["<a> two three"] * 2 + ["<b> two three"] * 2
    assert (ends, tokens) == (dict.fromkeys(range(4), "stop"), 12)
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, n=2, logprobs=True) as stream:
        whole = stream.get_final_completion()
    assert [choice.message.content for choice in whole.choices] == ["<Hi> two three"] * 2
    assert whole.choices[1].logprobs is not None
    assert [token.token for token in whole.choices[1].logprobs.content or ()] == ["<Hi>", " two", " three"]


def test_the_client_embeds(client: openai.OpenAI, model_server: Scripted) -> None:
    for extra in ({}, {"encoding_format": "float"}):  # base64 is its own choice
        answer = client.embeddings.create(model="tiny", input=["abc", "de"], **extra)  # type: ignore[arg-type]
        assert [item.embedding for item in answer.data] == [[3.0, -1.0], [2.0, -1.0]]
        assert answer.usage.prompt_tokens == 5
    assert client.embeddings.create(model="tiny", input=[5, 6, 7]).data[0].embedding == [3.0, -1.0]
    assert model_server.embedded[-1].inputs == ((5, 6, 7),)


def test_a_full_queue_is_a_rate_limit(client: openai.OpenAI, model_server: Scripted) -> None:
    async def full(request: Generate) -> AsyncGenerator[str | Finish, None]:
        raise Overloaded("512 requests wait already", 5)
        yield ""

    model_server.script = full
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="tiny", prompt="x", stream=stream)
        assert (refused.value.code, refused.value.response.headers["retry-after"]) == ("overloaded", "5")


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
        client.chat.completions.create(model="tiny", messages=MESSAGES, n=17)
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
