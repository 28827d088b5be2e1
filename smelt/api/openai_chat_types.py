"""What a request for the next turn of a chat may hold: messages, tools, their bounds; renders and answers nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from smelt.api.openai_parsing import Body, Neutral, check_neutral, unsupported
from smelt.api.openai_types import (
    MAX_LOGPROBS,
    MAX_TOKENS,
    SamplingBody,
    Text,
    check_choices,
    check_logprobs,
    check_size,
)
from smelt.errors import InvalidInput
from smelt.types import ChatMessage, Grammar, SamplingParams, ToolCall

MAX_MESSAGES = 1024
MAX_TOOLS = 128  # offered in a request, or called in a turn
MAX_TOOL_BYTES = 2**16  # of all definitions together
MAX_NAME_CHARS = 64
# Where the model's context is unknown until it is loaded.
CHAT_TOKENS = 1024

# What clients send back with an answer of the assistant's.
NEUTRAL_IN_MESSAGE: Neutral = {"annotations": ([],), "audio": (), "function_call": (), "refusal": ()}
NEUTRAL_IN_FUNCTION: Neutral = {"strict": (False,)}

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class CalledFunction(Body):
    """A function that the assistant wanted called."""

    name: Name
    arguments: Text


class Called(Body):
    """One call of a turn of the assistant's."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class Function(Body):
    """A function that the assistant may want called."""

    name: str = Field(pattern=rf"^[\w-]{{1,{MAX_NAME_CHARS}}}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments")


class Tool(Body):
    """Something that the assistant may use."""

    type: Literal["function"]
    function: Function

    def definition(self) -> dict[str, Any]:
        """What templates take."""
        known = {name: getattr(self.function, name) for name in Function.model_fields}
        return {"type": self.type, "function": {name: value for name, value in known.items() if value is not None}}


class NamedFunction(Body):
    """One of the functions that are offered."""

    name: Name


