"""Parameters of OpenAI's API by raw HTTP: each reaches the model, or is refused by its name; limits included."""

import json
from typing import Any

import httpx
import pytest

from gated import ask, refused
from scripted import Scripted
from smelt.api.openai_chat_types import CHAT_TOKENS, MAX_TOOL_BYTES, ChatBody
from smelt.api.openai_parsing import parse
from smelt.api.openai_types import MAX_LOGPROBS, MAX_PROMPT_CHARS, MAX_PROMPT_TOKENS, MAX_SCHEMA_BYTES, MAX_TOKENS
from smelt.types import Grammar, SamplingParams

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"model": "tiny", "prompt": "Hello"}
HI = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def defining(value: int) -> dict[str, Any]:
    """A tool whose schema refers to its own root."""
    parameters = {"$defs": {"x": {"const": value}}, "properties": {"a": {"$ref": "#/$defs/x"}}}
    return {"type": "function", "function": {"name": "add", "parameters": parameters}}


async def test_parameters_reach_the_model(client: httpx.AsyncClient, model_server: Scripted) -> None:
    drawing = {
        "temperature": 0, "top_p": 0.5, "seed": -7, "stop": ["a", "b"], "user": "ann", "top_k": 5, "min_p": 0.1,
        "presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.2, "stop_token_ids": [1, 2],
        "logit_bias": {"7": -100, "8": 2.5}, "ignore_eos": True, "n": 2,
    }  # fmt: skip
    expected = SamplingParams(
        max_tokens=2, temperature=0.0, top_p=0.5, seed=-7, stop=("a", "b"), top_k=5, min_p=0.1, presence_penalty=0.5,
        frequency_penalty=-1.0, repetition_penalty=1.2, logit_bias=((7, -100.0), (8, 2.5)),
        stop_token_ids=frozenset({1, 2}), ignore_eos=True,
    )  # fmt: skip
    await ask(client, TEXT, {**HELLO, **drawing, "max_tokens": 2})
    await ask(client, CHAT, {**HI, **drawing, "max_completion_tokens": 2})
    for request in model_server.asked:
        assert (request.params, request.num_samples, request.best_of) == (expected, 2, 2)
    await ask(client, TEXT, {**HELLO, "stop": "a", "top_k": 0, "best_of": 4})
    last = model_server.asked[-1]
    assert (last.params, last.best_of) == (SamplingParams(max_tokens=16, temperature=1.0, stop=("a",)), 4)


async def test_log_probabilities_and_echo_reach_the_model(client: httpx.AsyncClient, model_server: Scripted) -> None:
    await ask(client, TEXT, {**HELLO, "max_tokens": 0, "echo": True, "logprobs": 2})
    await ask(client, TEXT, {**HELLO, "logprobs": 0})
    await ask(client, CHAT, {**HI, "logprobs": True, "top_logprobs": 20})
    await ask(client, CHAT, {**HI, "logprobs": False})
    told = [(request.echo, request.params.num_logprobs, request.params.num_prompt_logprobs)
            for request in model_server.asked]  # fmt: skip
    assert told == [(True, 2, 2), (False, 0, None), (False, 20, None), (False, None, None)]
    assert model_server.asked[0].params.max_tokens == 0


async def test_forms_of_answers_reach_the_model(client: httpx.AsyncClient, model_server: Scripted) -> None:
    schema = {"type": "object", "properties": {"b": {"enum": [None, 1]}, "a": {}}}
    formats: list[tuple[Any, Grammar | None]] = [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json")),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
         Grammar("json_schema", json.dumps(schema, separators=(",", ":")))),
        ({"type": "regex", "pattern": "a+"}, Grammar("regex", "a+")),
    ]  # fmt: skip
    for given, grammar in formats:
        for path, body in ((TEXT, HELLO), (CHAT, HI)):
            await ask(client, path, {**body, "response_format": given})
            assert model_server.asked[-1].params.grammar == grammar


