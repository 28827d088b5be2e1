"""What a request to complete texts, or to embed them, may hold: its fields and their bounds; answers nothing."""

from itertools import starmap
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from smelt.api.openai_parsing import Body, Neutral, check_neutral
from smelt.errors import InvalidInput
from smelt.types import Grammar, SamplingParams

MAX_TOKENS = 2**16
MAX_PROMPTS = 64
MAX_SAMPLES = 16  # n and best_of
MAX_CHOICES = 64  # of all prompts together, written whether they are given or not
MAX_ANSWER_TOKENS = 2**20  # of all choices together
MAX_LOGPROBS = 2**19  # tokens with their alternatives, of all choices together
MAX_PROMPT_CHARS = 2**20  # of all prompts or messages together
MAX_PROMPT_TOKENS = 2**17
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_BIASES = 300
MAX_TOP_K = 2**20
MAX_SCHEMA_BYTES = 2**16
MAX_PATTERN_CHARS = 4096
MAX_INPUTS = 2048
COMPLETION_TOKENS = 16

INT64 = 2**63

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
Prompts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenPrompts = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
Inputs = Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
TokenInputs = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
BiasedToken = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float | None, Field(ge=-2, le=2)]

# Of both APIs.
NEUTRAL: Neutral = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
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
NEUTRAL_IN_STREAM_OPTIONS: Neutral = {"include_obfuscation": (False,)}

ALTERNATIVES = {
    "prompt": f"a text, a list of token ids, or a list of up to {MAX_PROMPTS} of either",
    "input": f"a text, a list of token ids, or a list of up to {MAX_INPUTS} of either",
    "stop": f"a text of 1 to {MAX_STOP_CHARS} characters, or a list of up to {MAX_STOPS} of them",
    "content": 'a text, or a list of parts such as {"type": "text", "text": "Hello"}',
    "logit_bias": f'up to {MAX_BIASES} token ids with numbers from -100 to 100, such as {{"50256": -100}}',
    "tool_choice": '"none", "auto", "required", or {"type": "function", "function": {"name": ...}}',
}


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool | None = Field(None, description="end with a chunk that counts the tokens")


class JsonSchema(Body):
    """A schema that the answer is to follow."""

    schema_: dict[str, Any] = Field(alias="schema", description="JSON schema")
    name: str | None = Field(None, max_length=64)
    description: str | None = Field(None, max_length=4096)
    strict: bool | None = Field(None, description="it is always followed")


class ResponseFormat(Body):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = Field(None, description="with the type json_schema")
    pattern: str | None = Field(
        None, min_length=1, max_length=MAX_PATTERN_CHARS, description="regular expression, with the type regex"
    )

    def grammar(self) -> Grammar | None:
        """The same as the engine knows it. InvalidInput where the fields do not go together."""
        self._check_fields()
        if self.json_schema is not None:
            return Grammar("json_schema", _schema_text(self.json_schema.schema_))
        if self.pattern is not None:
            return Grammar("regex", self.pattern)
        return Grammar("json") if self.type == "json_object" else None

    def _check_fields(self) -> None:
        check_neutral(self.model_extra, {}, "response_format.")
        if self.json_schema is not None:
            check_neutral(self.json_schema.model_extra, {}, "response_format.json_schema.")
        for kind, name, value in (("json_schema", "json_schema", self.json_schema), ("regex", "pattern", self.pattern)):
            if (value is not None) != (self.type == kind):
                place = f"response_format.{name}"
                raise InvalidInput(f'{place} and the type "{kind}" need each other', place)


