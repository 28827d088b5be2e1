"""Answers in the shapes of OpenAI's API, whole and as events; computes nothing, knows no request.

What differs between completing a text and writing a turn of a chat is one `Shapes` each. Chunks are plain dicts,
because there is one for each token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from smelt import __version__
from smelt.api.failures import openai_error
from smelt.api.openai_logprobs import ChatLogprobs, Offsets, TextLogprobs, chat_logprobs, text_logprobs
from smelt.control.completions import Promise, Status
from smelt.transport.failures import error_of
from smelt.transport.messages import Completion, Finish, TextChunk
from smelt.types import TokenLogprob, ToolCall

# The same seed gives the same answer as long as this stays the same.
FINGERPRINT = f"smelt-{__version__}"
DONE = b"data: [DONE]\n\n"

Chunk = dict[str, Any]

_encoder = msgspec.json.Encoder()
encode: Callable[[Any], bytes] = _encoder.encode


@dataclass(frozen=True, slots=True)
class PromptDetails:
    """What is told of the prompts' tokens."""

    cached_tokens: int  # needed no computing


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of an answer. A prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


@dataclass(frozen=True, slots=True)
class TextChoice:
    """The continuation of one prompt."""

    index: int
    text: str
    finish_reason: str
    logprobs: TextLogprobs | None = None


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A function, and its arguments as JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class AskedCall:
    """A function that the assistant wants called."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


@dataclass(frozen=True, slots=True)
class Reply:
    """What the assistant says."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[AskedCall] | None = None


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """The next turn."""

    index: int
    message: Reply
    finish_reason: str
    logprobs: ChatLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextCompletion:
    """The answer to /v1/completions."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None
    object: Literal["text_completion"] = "text_completion"
    system_fingerprint: str = FINGERPRINT


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCompletion:
    """The answer to /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None
    object: Literal["chat.completion"] = "chat.completion"
    system_fingerprint: str = FINGERPRINT


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """Why there is no answer."""

    message: str
    type: str
    param: str | None
    code: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromisedText(TextCompletion):
    """An answer in the background: `choices` has it when `status` is completed."""

    status: Status
    error: ErrorBody | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromisedChat(ChatCompletion):
    """An answer in the background: `choices` has it when `status` is completed."""

    status: Status
    error: ErrorBody | None


@dataclass(frozen=True, slots=True)
class Shapes:
    """How one of the two APIs says things. The functions make a choice, or that of a chunk."""

    prefix: str  # of ids
    chunk: str  # the `object` of chunks
    whole: type[TextCompletion] | type[ChatCompletion]
    promised: type[PromisedText] | type[PromisedChat]
    choice: Callable[[int, Completion, bool], TextChoice | ChatChoice]  # the last: whether with log-probabilities
    opening: Callable[[int], Chunk] | None
    piece: Callable[[int, str], Chunk]
    ending: Callable[[int, str], Chunk]
    calls: Callable[[int, Sequence[ToolCall]], Chunk] | None
    logprobs: Callable[[Sequence[TokenLogprob], Offsets], TextLogprobs | ChatLogprobs]


def _text_choice(index: int, completion: Completion, has_logprobs: bool) -> TextChoice:
    logprobs = text_logprobs(completion.logprobs, Offsets()) if has_logprobs else None
    return TextChoice(index, completion.text, reason_of(completion), logprobs)


def _text_piece(index: int, text: str) -> Chunk:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def _text_ending(index: int, reason: str) -> Chunk:
    return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}


def _chat_choice(index: int, completion: Completion, has_logprobs: bool) -> ChatChoice:
    calls = [AskedCall(call.id, FunctionCall(call.name, call.arguments)) for call in completion.tool_calls]
    reply = Reply(completion.text or (None if calls else ""), tool_calls=calls or None)
    return ChatChoice(index, reply, reason_of(completion), chat_logprobs(completion.logprobs) if has_logprobs else None)


def _chat_opening(index: int) -> Chunk:
    delta = {"role": "assistant", "content": "", "refusal": None}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _chat_piece(index: int, text: str) -> Chunk:
    return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}


def _chat_ending(index: int, reason: str) -> Chunk:
    return {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}


def _chat_calls(index: int, calls: Sequence[ToolCall]) -> Chunk:
    deltas = [
        {"index": number, "id": call.id, "type": "function", "function": FunctionCall(call.name, call.arguments)}
        for number, call in enumerate(calls)
    ]
    return {"index": index, "delta": {"tool_calls": deltas}, "logprobs": None, "finish_reason": None}


def _chat_logprobs(logprobs: Sequence[TokenLogprob], _offsets: Offsets) -> ChatLogprobs:
    return chat_logprobs(logprobs)


