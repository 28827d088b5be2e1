"""Conversations as text for models without a chat template; knows no tokenizer."""

import json
from collections.abc import Sequence
from typing import Any

from smelt.errors import DataError
from smelt.types import ChatMessage, ToolCall

ROLE_NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
TOOL_FIELDS = ("tool_call_id", "name")  # of a turn that says what a call has given


def render_messages(messages: Sequence[ChatMessage]) -> str:
    """A whole conversation, one paragraph per turn that begins with who speaks."""
    return "".join(f"{_speaker(message)} {message.content}\n\n" for message in messages)


def render_prompt(messages: Sequence[ChatMessage]) -> str:
    """The conversation so far and the beginning of the assistant's next turn, for a model to go on from."""
    return render_messages(messages) + f"{ROLE_NAMES['assistant']}:"


def stop_strings() -> tuple[str, ...]:
    """What shows, in a text that goes on from `render_prompt`, that somebody else has begun to speak."""
    return tuple(f"\n\n{name}:" for name in ROLE_NAMES.values() if name != ROLE_NAMES["assistant"])


def _speaker(message: ChatMessage) -> str:
    return ROLE_NAMES.get(message.role, message.role.capitalize()) + ":"


def parse_messages(value: Any) -> list[ChatMessage]:
    """The turns in a JSON value, in OpenAI's form. DataError says which one lacks a role or a text."""
    if not isinstance(value, list) or not value:
        raise DataError("`messages` must be a list of turns such as {'role': 'user', 'content': 'Hello'}")
    return [_parse_turn(turn, number) for number, turn in enumerate(value, start=1)]


def _parse_turn(turn: Any, number: int) -> ChatMessage:
    found = turn if isinstance(turn, dict) else {}
    role, content = found.get("role"), found.get("content")
    called = found.get("tool_calls") or ()
    calls = tuple(_parse_call(call, number) for call in (called if isinstance(called, list | tuple) else [called]))
    if content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"turn {number} of `messages` must have a `role` and a `content`, both text")
    return ChatMessage(role, content, calls, *(found.get(name) if role == "tool" else None for name in TOOL_FIELDS))


def _parse_call(call: Any, number: int) -> ToolCall:
    """OpenAI's form has the function in an object of its own, ours (a ToolCall as a dict) has not."""
    call = call if isinstance(call, dict) else {}
    function = call.get("function", call)
    name, arguments = (function.get("name"), function.get("arguments", "{}")) if isinstance(function, dict) else (0, 0)
    if not isinstance(name, str) or not isinstance(arguments, str | dict):
        raise DataError(f"turn {number} of `messages` has a tool call without the `name` and `arguments` of a function")
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(str(call.get("id") or ""), name, arguments)