class SamplingBody(Body):
    """What both APIs have in common, and the usual additions of other servers."""

    model: str = Field(max_length=256, description="name of a served model, or `default`")
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="longest answer, in tokens")
    n: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="answers to each prompt (1)")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token (1)")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest tokens of this sum (1)")
    top_k: int | None = Field(None, ge=-1, le=MAX_TOP_K, description="draw from so many; 0 and -1 are all (all)")
    min_p: float | None = Field(None, ge=0, le=1, description="draw from those this likely beside the likeliest (0)")
    presence_penalty: Penalty = Field(None, description="taken from the logits of tokens that the answer has (0)")
    frequency_penalty: Penalty = Field(None, description="the same, for each time that it has them (0)")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=10, description="divides the logits of tokens that prompt or answer have (1)"
    )
    logit_bias: Annotated[dict[BiasedToken, Bias], Field(max_length=MAX_BIASES)] | None = Field(
        None, description="token id -> what is added to its logit"
    )
    seed: int | None = Field(None, ge=-INT64, lt=INT64, description="the same seed gives the same answer")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = Field(
        None, description=f"texts before which the answer ends, {MAX_STOPS} at most"
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description="tokens before which it ends"
    )
    ignore_eos: bool | None = Field(None, description="go on past the model's own end of text")
    response_format: ResponseFormat | None = Field(None, description="what the answer must look like")
    stream: bool | None = Field(None, description="send the answer as it is written")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="your name for whoever asks you")
    background: bool | None = Field(None, description="answer 202 with an id at once; the answer is fetched by it")

    @property
    def num_samples(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends by counting the tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def num_logprobs(self) -> int | None:
        """How many likely tokens are told at each place; None where no log-probabilities are."""
        return None

    def sampling(self, max_tokens: int, num_prompt_logprobs: int | None = None) -> SamplingParams:
        """How to draw, with OpenAI's defaults."""
        stop = self.stop or ()
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_given(self.temperature, 1.0),
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            top_p=_given(self.top_p, 1.0),
            min_p=_given(self.min_p, 0.0),
            seed=self.seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            presence_penalty=_given(self.presence_penalty, 0.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            logit_bias=tuple(starmap(_bias, (self.logit_bias or {}).items())),
            num_logprobs=self.num_logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
            ignore_eos=bool(self.ignore_eos),
            grammar=self.response_format.grammar() if self.response_format else None,
        )


class CompletionBody(SamplingBody):
    """Go on from a text."""

    prompt: Text | TokenIds | Prompts | TokenPrompts = Field(
        union_mode="left_to_right", description=ALTERNATIVES["prompt"]
    )
    max_tokens: int | None = Field(
        None, ge=0, le=MAX_TOKENS, description=f"longest answer, in tokens ({COMPLETION_TOKENS}); 0 with echo"
    )
    best_of: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="write so many and give the n likeliest (n)")
    echo: bool | None = Field(None, description="begin each answer with its prompt")
    logprobs: int | None = Field(
        None, ge=0, le=5, description="tell how likely each token was, and so many of the likeliest"
    )

    @property
    def num_logprobs(self) -> int | None:
        """As it was asked for."""
        return self.logprobs

    @property
    def num_written(self) -> int:
        """Answers that are written to each prompt."""
        return self.best_of or self.num_samples

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt that there are to be answers to."""
        return _each(self.prompt)

    def params(self) -> SamplingParams:
        """How to draw. InvalidInput for what does not go together or is more than we do at once."""
        max_tokens = _given(self.max_tokens, COMPLETION_TOKENS)
        if max_tokens == 0 and not self.echo:
            raise InvalidInput("max_tokens: 0 needs echo: true; ask for one token at least", "max_tokens")
        self._check_best_of()
        prompts = self.prompts()
        check_prompts(prompts, "prompt")
        if self.background and len(prompts) > 1:
            raise InvalidInput("a request in the background has one prompt; send one for each", "prompt")
        check_choices(len(prompts) * self.num_written, max_tokens)
        num_told = max_tokens * len(prompts) + (sum(map(len, prompts)) if self.echo else 0)
        check_logprobs(self.num_logprobs, num_told * self.num_samples, "logprobs")
        return self.sampling(max_tokens, self.logprobs if self.echo else None)

    def _check_best_of(self) -> None:
        if self.num_written < self.num_samples:
            raise InvalidInput(f"best_of: {self.best_of} is less than n: {self.num_samples}", "best_of")
        if self.stream and self.num_written > self.num_samples:
            raise InvalidInput("best_of above n cannot be streamed: the best are known at the end", "best_of")


class EmbeddingBody(Body):
    """Turn texts into vectors."""

    model: str = Field(max_length=256, description="name of a served model, or `default`")
    input: Text | TokenIds | Inputs | TokenInputs = Field(union_mode="left_to_right", description=ALTERNATIVES["input"])
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="numbers, or base64 of little-endian fp32 (float)"
    )
    dimensions: int | None = Field(None, ge=1, le=2**20, description="the model's own width, or nothing")
    user: str | None = Field(None, max_length=512, description="your name for whoever asks you")

    def inputs(self) -> list[str | tuple[int, ...]]:
        """Each input that there is to be a vector of."""
        return _each(self.input)


def check_supported(body: SamplingBody) -> None:
    """InvalidInput for what we do not have, and for parameters that do not go together."""
    check_neutral(body.model_extra, NEUTRAL)
    if body.stream_options is not None:
        if not body.stream:
            raise InvalidInput("stream_options needs stream: true", "stream_options")
        check_neutral(body.stream_options.model_extra, NEUTRAL_IN_STREAM_OPTIONS, "stream_options.")
    if body.background and body.stream:
        raise InvalidInput("an answer in the background cannot be streamed: set one of the two", "background")


def check_prompts(prompts: list[str | tuple[int, ...]], param: str) -> None:
    """InvalidInput for more than we take at once."""
    if () in prompts:
        raise InvalidInput(f"{param} has no tokens; give at least one, or an empty text to start from nothing", param)
    check_size(sum(map(len, prompts)), param)


def check_size(num_chars: int, param: str) -> None:
    """InvalidInput for more characters or tokens than we take at once."""
    if num_chars > MAX_PROMPT_CHARS:
        raise InvalidInput(f"{param}: {num_chars:,} characters are too many; {MAX_PROMPT_CHARS:,} is the limit", param)


def check_choices(num_written: int, max_tokens: int) -> None:
    """InvalidInput for more answers, or longer ones, than we write at once."""
    if num_written > MAX_CHOICES:
        raise InvalidInput(f"n: {num_written} answers are too many at once; {MAX_CHOICES} is the limit", "n")
    if num_written * max_tokens > MAX_ANSWER_TOKENS:
        raise InvalidInput(
            f"max_tokens: {num_written} answers of {max_tokens:,} tokens are too much at once; "
            f"{MAX_ANSWER_TOKENS:,} tokens is the limit",
            "max_tokens",
        )


def check_logprobs(num_logprobs: int | None, num_tokens: int, param: str) -> None:
    """InvalidInput for more log-probabilities than we tell at once; characters of a prompt count as tokens."""
    if num_logprobs is not None and num_tokens * (1 + num_logprobs) > MAX_LOGPROBS:
        raise InvalidInput(
            f"{param}: {num_tokens:,} tokens with {num_logprobs} likely ones each are too many; "
            f"{MAX_LOGPROBS:,} log-probabilities is the limit",
            param,
        )


def _each(given: Any) -> list[str | tuple[int, ...]]:
    """Texts or token ids, of one of either or of a list of them."""
    several: list[Any] = [given] if isinstance(given, str) else list(given)
    if not several or isinstance(several[0], int):
        return [tuple(several)]
    return [each if isinstance(each, str) else tuple(each) for each in several]


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _bias(token: str, bias: float) -> tuple[int, float]:
    return int(token), bias


def _schema_text(schema: dict[str, Any]) -> str:
    text = msgspec.json.encode(schema)
    if len(text) > MAX_SCHEMA_BYTES:
        place = "response_format.json_schema.schema"
        raise InvalidInput(f"{place} has {len(text):,} bytes; {MAX_SCHEMA_BYTES:,} is the limit", place)
    return text.decode()