TEXT = Shapes(
    "cmpl-",
    "text_completion",
    TextCompletion,
    PromisedText,
    _text_choice,
    None,
    _text_piece,
    _text_ending,
    None,
    text_logprobs,
)
CHAT = Shapes(
    "chatcmpl-",
    "chat.completion.chunk",
    ChatCompletion,
    PromisedChat,
    _chat_choice,
    _chat_opening,
    _chat_piece,
    _chat_ending,
    _chat_calls,
    _chat_logprobs,
)


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of an answer before it is written. `num_samples` are the choices of each prompt."""

    shapes: Shapes
    id: str
    created: int
    model: str
    num_samples: int = 1
    has_logprobs: bool = False


class Story:
    """One answer as events: what all its chunks have in common, and how far each choice is."""

    def __init__(self, head: Head, counts_tokens: bool) -> None:
        self._shapes = head.shapes
        self._num_samples = head.num_samples
        self._counts_tokens = counts_tokens
        self._begun: set[int] = set()
        self._offsets: dict[int, Offsets] = {}
        self._ends: dict[int, Finish] = {}
        self._head: Chunk = {
            "id": head.id,
            "object": head.shapes.chunk,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": FINGERPRINT,
        }
        if counts_tokens:
            self._head["usage"] = None

    def piece(self, index: int, chunk: TextChunk) -> bytes:
        """More of a choice; b"" where there is nothing to show."""
        event = self._opening(index)
        if not (chunk.text or chunk.logprobs):
            return event
        choice = self._shapes.piece(index, chunk.text)
        if chunk.logprobs:
            offsets = self._offsets.setdefault(index, Offsets())
            choice["logprobs"] = self._shapes.logprobs(chunk.logprobs, offsets)
        return event + self._event(choice)

    def ending(self, index: int, finish: Finish) -> bytes:
        """The end of a choice, after the calls that it was understood as."""
        self._ends[index] = finish
        event = self._opening(index)
        if finish.tool_calls and self._shapes.calls is not None:
            event += self._event(self._shapes.calls(index, finish.tool_calls))
        return event + self._event(self._shapes.ending(index, reason_of(finish)))

    def end(self) -> bytes:
        """The end of them all."""
        if not self._counts_tokens:
            return DONE
        usage = usage_of([self._ends[index] for index in sorted(self._ends)], self._num_samples)
        return b"data: " + encode({**self._head, "choices": [], "usage": usage}) + b"\n\n" + DONE

    def _opening(self, index: int) -> bytes:
        if self._shapes.opening is None or index in self._begun:
            return b""
        self._begun.add(index)
        return self._event(self._shapes.opening(index))

    def _event(self, choice: Chunk) -> bytes:
        return b"data: " + encode({**self._head, "choices": [choice]}) + b"\n\n"


def reason_of(end: Completion | Finish) -> str:
    """Why an answer has ended, in OpenAI's words."""
    return "tool_calls" if end.tool_calls else end.reason


def usage_of(ends: Sequence[Completion | Finish], num_samples: int) -> Usage:
    """The tokens of all choices, in order, of which each prompt has so many."""
    num_prompt = sum(end.num_prompt_tokens for end in ends[::num_samples])
    num_output = sum(end.num_output_tokens for end in ends)
    of_prompts = [ends[first : first + num_samples] for first in range(0, len(ends), num_samples)]
    # One of the samples has computed what the others found.
    num_cached = sum(min(end.num_cached_tokens for end in samples) for samples in of_prompts)
    return Usage(num_prompt, num_output, num_prompt + num_output, PromptDetails(num_cached))


def whole(head: Head, completions: Sequence[Completion]) -> bytes:
    """An answer, all at once."""
    choices: list[Any] = [
        head.shapes.choice(index, completion, head.has_logprobs) for index, completion in enumerate(completions)
    ]
    usage = usage_of(completions, head.num_samples)
    return encode(head.shapes.whole(id=head.id, created=head.created, model=head.model, choices=choices, usage=usage))


def promised(shapes: Shapes, promise: Promise) -> bytes:
    """An answer in the background, as it stands."""
    completions = promise.completions
    choices: list[Any] = [shapes.choice(index, each, promise.has_logprobs) for index, each in enumerate(completions)]
    answer = shapes.promised(
        id=shapes.prefix + promise.future_id,
        created=int(promise.created),
        model=promise.model,
        choices=choices,
        usage=usage_of(completions, len(completions)) if completions else None,
        status=promise.status,
        error=None if promise.failure is None else ErrorBody(**openai_error(error_of(promise.failure))["error"]),
    )
    return encode(answer)


def error_event(error: Exception, request_id: str) -> bytes:
    """The last event of a stream that has failed."""
    return b"data: " + encode(openai_error(error, request_id)) + b"\n\n"
