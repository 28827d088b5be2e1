"""Answers in the shapes of OpenAI's API: whole, in chunks, and promised for later; knows no route and no model.

What differs between completing a text and writing a turn of a chat is one `Shapes` each. Chunks are plain dicts,
because there is one for each token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from smelt import __version__
from smelt.api.failures import openai_error
from smelt.control.completions import Promise, Status
from smelt.transport.failures import error_of
from smelt.transport.messages import Completion

# The same seed gives the same answer as long as this stays the same.
FINGERPRINT = f"smelt-{__version__}"
DONE = b"data: [DONE]\n\n"

Chunk = dict[str, Any]

_encoder = msgspec.json.Encoder()
encode: Callable[[Any], bytes] = _encoder.encode


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of an answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TextChoice:
    """The continuation of one prompt."""

    index: int
    text: str
    finish_reason: str
    logprobs: None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What the assistant says."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """The next turn."""

    index: int
    message: Reply
    finish_reason: str
    logprobs: None = None


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
class ModelCard:
    """A model that may be asked."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "smelt"


@dataclass(frozen=True, slots=True)
class ModelList:
    """All of them."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


@dataclass(frozen=True, slots=True)
class Shapes:
    """How one of the two APIs says things. The functions make a choice, or that of a chunk."""

    prefix: str  # of ids
    chunk: str  # the `object` of chunks
    whole: type[TextCompletion] | type[ChatCompletion]
    promised: type[PromisedText] | type[PromisedChat]
    choice: Callable[[int, Completion], TextChoice | ChatChoice]
    opening: Callable[[int], Chunk] | None
    piece: Callable[[int, str], Chunk]
    ending: Callable[[int, str], Chunk]


def _text_choice(index: int, completion: Completion) -> TextChoice:
    return TextChoice(index, completion.text, completion.reason)


def _text_piece(index: int, text: str) -> Chunk:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def _text_ending(index: int, reason: str) -> Chunk:
    return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}


def _chat_choice(index: int, completion: Completion) -> ChatChoice:
    return ChatChoice(index, Reply(completion.text), completion.reason)


def _chat_opening(index: int) -> Chunk:
    delta = {"role": "assistant", "content": "", "refusal": None}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _chat_piece(index: int, text: str) -> Chunk:
    return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}


def _chat_ending(index: int, reason: str) -> Chunk:
    return {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}


TEXT = Shapes("cmpl-", "text_completion", TextCompletion, PromisedText, _text_choice, None, _text_piece, _text_ending)
CHAT = Shapes(
    "chatcmpl-",
    "chat.completion.chunk",
    ChatCompletion,
    PromisedChat,
    _chat_choice,
    _chat_opening,
    _chat_piece,
    _chat_ending,
)


@dataclass(slots=True)
class Story:
    """One answer as events: what all its chunks have in common, and which choices have begun."""

    shapes: Shapes
    id: str
    created: int
    model: str
    counts_tokens: bool = False
    _head: Chunk = field(init=False)
    _begun: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._head = {
            "id": self.id,
            "object": self.shapes.chunk,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }
        if self.counts_tokens:
            self._head["usage"] = None

    def piece(self, index: int, text: str) -> bytes:
        """More of a choice; b"" where there is nothing to show."""
        event = self._opening(index)
        return event + self._event(self.shapes.piece(index, text)) if text else event

    def ending(self, index: int, reason: str) -> bytes:
        """The end of a choice."""
        return self._opening(index) + self._event(self.shapes.ending(index, reason))

    def end(self, usage: Usage) -> bytes:
        """The end of them all."""
        if not self.counts_tokens:
            return DONE
        return b"data: " + encode({**self._head, "choices": [], "usage": usage}) + b"\n\n" + DONE

    def _opening(self, index: int) -> bytes:
        if self.shapes.opening is None or index in self._begun:
            return b""
        self._begun.add(index)
        return self._event(self.shapes.opening(index))

    def _event(self, choice: Chunk) -> bytes:
        return b"data: " + encode({**self._head, "choices": [choice]}) + b"\n\n"


def usage_of(completions: Sequence[Completion]) -> Usage:
    """The tokens of all choices."""
    num_prompt = sum(completion.num_prompt_tokens for completion in completions)
    num_output = sum(completion.num_output_tokens for completion in completions)
    return Usage(num_prompt, num_output, num_prompt + num_output)


def whole(shapes: Shapes, answer_id: str, created: int, model: str, completions: Sequence[Completion]) -> bytes:
    """An answer, all at once."""
    choices: list[Any] = [shapes.choice(index, completion) for index, completion in enumerate(completions)]
    answer = shapes.whole(id=answer_id, created=created, model=model, choices=choices, usage=usage_of(completions))
    return encode(answer)


def promised(shapes: Shapes, promise: Promise) -> bytes:
    """An answer in the background, as it stands."""
    choices: list[Any] = [shapes.choice(index, each) for index, each in enumerate(promise.completions)]
    answer = shapes.promised(
        id=shapes.prefix + promise.future_id,
        created=int(promise.created),
        model=promise.model,
        choices=choices,
        usage=usage_of(promise.completions) if promise.completions else None,
        status=promise.status,
        error=None if promise.failure is None else ErrorBody(**openai_error(error_of(promise.failure))["error"]),
    )
    return encode(answer)


def error_event(error: Exception, request_id: str) -> bytes:
    """The last event of a stream that has failed."""
    return b"data: " + encode(openai_error(error, request_id)) + b"\n\n"