async def test_calls_that_have_to_come_are_a_grammar(client: httpx.AsyncClient, model_server: Scripted) -> None:
    def call_of(name: str, arguments: Any) -> dict[str, Any]:
        properties = {"name": {"const": name}, "arguments": {"type": "object", **arguments}}
        required = ["name", "arguments"]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    add, now = defining(1), {"type": "function", "function": {"name": "now"}}
    call_of_add = call_of("add", {"properties": {"a": {"$ref": "#/$defs/x"}}})
    shared = {"$defs": {"x": {"const": 1}}}
    choices: list[tuple[Any, list[Any], Any]] = [
        ("required", [add, now], {"anyOf": [call_of_add, call_of("now", {})], **shared}),
        ({"type": "function", "function": {"name": "now"}}, [now], {"anyOf": [call_of("now", {})]}),
    ]
    for choice, offered, schema in choices:
        asked = {**HI, "tools": [add, now], "tool_choice": choice, "parallel_tool_calls": False}
        await ask(client, CHAT, asked)
        request = model_server.asked[-1]
        assert (request.tools, request.must_call) == (tuple(offered), True)
        assert request.params.grammar is not None
        assert json.loads(request.params.grammar.text) == schema
    await ask(client, CHAT, {**HI, "tools": [add, now], "tool_choice": "auto"})
    assert (model_server.asked[-1].must_call, model_server.asked[-1].params.grammar) == (False, None)


