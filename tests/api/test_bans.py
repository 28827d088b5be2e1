"""The abuse checker by HTTP: all ways to ask are checked in the same place, strikes are kept, and bans hold."""

import os
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gated import client_of, make_key
from scripted import Scripted
from smelt.api.app import create_app
from smelt.api.metering import note_background
from smelt.api.services import Services
from smelt.control.abuse_checker import MAX_AGE_S, AbuseChecker
from smelt.errors import ConfigError
from smelt.storage import records
from smelt.storage.records import Strike
from smelt.transport.messages import Completion, Finish, Generate, Result
from smelt.types import ToolCall

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
RULES = """
- {name: spam, match: substring, text: buy now, on: prompt}
- {name: secret, match: regex, text: 'pass\\s?word', on: output}
- {name: parrot, match: exact, text: polly, on: output}
"""
ASKED = {"role": "user", "content": "x"}
HELLO, BAD = {"model": "tiny", "prompt": "Hello"}, {"model": "tiny", "prompt": "BUY NOW"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Server:
    """The application with rules, and a clock that moves when a test says so."""

    def __init__(self, services: Services, model_server: Scripted, **settings: Any) -> None:
        self.clock = Clock()
        self.model_server = model_server
        chosen = services.settings.model_copy(update=settings)
        checker = AbuseChecker(chosen, services.database, services.writer, self.clock)
        self.services = replace(services, settings=chosen, abuse_checker=checker)
        self.app = create_app(self.services)

    async def ask(self, path: str, body: dict[str, Any], status: int = 200, key: str | None = None) -> Any:
        async with client_of(self.app, key) as client:
            answer = await client.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.headers["content-type"].startswith("application/json") else answer.text

    @property
    def strikes(self) -> list[tuple[str, str]]:
        with self.services.database.connect() as connection:
            return [(strike.user, strike.rule) for strike in records.of_all_owners(connection, Strike)]


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return path


@pytest.fixture
def server(served: tuple[Services, Scripted], rules: Path) -> Server:
    return Server(*served, ban_rules=rules, ban_strikes=2, ban_key_strikes=5)


def says(*words: str) -> Any:
    async def script(_request: Generate) -> AsyncGenerator[str, None]:
        for word in words:
            yield word

    return script


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, BAD),
        (TEXT, {**BAD, "prompt": ["Hello", "please Buy Now"]}),
        (TEXT, {**BAD, "stream": True}),
        (TEXT, {**BAD, "background": True}),
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "buy now"}]}),
        (
            CHAT,
            {"model": "tiny", "messages": [{"role": "system", "content": "buy now"}, {"role": "user", "content": "x"}]},
        ),
        (
            CHAT,
            {
                "model": "tiny",
                "messages": [ASKED],
                "tools": [{"type": "function", "function": {"name": "f", "description": "buy now"}}],
            },
        ),
    ],
)
async def test_a_prompt_that_breaks_a_rule_is_refused_and_counted(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    error = (await server.ask(path, body, 400))["error"]
    assert error["code"] == "banned_prompt"
    assert "'spam'" in error["message"]
    assert server.strikes == [("", "spam")]
    assert server.model_server.asked == []
    await server.ask(TEXT, HELLO)


async def test_the_other_shapes_are_checked_too(server: Server) -> None:
    assert "'spam'" in (await server.ask("/api/generate", {"prompt": "buy now"}, 400))["error"]
    await server.ask("/completions", {"model": "tiny", "prompt": "buy now", "user": "eve"}, 400)
    assert server.strikes == [("", "spam"), ("eve", "spam")]


async def test_tokens_cannot_hide_a_prompt(server: Server) -> None:
    error = (await server.ask(TEXT, {"model": "tiny", "prompt": [1, 2, 3]}, 400))["error"]
    assert "takes no token ids" in error["message"]
    assert server.strikes == []


async def test_after_so_many_strikes_a_user_is_banned_and_told_why(server: Server) -> None:
    eve = {"user": "eve"}
    for _ in range(2):
        await server.ask(TEXT, BAD | eve, 400)
    for path, body in ((TEXT, HELLO), (CHAT, {"model": "tiny", "messages": [ASKED]})):
        error = (await server.ask(path, body | eve, 403))["error"]
        assert error["code"] == "banned"
        assert "the user 'eve' of this API key is banned (2 broken rules, the last one 'spam')" in error["message"]
        assert "administrator" in error["message"]
    await server.ask("/v1/embeddings", {"model": "tiny", "input": "x"} | eve, 403)
    await server.ask(TEXT, HELLO | {"user": "ann"})
    await server.ask(TEXT, HELLO)


async def test_a_user_of_another_key_is_somebody_else(server: Server) -> None:
    ann, bob = (make_key(server.services, name, scopes=["inference"]) for name in ("ann", "bob"))
    for _ in range(2):
        await server.ask(TEXT, BAD | {"user": "eve"}, 400, ann)
    await server.ask(TEXT, HELLO | {"user": "eve"}, 403, ann)
    await server.ask(TEXT, HELLO | {"user": "eve"}, 200, bob)


async def test_a_key_that_spoofs_users_is_banned_itself(server: Server) -> None:
    key = make_key(server.services, "spoofer", scopes=["inference"])
    for number in range(5):
        await server.ask(TEXT, BAD | {"user": f"user {number}"}, 400, key)
    error = (await server.ask(TEXT, HELLO | {"user": "somebody"}, 403, key))["error"]
    assert "this API key is banned (5 broken rules of its users" in error["message"]


async def test_strikes_outlive_the_server(server: Server, served: tuple[Services, Scripted], rules: Path) -> None:
    await server.ask(TEXT, BAD, 400)
    again = Server(*served, ban_rules=rules, ban_strikes=2)
    await again.ask(TEXT, BAD, 400)
    await Server(*served, ban_rules=rules).ask(TEXT, HELLO, 403)


@pytest.mark.parametrize("words", [("The pass", "word is"), ("a", " b ", "password", " c")])
async def test_an_answer_that_breaks_a_rule_is_stopped(server: Server, words: tuple[str, ...]) -> None:
    server.model_server.script = says(*words, "never", "said")
    answer = await server.ask(TEXT, HELLO | {"user": "eve"})
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert "password" not in choice["text"]
    assert server.strikes == [("eve", "secret")]
    assert server.model_server.num_written <= len(words)
    assert server.model_server.num_running == 0


async def test_a_stream_ends_where_it_breaks_a_rule(server: Server) -> None:
    server.model_server.script = says("The ", "password", " is")
    told = await server.ask(CHAT, {"model": "tiny", "stream": True, "messages": [ASKED]})
    assert "The " in told
    assert "password" not in told
    assert '"finish_reason":"content_filter"' in told
    assert told.endswith("data: [DONE]\n\n")


async def test_an_exact_rule_looks_at_the_whole_answer(server: Server) -> None:
    server.model_server.script = says("Pol", "ly")
    assert (await server.ask(TEXT, HELLO))["choices"][0]["finish_reason"] == "content_filter"
    server.model_server.script = says("Polly ", "wants")
    assert (await server.ask(TEXT, HELLO))["choices"][0]["finish_reason"] == "stop"


async def test_arguments_of_a_call_are_part_of_the_answer(server: Server) -> None:
    async def calls(request: Generate) -> AsyncGenerator[str | Finish, None]:
        yield "x"
        call = ToolCall("c", "f", '{"a": "password"}')
        yield Finish(request.request_id, "stop", 1, 1, tool_calls=(call,))

    async def generate(request: Generate) -> AsyncGenerator[Any, None]:
        async for piece in calls(request):
            if isinstance(piece, Finish):
                yield piece

    server.model_server.generate = generate  # type: ignore[method-assign,assignment]
    body = {"model": "tiny", "messages": [ASKED]}
    (choice,) = (await server.ask(CHAT, body))["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["tool_calls"] is None


async def test_a_broken_answer_is_told_as_without_rules(server: Server) -> None:
    async def breaks(request: Generate) -> AsyncGenerator[Any, None]:
        yield Finish(request.request_id, "stop", 1, 1)
        yield Finish(request.request_id, "aborted", 1, 1)

    server.model_server.generate = breaks  # type: ignore[method-assign,assignment]
    await server.ask(TEXT, HELLO | {"n": 2}, 503)


async def test_all_samples_of_a_request_end_together(server: Server) -> None:
    server.model_server.script = says("a ", "password")
    choices = (await server.ask(TEXT, HELLO | {"n": 3}))["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["content_filter"] * 3
    assert server.strikes == [("", "secret")]


async def test_an_answer_in_the_background_is_counted_once_and_not_shown(server: Server) -> None:
    first = await server.ask(TEXT, HELLO | {"background": True, "user": "eve"}, 202)
    epoch = await server.services.ledger.open_epoch()
    (row,) = await server.services.ledger.next_grants(epoch, 1, ("generate",))
    body = msgspec.msgpack.encode([Completion("the password", "stop", 3, 2)])
    await server.services.ledger.finish(row.id, epoch, body)
    note_background(server.services.abuse_checker, row, Result(row.id, epoch, body))
    async with client_of(server.app) as client:
        for _ in range(2):
            (choice,) = (await client.get(f"{TEXT}/{first['id']}")).json()["choices"]
            assert (choice["text"], choice["finish_reason"]) == ("", "content_filter")
    server.services.writer.write(lambda _: None).result(5)  # the strike was written before this
    assert server.strikes == [("eve", "secret")]


async def test_rules_are_read_again_and_the_last_good_ones_stay(server: Server, rules: Path, log_file: Any) -> None:
    def change(text: str, at: int) -> None:
        rules.write_text(text)
        os.utime(rules, (at, at))
        server.clock.now += MAX_AGE_S

    await server.ask(TEXT, {"model": "tiny", "prompt": "gold"})
    change("- {name: gold, match: substring, text: gold}", 1)
    await server.ask(TEXT, {"model": "tiny", "prompt": "gold"}, 400)
    await server.ask(TEXT, BAD)
    change("- {name: gold, match: substring", 2)
    await server.ask(TEXT, {"model": "tiny", "prompt": "gold"}, 400)
    assert "the rules stay as they were" in log_file.getvalue()
    assert "line 1: not valid YAML" in log_file.getvalue()


def test_broken_rules_end_the_start(served: tuple[Services, Scripted], rules: Path) -> None:
    rules.write_text("- {name: x}")
    with pytest.raises(ConfigError, match="line 1: match is missing: how a text is compared"):
        Server(*served, ban_rules=rules)


async def test_without_rules_nothing_is_looked_at(served: tuple[Services, Scripted]) -> None:
    server = Server(*served)
    await server.ask(TEXT, BAD)
    await server.ask(TEXT, {"model": "tiny", "prompt": [1, 2, 3]})
    pieces = server.model_server.generate(Generate("r", "ann", "tiny"))
    assert server.services.abuse_checker.watched(Generate("r", "ann", "tiny"), pieces) is pieces
    await pieces.aclose()
    assert server.strikes == []


async def test_administrators_ban_and_forgive(served: tuple[Services, Scripted]) -> None:
    server = Server(*served)
    admin, user = make_key(server.services, "admin", scopes=["admin"]), make_key(server.services, "user")
    for method, path in (("GET", "/v1/bans"), ("POST", "/v1/bans"), ("DELETE", "/v1/bans/x")):
        async with client_of(server.app, user) as client:
            assert (await client.request(method, path)).status_code == 403
    (ban,) = (await server.ask("/v1/bans", {"key": "user", "reason": "sold"}, 201, admin))["data"]
    assert (ban["key"], ban["owner"], ban["user"], ban["reason"]) == ("user", "local", None, "sold")
    server.clock.now += MAX_AGE_S
    assert "(sold)" in (await server.ask(TEXT, HELLO, 403, user))["error"]["message"]
    await server.ask("/v1/bans", {"key": "user"}, 409, admin)
    await server.ask("/v1/bans", {"key": "none"}, 404, admin)
    async with client_of(server.app, admin) as client:
        assert (await client.delete(f"/v1/bans/{ban['id']}")).status_code == 204
        assert (await client.delete(f"/v1/bans/{ban['id']}")).status_code == 404
        assert (await client.get("/v1/bans")).json() == {"data": []}
    server.clock.now += MAX_AGE_S
    await server.ask(TEXT, HELLO, 200, user)