class ToolChoice(Body):
    """The function that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[Called], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = Field(None, description="which call a turn of the role tool answers")

    @property
    def text(self) -> str:
        """All its parts."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @property
    def num_chars(self) -> int:
        """How long it is, with its calls."""
        return len(self.text) + sum(len(call.function.arguments) for call in self.tool_calls or ())

    def turn(self) -> ChatMessage:
        """As models know it: the developer is the system."""
        calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ())
        role = "system" if self.role == "developer" else self.role
        return ChatMessage(role, self.text, calls, self.tool_call_id, self.name)

    def check(self, place: str) -> None:
        """InvalidInput for what a turn of its role cannot have, or lacks."""
        check_neutral(self.model_extra, NEUTRAL_IN_MESSAGE, place)
        for part in self.content if isinstance(self.content, list) else ():
            check_neutral(part.model_extra, {}, f"{place}content.")
        for number, call in enumerate(self.tool_calls or ()):
            check_neutral(call.model_extra, {}, f"{place}tool_calls.{number}.")
            check_neutral(call.function.model_extra, {}, f"{place}tool_calls.{number}.function.")
        if self.content is None and not self.tool_calls:
            raise InvalidInput(f"{place}content is missing", f"{place}content")
        if self.tool_calls and self.role != "assistant":
            raise InvalidInput(f"{place}tool_calls belong to turns of the assistant", f"{place}tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            what = "is missing" if self.role == "tool" else "belongs to turns of the role tool"
            raise InvalidInput(f"{place}tool_call_id {what}", f"{place}tool_call_id")
        if self.name is not None and self.role != "tool":
            raise unsupported(f"{place}name")


class ChatBody(SamplingBody):
    """Write the next turn of a conversation."""

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_MESSAGES, fail_fast=True, description="the conversation so far"
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="the newer name of max_tokens")
    logprobs: bool | None = Field(None, description="tell how likely each token was")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="and so many of the likeliest at its place (0)")
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="functions that may be called")
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = Field(
        None, description="whether a function may be called (auto), has to be, or which one"
    )
    parallel_tool_calls: bool | None = Field(None, description="true: several calls may come at once")

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def num_logprobs(self) -> int | None:
        """As it was asked for, in two parameters."""
        return self.top_logprobs or 0 if self.logprobs else None

    def turns(self) -> tuple[ChatMessage, ...]:
        """The conversation. InvalidInput where it is none, or too long."""
        for number, message in enumerate(self.messages):
            message.check(f"messages.{number}.")
        check_size(sum(message.num_chars for message in self.messages), "messages")
        return tuple(message.turn() for message in self.messages)

    def definitions(self) -> tuple[dict[str, Any], ...]:
        """The tools as templates take them: none where none may be used. InvalidInput for what we lack."""
        for number, tool in enumerate(self.tools or ()):
            check_neutral(tool.model_extra, {}, f"tools.{number}.")
            check_neutral(tool.function.model_extra, NEUTRAL_IN_FUNCTION, f"tools.{number}.function.")
        self._check_choice()
        definitions = tuple(tool.definition() for tool in self.tools or () if self._is_offered(tool))
        if (num_bytes := len(msgspec.json.encode(definitions))) > MAX_TOOL_BYTES:
            raise InvalidInput(f"tools have {num_bytes:,} bytes; {MAX_TOOL_BYTES:,} is the limit", "tools")
        return definitions

    def _is_offered(self, tool: Tool) -> bool:
        if isinstance(self.tool_choice, ToolChoice):
            return tool.function.name == self.tool_choice.function.name
        return self.tool_choice != "none"

    def params(self, context: int | None) -> SamplingParams:
        """How to draw, for a model of that context. InvalidInput for what does not go together or is too much."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidInput("top_logprobs needs logprobs: true", "top_logprobs")
        max_tokens = self.longest(context)
        check_choices(self.num_samples, max_tokens)
        check_logprobs(self.num_logprobs, max_tokens * self.num_samples, "logprobs")
        params = self.sampling(max_tokens)
        return replace(params, grammar=call_grammar(self.definitions())) if self.must_call else params

    def longest(self, context: int | None) -> int:
        """How many tokens a turn may have; by default as many as the context, or as log-probabilities may be told."""
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise InvalidInput("max_tokens and max_completion_tokens are one thing; give one of them", "max_tokens")
        if asked := self.max_completion_tokens or self.max_tokens:
            return asked
        longest = min(context or CHAT_TOKENS, MAX_TOKENS)
        if self.num_logprobs is None:
            return longest
        return min(longest, MAX_LOGPROBS // (self.num_samples * (1 + self.num_logprobs)))

    def _check_choice(self) -> None:
        if isinstance(self.tool_choice, ToolChoice):
            check_neutral(self.tool_choice.model_extra, {}, "tool_choice.")
            check_neutral(self.tool_choice.function.model_extra, {}, "tool_choice.function.")
        if self.must_call and not any(map(self._is_offered, self.tools or ())):
            raise InvalidInput("tool_choice: no such function is among the tools", "tool_choice")
        if not self.tools or self.tool_choice == "none":
            return
        if self.parallel_tool_calls is False and not self.must_call:
            raise InvalidInput(
                "parallel_tool_calls: false is not supported where the model decides whether to call",
                "parallel_tool_calls",
            )
        if self.response_format is not None and self.response_format.type != "text":
            raise InvalidInput("response_format and tools do not go together; leave one out", "response_format")


def call_grammar(definitions: Sequence[dict[str, Any]]) -> Grammar:
    """One call of one of these functions, as JSON. InvalidInput where their schemas cannot be one."""
    shared: dict[str, dict[str, Any]] = {}
    calls = [_call_schema(definition["function"], shared) for definition in definitions]
    return Grammar("json_schema", msgspec.json.encode({"anyOf": calls, **shared}).decode())


def _call_schema(function: dict[str, Any], shared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`shared` gets what the function's schema refers to from its root, which is no longer one."""
    arguments = {"type": "object", **function.get("parameters", {})}
    for place in ("$defs", "definitions"):
        if not isinstance(arguments.get(place), dict):
            continue  # the grammar's business
        for name, schema in arguments.pop(place).items():
            if shared.setdefault(place, {}).setdefault(name, schema) != schema:
                raise InvalidInput(f"tools: two of them mean different things by {place}/{name[:60]}", "tools")
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