INVALID: list[tuple[str, dict[str, Any], str]] = [
    *((path, {**body, "max_tokens": value}, "max_tokens") for path, body in ((TEXT, HELLO), (CHAT, HI))
      for value in (0, -1, MAX_TOKENS + 1, 2**63, 2**64, "5", True, 1.5, [])),
    *((TEXT, {**HELLO, "temperature": value}, "temperature") for value in (-0.1, 2.1, "1", True)),
    *((TEXT, {**HELLO, "top_p": value}, "top_p") for value in (0, 1.1, -1)),
    *((TEXT, {**HELLO, "seed": value}, "seed") for value in (2**63, -(2**63) - 1, 1.5, "x")),
    *((TEXT, {**HELLO, "stop": value}, "stop") for value in ("", [""], ["a"] * 5, 5, "s" * 257, [1])),
    *((TEXT, {**HELLO, "prompt": value}, "prompt") for value in (
        None, 5, True, [], [[]], [-1], [2**31], [True], [1, "a"], ["a"] * 65, [["a"]], {},
        [1] * (MAX_PROMPT_TOKENS + 1), "x" * (MAX_PROMPT_CHARS + 1),
        ["x" * (MAX_PROMPT_CHARS // 2 + 1)] * 2)),
    *((CHAT, {**HI, "messages": value}, "messages") for value in (None, [], "Hi", {}, [HI["messages"][0]] * 1025)),
    (CHAT, {**HI, "messages": [{"role": "user", "content": "x" * (MAX_PROMPT_CHARS // 2 + 1)}] * 2}, "messages"),
    (CHAT, {**HI, "messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    (CHAT, {**HI, "messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
    (CHAT, {**HI, "messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages.0.tool_call_id"),
    (CHAT, {**HI, "messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages.0.tool_calls"),
    (CHAT, {**HI, "messages": [{"role": "assistant", "content": "x", "tool_calls": [{**CALL, "colour": 1}]}]},
     "messages.0.tool_calls.0.colour"),
    (CHAT, {**HI, "messages": [{"role": "assistant", "tool_calls": [CALL] * 129}]}, "messages.0.tool_calls"),
    (CHAT, {**HI, "messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.content"),
    (CHAT, {**HI, "messages": [{"role": "user"}]}, "messages.0.content"),
    (CHAT, {**HI, "messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    (CHAT, {**HI, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    (CHAT, {**HI, "messages": [{"role": "user", "content": "x", "name": "ann"}]}, "messages.0.name"),
    (CHAT, {**HI, "messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour"),
    (CHAT, {**HI, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    (TEXT, {"prompt": "x"}, "model"),
    (TEXT, {**HELLO, "model": None}, "model"),
    (TEXT, {**HELLO, "stream": "yes"}, "stream"),
    (TEXT, {**HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
    (TEXT, {**HELLO, "stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
    (TEXT, {**HELLO, "stream": True, "background": True}, "background"),
    (TEXT, {**HELLO, "prompt": ["a", "b"], "background": True}, "prompt"),
    *((path, {**body, "n": value}, "n") for path, body in ((TEXT, HELLO), (CHAT, HI))
      for value in (0, -1, 17, "2", True, 1.5)),
    (TEXT, {**HELLO, "prompt": ["a"] * 5, "n": 13}, "n"),
    *((TEXT, {**HELLO, "best_of": value}, "best_of") for value in (0, 17, "2")),
    (TEXT, {**HELLO, "n": 3, "best_of": 2}, "best_of"),
    (TEXT, {**HELLO, "best_of": 2, "stream": True}, "best_of"),
    (TEXT, {**HELLO, "prompt": ["a"] * 17, "max_tokens": MAX_TOKENS}, "max_tokens"),
    *((TEXT, {**HELLO, "logprobs": value}, "logprobs") for value in (-1, 6, True, "1")),
    (TEXT, {**HELLO, "logprobs": 5, "max_tokens": MAX_TOKENS, "n": 2}, "logprobs"),
    (TEXT, {**HELLO, "logprobs": 1, "echo": True, "prompt": "x" * (MAX_LOGPROBS // 2)}, "logprobs"),
    (CHAT, {**HI, "logprobs": True, "top_logprobs": 20, "max_tokens": MAX_TOKENS}, "logprobs"),
    *((CHAT, {**HI, "logprobs": True, "top_logprobs": value}, "top_logprobs") for value in (-1, 21, "1", True)),
    (CHAT, {**HI, "top_logprobs": 1}, "top_logprobs"),
    (CHAT, {**HI, "logprobs": 1}, "logprobs"),
    *((TEXT, {**HELLO, name: value}, name) for name in ("presence_penalty", "frequency_penalty")
      for value in (-2.1, 2.1, "1", True)),
    *((TEXT, {**HELLO, "repetition_penalty": value}, "repetition_penalty") for value in (0, -1, 0.001, 11)),
    *((TEXT, {**HELLO, "min_p": value}, "min_p") for value in (-0.1, 1.1)),
    *((TEXT, {**HELLO, "top_k": value}, "top_k") for value in (-2, 2**40, 1.5)),
    *((TEXT, {**HELLO, "logit_bias": value}, "logit_bias") for value in (
        {"a": 1}, {"-1": 1}, {"1": 101}, {"1": -101}, {"1": "1"}, {"1" * 10: 1}, [],
        {str(token): 1 for token in range(301)})),
    *((TEXT, {**HELLO, "stop_token_ids": value}, "stop_token_ids") for value in ([1] * 65, 5)),
    (TEXT, {**HELLO, "ignore_eos": 1}, "ignore_eos"),
    *((path, {**body, "response_format": value}, param) for path, body in ((TEXT, HELLO), (CHAT, HI))
      for value, param in (
        ({"type": "xml"}, "response_format.type"), ({}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"description": "x" * MAX_SCHEMA_BYTES}}},
         "response_format.json_schema.schema"),
        ({"type": "text", "json_schema": {"schema": {}}}, "response_format.json_schema"),
        ({"type": "regex"}, "response_format.pattern"), ({"type": "regex", "pattern": ""}, "response_format.pattern"),
        ({"type": "regex", "pattern": "x" * 4097}, "response_format.pattern"),
        ({"type": "json_object", "pattern": "x"}, "response_format.pattern"),
        ({"type": "text", "colour": 1}, "response_format.colour"))),
    *((CHAT, {**HI, "tools": value}, param) for value, param in (
        ({}, "tools"), ([TOOL] * 129, "tools"), ([{"type": "web_search"}], "tools.0.type"),
        ([{"type": "function"}], "tools.0.function"), ([{"type": "function", "function": {}}], "tools.0.function.name"),
        ([{"type": "function", "function": {"name": "a b"}}], "tools.0.function.name"),
        ([{"type": "function", "function": {"name": "a", "strict": True}}], "tools.0.function.strict"),
        ([{"type": "function", "function": {"name": "a", "colour": 1}}], "tools.0.function.colour"),
        ([{"type": "function", "function": {"name": "a", "description": "x" * MAX_TOOL_BYTES}}], "tools"))),
    *((CHAT, {**HI, "tools": [TOOL], "tool_choice": value}, "tool_choice") for value in (
        5, "add", {}, {"type": "function"}, {"type": "function", "function": {"name": "sub"}})),
    (CHAT, {**HI, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {**HI, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}, "colour": 1}},
     "tool_choice.colour"),
    (CHAT, {**HI, "tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
     "response_format"),
    (CHAT, {**HI, "tools": [defining(1), {**defining(2), "function": {**defining(2)["function"], "name": "sub"}}],
            "tool_choice": "required"}, "tools"),
    (CHAT, {**HI, "tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
    (CHAT, {**HI, "tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
]  # fmt: skip


async def test_what_is_out_of_bounds_is_refused_by_name(client: httpx.AsyncClient, model_server: Scripted) -> None:
    for path, body, param in INVALID:
        error = await refused(client, path, body)
        assert (error["param"], error["type"]) == (param, "invalid_request_error"), (error, param)
        assert param in error["message"]
    assert not model_server.asked


UNSUPPORTED = {
    "suffix": "end", "tool_choice": "required", "functions": [{}], "top_logprobs": 2,
    "modalities": ["audio"], "store": True, "colour": "blue",
    "reasoning_effort": "low", "metadata": {"a": "b"}, "service_tier": "flex", "__class__": 1,
}  # fmt: skip
OF_THE_OTHER = {TEXT: {"tools": [TOOL]}, CHAT: {"best_of": 2, "echo": True}}
HARMLESS = {
    "n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None, "logit_bias": {}, "presence_penalty": 0,
    "frequency_penalty": 0.0, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False,
    "top_logprobs": None, "metadata": None, "parallel_tool_calls": True, "max_tokens": None, "temperature": None,
    "top_p": None, "seed": None, "stop": None, "stream": None, "stream_options": None, "background": False,
}  # fmt: skip


async def test_what_is_not_supported_is_refused_by_name(client: httpx.AsyncClient) -> None:
    for path, body in ((TEXT, HELLO), (CHAT, HI)):
        for name, value in {**UNSUPPORTED, **OF_THE_OTHER[path]}.items():
            error = await refused(client, path, {**body, name: value})
            assert error["param"] == name
            assert name in error["message"]


async def test_values_that_ask_for_what_happens_anyway_are_taken(client: httpx.AsyncClient) -> None:
    await ask(client, TEXT, {**HELLO, **HARMLESS})
    await ask(client, CHAT, {**HI, **HARMLESS})


def test_the_longest_turn_is_the_context_where_it_is_known() -> None:
    def tokens(context: int | None, **given: Any) -> int:
        return parse(ChatBody, json.dumps({**HI, **given}).encode(), {}).longest(context)

    assert tokens(2048) == 2048
    assert tokens(10**6) == MAX_TOKENS
    assert tokens(None) == CHAT_TOKENS
    assert tokens(2048, max_tokens=5) == tokens(2048, max_completion_tokens=5) == 5
    assert tokens(MAX_TOKENS, n=16, logprobs=True, top_logprobs=20) == MAX_LOGPROBS // (16 * 21)
