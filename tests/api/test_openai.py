"""OpenAI's API by raw HTTP: shapes of answers and streams, what is refused and how, and who is told of it."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from gated import ask, refused
from scripted import CONTEXT, Script, Scripted
from smelt.api import failures, openai, telemetry
from smelt.api.services import Services
from smelt.errors import InvalidInput, Unavailable, WorkerLost
from smelt.transport.messages import Failure, Finish, Generate, TextChunk
from smelt.types import ChatMessage, SamplingParams, TokenLogprob, ToolCall

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"model": "tiny", "prompt": "Hello"}
HI = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer", "default": None}}},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


async def events_of(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    answer = await client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, rest = answer.text.split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") for event in events)
    return [event[6:] if event == "data: [DONE]" else json.loads(event[6:]) for event in events]


async def test_a_completion_has_openais_shape_and_defaults(client: httpx.AsyncClient, model_server: Scripted) -> None:
    answer = await ask(client, TEXT, HELLO)
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    choice = {"index": 0, "text": "<Hello> two three", "finish_reason": "stop", "logprobs": None}
    assert answer["choices"] == [choice]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    (request,) = model_server.asked
    assert request.params == SamplingParams(max_tokens=16, temperature=1.0, top_p=1.0)
    assert (request.owner, request.model) == ("local", "tiny")


async def test_a_turn_of_a_chat_has_openais_shape_and_defaults(
    client: httpx.AsyncClient, model_server: Scripted
) -> None:
    answer = await ask(client, CHAT, HI)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": "<Hi> two three", "refusal": None, "tool_calls": None}
    assert answer["choices"] == [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
    assert model_server.asked[0].params.max_tokens == CONTEXT


async def test_a_prompt_is_text_or_tokens_or_several(client: httpx.AsyncClient, model_server: Scripted) -> None:
    prompts: list[tuple[Any, list[Any]]] = [
        ("", [""]),
        ([1, 2], [(1, 2)]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ]
    for prompt, asked in prompts:
        model_server.asked.clear()
        answer = await ask(client, TEXT, {**HELLO, "prompt": prompt})
        assert [request.prompt for request in model_server.asked] == asked
        assert len({request.request_id for request in model_server.asked}) == len(asked)
        assert [choice["text"] for choice in answer["choices"]] == [f"<{each}> two three" for each in asked]
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(asked)))
        assert answer["usage"]["total_tokens"] == 6 * len(asked)


async def test_messages_may_be_parts_and_the_developer_is_the_system(
    client: httpx.AsyncClient, model_server: Scripted
) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    turns = [
        {"role": "developer", "content": "Be kind."},
        {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None},
        {"role": "user", "content": parts},
    ]
    await ask(client, CHAT, {**HI, "messages": turns})
    expected = ChatMessage("system", "Be kind."), ChatMessage("assistant", "Yes?"), ChatMessage("user", "Hello")
    assert model_server.asked[0].messages == expected


async def test_a_stream_of_a_completion(client: httpx.AsyncClient) -> None:
    *chunks, done = await events_of(client, TEXT, HELLO)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert not any("usage" in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["<Hello>", " two", " three", ""]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]


async def test_a_stream_of_a_chat_begins_with_the_role_and_ends_with_usage(client: httpx.AsyncClient) -> None:
    *chunks, last, done = await events_of(client, CHAT, {**HI, "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in (*chunks, last)} == {"chat.completion.chunk"}
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 6)
    assert all(chunk["usage"] is None for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [choice["delta"] for choice in choices[1:-1]] == [{"content": text} for text in ("<Hi>", " two", " three")]
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


async def test_a_stream_of_several_prompts_says_of_which_each_piece_is(client: httpx.AsyncClient) -> None:
    *chunks, done = await events_of(client, TEXT, {**HELLO, "prompt": ["a", "b"]})
    assert done == "[DONE]"
    for index, prompt in enumerate("ab"):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == f"<{prompt}> two three"
        assert own[-1]["finish_reason"] == "stop"


def samples_of(chunks: list[Any]) -> dict[int, list[Any]]:
    """The choices of a stream's chunks, by their numbers."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return {choice["index"]: [each for each in choices if each["index"] == choice["index"]] for choice in choices}


