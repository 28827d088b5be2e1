from dataclasses import asdict

import pytest

from smelt.data.chat import parse_messages, render_messages, render_prompt, stop_strings
from smelt.errors import DataError
from smelt.types import ChatMessage, ToolCall

TURNS = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello")]


def test_turns_are_paragraphs():
    assert render_messages(TURNS) == "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\n"


def test_a_prompt_and_its_answer_are_a_conversation():
    assert render_prompt(TURNS[:2]) + " Hello\n\n" == render_messages(TURNS)
    assert "\n\nUser:" in stop_strings()
    assert not any("Assistant" in stop for stop in stop_strings())


def test_messages_are_parsed():
    assert parse_messages([{"role": "user", "content": "Hi", "name": "x"}]) == [ChatMessage("user", "Hi")]


def test_calls_and_their_results_are_parsed():
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}},
        {"function": {"name": "g", "arguments": {"a": "ü"}}},
    ]
    turns = [
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"},
    ]
    parsed = parse_messages(turns)
    assert parsed == [
        ChatMessage("assistant", "", (ToolCall("c1", "f", '{"a": "ü"}'), ToolCall("", "g", '{"a": "ü"}'))),
        ChatMessage("tool", "1", (), "c1", "f"),
    ]
    assert parse_messages([asdict(turn) for turn in parsed]) == parsed


@pytest.mark.parametrize("call", [{}, {"name": 1}, {"function": {"arguments": "{}"}}, {"function": 1}, "f"])
def test_a_bad_call_is_named(call):
    with pytest.raises(DataError, match="turn 1 of `messages` has a tool call without"):
        parse_messages([{"role": "assistant", "content": "", "tool_calls": [call]}])
    with pytest.raises(DataError, match="has a tool call without"):
        parse_messages([{"role": "assistant", "content": "", "tool_calls": 5}])


@pytest.mark.parametrize("value", [None, [], "hi", {"role": "user"}])
def test_what_is_no_list_of_turns_is_refused(value):
    with pytest.raises(DataError, match="must be a list of turns"):
        parse_messages(value)


@pytest.mark.parametrize("turn", [{}, {"role": "user"}, {"role": "user", "content": 1}, "hi", None])
def test_the_bad_turn_is_named(turn):
    with pytest.raises(DataError, match="turn 2 of"):
        parse_messages([{"role": "user", "content": "Hi"}, turn])
