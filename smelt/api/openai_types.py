"""What a request to OpenAI's API may hold: its fields, their bounds, and what is refused by name; answers nothing.

What we do not support is refused unless its value asks for what happens anyway. Nothing is ignored.
"""

from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smelt.errors import InvalidInput
from smelt.types import ChatMessage, SamplingParams

MAX_TOKENS = 2**16
MAX_PROMPTS = 16
MAX_PROMPT_CHARS = 2**20  # of all prompts or messages together
MAX_PROMPT_TOKENS = 2**17
MAX_MESSAGES = 1024
MAX_STOPS = 4
MAX_STOP_CHARS = 256
# Of a completion and, where the model's context is unknown until it is loaded, of a turn of a chat.
COMPLETION_TOKENS = 16
CHAT_TOKENS = 1024

INT64 = 2**63
SHOWN_CHARS = 60

B = TypeVar("B", bound=BaseModel)

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
Prompts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenPrompts = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]

# The values with which a parameter that we lack is harmless, besides null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
# What clients send back with an answer of the assistant's.
NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
NEUTRAL_IN_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}

# What a parameter may be, where it may be several things and pydantic would tell of each.
ALTERNATIVES = {
    "prompt": f"a text, a list of token ids, or a list of up to {MAX_PROMPTS} of either",
    "stop": f"a text of 1 to {MAX_STOP_CHARS} characters, or a list of up to {MAX_STOPS} of them",
    "content": 'a text, or a list of parts such as {"type": "text", "text": "Hello"}',
}


class Body(BaseModel):
    """Strict JSON: no text where a number is due. Other fields are kept, to be refused by name."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool | None = Field(None, description="end with a chunk that counts the tokens")


class SamplingBody(Body):
    """What both APIs have in common."""

    model: str = Field(max_length=256, description="name of a served model, or `default`")
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="longest answer, in tokens")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token (1)")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest tokens of this sum (1)")
    seed: int | None = Field(None, ge=-INT64, lt=INT64, description="the same seed gives the same answer")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = Field(
        None, description=f"texts before which the answer ends, {MAX_STOPS} at most"
    )
    stream: bool | None = Field(None, description="send the answer as it is written")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="your name for whoever asks you")
    background: bool | None = Field(None, description="answer 202 with an id at once; the answer is fetched by it")

    def sampling(self, max_tokens: int) -> SamplingParams:
        """How to draw, with OpenAI's defaults."""
        stop = self.stop or ()
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends by counting the tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionBody(SamplingBody):
    """Go on from a text."""

    prompt: Text | TokenIds | Prompts | TokenPrompts = Field(
        union_mode="left_to_right", description=ALTERNATIVES["prompt"]
    )

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt that there is to be an answer to."""
        given: list[Any] = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if not given or isinstance(given[0], int):
            return [tuple(given)]
        return [each if isinstance(each, str) else tuple(each) for each in given]


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]

    def turn(self) -> ChatMessage:
        """As models know it: the developer is the system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage("system" if self.role == "developer" else self.role, text)


class ChatBody(SamplingBody):
    """Write the next turn of a conversation."""

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_MESSAGES, fail_fast=True, description="the conversation so far"
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="the newer name of max_tokens")


def parse(body_class: type[B], raw: bytes) -> B:
    """The body of a request. InvalidInput says what is wrong, and names the parameter."""
    try:
        return body_class.model_validate_json(raw)
    except ValidationError as report:
        raise _explained(report) from None


def check_supported(body: SamplingBody) -> None:
    """InvalidInput for what we do not have, and for parameters that do not go together."""
    if body.model_extra:
        _check_neutral(body.model_extra, NEUTRAL)
    if body.stream_options is not None:
        if not body.stream:
            raise InvalidInput("stream_options needs stream: true", "stream_options")
        _check_neutral(body.stream_options.model_extra or {}, NEUTRAL_IN_STREAM_OPTIONS, "stream_options.")
    if body.background and body.stream:
        raise InvalidInput("an answer in the background cannot be streamed: set one of the two", "background")


def check_prompts(prompts: list[str | tuple[int, ...]], background: bool) -> None:
    """InvalidInput for more than we take at once."""
    if background and len(prompts) > 1:
        raise InvalidInput("a request in the background has one prompt; send one for each", "prompt")
    if () in prompts:
        raise InvalidInput(
            "a prompt has no tokens; give at least one, or an empty text to start from nothing", "prompt"
        )
    _check_size(sum(map(len, prompts)), "prompt")


def check_messages(messages: list[Message]) -> None:
    """InvalidInput for what a turn cannot have."""
    num_chars = 0
    for number, message in enumerate(messages):
        if message.model_extra:
            _check_neutral(message.model_extra, NEUTRAL_IN_MESSAGE, f"messages.{number}.")
        if isinstance(message.content, str):
            num_chars += len(message.content)
            continue
        for part in message.content:
            _check_neutral(part.model_extra or {}, {}, f"messages.{number}.content.")
            num_chars += len(part.text)
    _check_size(num_chars, "messages")


def completion_tokens(body: CompletionBody) -> int:
    """How long an answer may become."""
    return body.max_tokens or COMPLETION_TOKENS


def chat_tokens(body: ChatBody, context: int | None) -> int:
    """How long a turn may become; by default as long as the model's context."""
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise InvalidInput("max_tokens and max_completion_tokens are one thing; give one of them", "max_tokens")
    return body.max_completion_tokens or body.max_tokens or min(context or CHAT_TOKENS, MAX_TOKENS)


@cache
def schema_of(body_class: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a body, in one piece, for OpenAPI's document."""
    schema = body_class.model_json_schema()
    definitions = schema.pop("$defs", {})
    return dict(_inlined(schema, definitions))


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(value, definitions) for name, value in schema.items()}


def _check_size(num_chars: int, param: str) -> None:
    if num_chars > MAX_PROMPT_CHARS:
        raise InvalidInput(f"{param}: {num_chars:,} characters are too many; {MAX_PROMPT_CHARS:,} is the limit", param)


def _check_neutral(given: dict[str, Any], neutral: dict[str, tuple[Any, ...]], place: str = "") -> None:
    for name, value in given.items():
        if name not in neutral:
            shown = name[:SHOWN_CHARS]
            raise InvalidInput(f"unknown parameter {place}{shown}; leave it out", f"{place}{shown}")
        if value is not None and not any(type(value) is type(each) and value == each for each in neutral[name]):
            raise InvalidInput(f"{place}{name} is not supported; leave it out", f"{place}{name}")


def _explained(report: ValidationError) -> InvalidInput:
    """The first fault as a sentence with the parameter's name."""
    fault = report.errors(include_url=False, include_input=False, include_context=False)[0]
    place, message = [str(part) for part in fault["loc"]], fault["msg"]
    if fault["type"] == "json_invalid":
        return InvalidInput(f"the body is not JSON that we can read: {message.removeprefix('Invalid JSON: ')}")
    if not place:
        return InvalidInput("the body must be a JSON object")
    for depth, name in enumerate(place):
        if name in ALTERNATIVES and fault["type"] != "missing":
            param = ".".join(place[: depth + 1])
            return InvalidInput(f"{param} must be {ALTERNATIVES[name]}", param)
    param = ".".join(place)
    if fault["type"] == "missing":
        return InvalidInput(f"{param} is missing", param)
    verb = message.partition(" should ")[2]
    return InvalidInput(f"{param} should {verb}" if verb else f"{param}: {message}", param)