async def test_samples_are_numbered_by_prompt_and_their_prompt_counts_once(client: httpx.AsyncClient) -> None:
    several = {"n": 2, "best_of": 3, "max_tokens": 2}
    answer = await ask(client, TEXT, {**HELLO, **several, "prompt": ["a", "b"]})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["<a> two"] * 2 + ["<b> two"] * 2
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (6, 8, 14)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
    chat = await ask(client, CHAT, {**HI, "n": 3})
    assert [choice["message"]["content"] for choice in chat["choices"]] == ["<Hi> two three"] * 3
    assert (chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"]) == (3, 9)


async def test_a_stream_of_several_samples(client: httpx.AsyncClient) -> None:
    counted = {"stream_options": {"include_usage": True}}
    for path, body, num_choices in ((TEXT, {**HELLO, "prompt": ["a", "b"], "n": 2}, 4), (CHAT, {**HI, "n": 3}, 3)):
        *chunks, last, done = await events_of(client, path, {**body, **counted})
        assert done == "[DONE]"
        samples = samples_of(chunks)
        assert sorted(samples) == list(range(num_choices))
        for choices in samples.values():
            assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
            assert choices[-1]["finish_reason"] == "stop"
        assert last["usage"]["completion_tokens"] == 3 * num_choices


async def test_log_probabilities_of_a_text(client: httpx.AsyncClient, model_server: Scripted) -> None:
    async def halves(request: Generate) -> AsyncGenerator[str | TextChunk | Finish, None]:
        parts = "é".encode()
        logprobs = [
            TokenLogprob(1, b"a", None),
            TokenLogprob(2, parts[:1], -0.5, (TokenLogprob(9, b"z", -0.25),)),
            TokenLogprob(3, parts[1:], float("-inf"), (TokenLogprob(3, parts[1:], float("-inf")),)),
        ]
        yield TextChunk("r", "a", (1,), logprobs=tuple(logprobs[:1]))
        yield TextChunk("r", "é", (2, 3), logprobs=tuple(logprobs[1:]))
        yield "!"

    model_server.script = halves
    asked = {**HELLO, "logprobs": 1, "n": 2}
    expected = {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9", "!"],
        "token_logprobs": [None, -0.5, -9999.0, -0.25],
        "top_logprobs": [
            None,
            {"bytes:\\xc3": -0.5, "z": -0.25},
            {"bytes:\\xa9": -9999.0},
            {"!": -0.25, "x": -0.5},
        ],
        "text_offset": [0, 1, 1, 2],
    }
    assert [choice["logprobs"] for choice in (await ask(client, TEXT, asked))["choices"]] == [expected] * 2
    *chunks, _ = await events_of(client, TEXT, asked)
    for choices in samples_of(chunks).values():
        pieces = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        assert {name: [each for piece in pieces for each in piece[name]] for name in expected} == expected
        assert choices[-1]["logprobs"] is None


async def test_log_probabilities_of_a_chat(client: httpx.AsyncClient) -> None:
    asked = {**HI, "logprobs": True, "top_logprobs": 2, "max_tokens": 1}
    likely = [{"token": "x", "logprob": -0.5, "bytes": [120]}, {"token": "xx", "logprob": -1.0, "bytes": [120, 120]}]
    token = {"token": "<Hi>", "logprob": -0.25, "bytes": list(b"<Hi>"), "top_logprobs": likely}
    (choice,) = (await ask(client, CHAT, asked))["choices"]
    assert choice["logprobs"] == {"content": [token], "refusal": None}
    *chunks, _ = await events_of(client, CHAT, asked)
    assert [chunk["choices"][0]["logprobs"] for chunk in chunks] == [None, choice["logprobs"], None]
    (choice,) = (await ask(client, CHAT, {**HI, "logprobs": True, "max_tokens": 1}))["choices"]
    assert choice["logprobs"]["content"] == [{**token, "top_logprobs": []}]
    assert (await ask(client, CHAT, HI))["choices"][0]["logprobs"] is None


async def test_tools_are_offered_and_called(client: httpx.AsyncClient, model_server: Scripted) -> None:
    calls = (ToolCall("call_1", "add", '{"a": 2}'), ToolCall("call_2", "now", "{}"))

    async def calling(request: Generate) -> AsyncGenerator[str | Finish, None]:
        yield "Let me see."
        yield Finish("r", "stop", 3, 9, tool_calls=calls)

    model_server.script = calling
    offered = {**HI, "tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True}
    (choice,) = (await ask(client, CHAT, offered))["choices"]
    assert model_server.asked[0].tools == tuple(TOOLS)
    told = [
        {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}},
        {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]
    assert (choice["finish_reason"], choice["message"]["tool_calls"]) == ("tool_calls", told)
    assert choice["message"]["content"] == "Let me see."
    *chunks, _ = await events_of(client, CHAT, offered)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[1:] == [
        {"content": "Let me see."},
        {"tool_calls": [{"index": number, **call} for number, call in enumerate(told)]},
        {},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_turn_that_only_calls_has_no_content(client: httpx.AsyncClient, model_server: Scripted) -> None:
    model_server.script = failing(Finish("r", "stop", 3, 9, tool_calls=(ToolCall("c", "now", "{}"),)))
    (choice,) = (await ask(client, CHAT, {**HI, "tools": TOOLS}))["choices"]
    assert choice["message"]["content"] is None
    await ask(client, CHAT, {**HI, "tools": TOOLS, "tool_choice": "none"})
    assert model_server.asked[-1].tools == ()


async def test_a_conversation_has_calls_and_their_results(client: httpx.AsyncClient, model_server: Scripted) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"},
    ]
    await ask(client, CHAT, {**HI, "messages": turns})
    assert model_server.asked[0].messages == (
        ChatMessage("user", "Add."),
        ChatMessage("assistant", "", (ToolCall("c1", "add", '{"a": 2}'),)),
        ChatMessage("tool", "4", tool_call_id="c1", name="add"),
    )


async def test_a_token_without_text_is_no_event(client: httpx.AsyncClient, model_server: Scripted) -> None:
    async def stuttering(request: Generate) -> AsyncGenerator[str | Finish, None]:
        for text in ("", "a", "", "b"):
            yield text

    model_server.script = stuttering
    *chunks, _ = await events_of(client, TEXT, HELLO)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", ""]


NO_JSON = [
    b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"a":' * 100_000,
    b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
    b'{"model": "tiny", "prompt": "x", "top_p": 1e999}',
    b'{"model": "tiny", "prompt": "x", "presence_penalty": NaN}',
]  # fmt: skip


async def test_a_body_that_is_no_json_of_ours_is_refused(client: httpx.AsyncClient) -> None:
    for raw in NO_JSON:
        answer = await client.post(TEXT, content=raw, headers={"content-type": "application/json"})
        assert answer.status_code == 400, raw[:60]
        assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_form_and_a_huge_body_are_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post(TEXT, content=json.dumps(HELLO), headers={"content-type": "text/plain"})
    assert (answer.status_code, "application/json" in answer.text) == (415, True)
    answer = await client.post(TEXT, json={**HELLO, "prompt": "x" * (2**23 + 1)})
    assert answer.status_code == 413


async def test_an_unknown_model_is_not_found_and_the_message_lists_what_there_is(client: httpx.AsyncClient) -> None:
    for name in ("gpt-9", "../elsewhere/tiny", "/etc/passwd", "hf:a/b"):
        error = await refused(client, TEXT, {**HELLO, "model": name}, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "tiny" in error["message"]


async def test_an_alias_is_answered_by_the_model_that_it_means(
    client: httpx.AsyncClient, model_server: Scripted
) -> None:
    for alias in ("default", "gpt"):
        assert (await ask(client, TEXT, {**HELLO, "model": alias}))["model"] == "tiny"
    assert {request.model for request in model_server.asked} == {"tiny"}


def failing(error: Exception | Finish, *before: str) -> Script:
    async def script(request: Generate) -> AsyncGenerator[str | Finish, None]:
        for text in before:
            yield text
        if isinstance(error, Finish):
            yield error
        else:
            raise error

    return script


REFUSED_BY_MODEL = Finish("r", "aborted", 0, 0, Failure("InvalidInput", "the prompt has 99 tokens"))


FAILURES: list[tuple[Exception | Finish, int, str]] = [
    (Unavailable("no worker is connected", 5), 503, "no worker is connected"),
    (WorkerLost("the worker is gone"), 503, "the worker is gone"),
    (REFUSED_BY_MODEL, 400, "the prompt has 99 tokens"),
    (Finish("r", "aborted", 0, 0), 503, "broken off"),
    (RuntimeError("a secret path"), 500, "something went wrong"),
]


async def test_what_fails_before_the_first_byte_has_a_status(client: httpx.AsyncClient, model_server: Scripted) -> None:
    for error, status, message in FAILURES:
        for stream in (False, True):
            model_server.script = failing(error)
            answer = await client.post(CHAT, json={**HI, "stream": stream})
            assert answer.status_code == status
            assert message in answer.json()["error"]["message"]
            assert "secret" not in answer.text
            assert (status == 503) == ("retry-after" in answer.headers)


async def test_a_stream_that_breaks_off_says_so_and_is_never_done(
    client: httpx.AsyncClient, model_server: Scripted
) -> None:
    for error in (WorkerLost("the worker is gone"), REFUSED_BY_MODEL, RuntimeError("a secret path")):
        model_server.script = failing(error, "a", "b")
        *chunks, last = await events_of(client, TEXT, HELLO)
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b"]
        assert set(last) == {"error"}
        assert last["error"]["message"]
        assert "secret" not in last["error"]["message"]


async def test_an_answer_without_an_end_is_no_success(client: httpx.AsyncClient, model_server: Scripted) -> None:
    class Mute(Scripted):
        async def generate(self, request: Generate) -> AsyncGenerator[Any, None]:
            async for piece in super().generate(request):
                if not isinstance(piece, Finish):
                    yield piece

    model_server.__class__ = Mute
    await refused(client, TEXT, HELLO, 503)
    assert "error" in (await events_of(client, TEXT, HELLO))[-1]


async def test_one_failure_among_several_prompts_fails_them_all(
    client: httpx.AsyncClient, model_server: Scripted
) -> None:
    async def picky(request: Generate) -> AsyncGenerator[str | Finish, None]:
        if request.prompt == "bad":
            raise InvalidInput("that one")
        await asyncio.Event().wait()
        yield ""

    model_server.script = picky
    assert (await refused(client, TEXT, {**HELLO, "prompt": ["a", "bad", "c"]}))["message"] == "that one"
    assert model_server.num_running == 0


async def test_answers_are_counted(client: httpx.AsyncClient, model_server: Scripted) -> None:
    def count(metric: Any, *labels: str) -> float:
        return metric.labels(*labels)._value.get()

    before = count(telemetry.tokens, "tiny", "output"), count(telemetry.answers, "tiny", "stop")
    failed = count(telemetry.answers, "tiny", "failed")
    await ask(client, TEXT, HELLO)
    await events_of(client, CHAT, HI)
    assert count(telemetry.tokens, "tiny", "output") - before[0] == 6
    assert count(telemetry.answers, "tiny", "stop") - before[1] == 2
    model_server.script = failing(WorkerLost("gone"), "a")
    await events_of(client, CHAT, HI)
    assert count(telemetry.answers, "tiny", "failed") - failed == 1


def test_the_document_describes_bodies_and_answers(served: tuple[Services, Scripted]) -> None:
    app = FastAPI()
    failures.install(app)
    app.include_router(openai.router(served[0]))
    paths = app.openapi()["paths"]
    assert set(paths) == {
        TEXT,
        CHAT,
        "/v1/embeddings",
        f"{TEXT}/{{answer_id}}",
        f"{CHAT}/{{answer_id}}",
    }
    schema = paths[CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages"} == set(schema["required"])
    assert "$ref" not in json.dumps(schema)
    assert {"200", "202"} <= set(paths[TEXT]["post"]["responses"])
