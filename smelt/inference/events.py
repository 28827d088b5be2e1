"""What an InferenceServer is asked for and what it tells, as types; knows no threads and no model."""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from smelt.types import ChatExample, ChatMessage, Datum, FinishReason, ModelLoad, SamplingParams, TokenLogprob, ToolCall

if TYPE_CHECKING:
    from smelt.inference.sequence import Alternatives, PromptWishes


class Request(Protocol):
    """What is asked for: to go on from a prompt or, where there are messages, to write the next turn.

    `is_live`: somebody waits for it. Others make way for such requests.
    """

    @property
    def owner(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def prompt(self) -> str | tuple[int, ...]: ...
    @property
    def messages(self) -> tuple[ChatMessage, ...]: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def tools(self) -> tuple[dict[str, Any], ...]: ...
    @property
    def must_call(self) -> bool: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def best_of(self) -> int: ...
    @property
    def echo(self) -> bool: ...
    @property
    def adapter(self) -> str | None: ...
    @property
    def is_live(self) -> bool: ...


class SampleRequest(Protocol):
    """Raw tokens that are to be drawn; its fields are explained where operations of sessions are."""

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def target_ids(self) -> tuple[int, ...]: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def num_alternatives(self) -> int: ...


class EmbedRequest(Protocol):
    """Texts, or token ids, that are to become vectors."""

    @property
    def owner(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def inputs(self) -> tuple[str | tuple[int, ...], ...]: ...
    @property
    def is_live(self) -> bool: ...


class RenderRequest(Protocol):
    """Conversations that are to become data to train on."""

    @property
    def model(self) -> str: ...
    @property
    def examples(self) -> Items[ChatExample]: ...


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    """Texts whose labels are wanted."""

    texts: tuple[str, ...]
    model: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer."""

    key: str
    text: str
    token_ids: Items[int]
    index: int = 0  # of the answer, where a request has several
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """An answer has ended: finished, cancelled ("aborted"), or failed ("aborted" with the error).

    A request has ended with the last of its answers, or with the first that is aborted.
    """

    key: str
    reason: FinishReason
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: Exception | None = None
    index: int = 0
    num_cached_tokens: int = 0
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """What the server is doing; among the events when it has changed, a few times a second at most."""

    models: tuple[str, ...] = ()
    num_running: int = 0  # answers
    num_waiting: int = 0
    model_loads: tuple[ModelLoad, ...] = ()
    num_lent_bytes: int = 0  # to runs


@dataclass(frozen=True, slots=True)
class Vectors:
    """What texts were turned into: little-endian fp32 numbers, `width` of them for each. An End follows."""

    key: str
    vectors: bytes
    width: int


@dataclass(frozen=True, slots=True)
class RenderedData:
    """What conversations were turned into, one datum for each. An End follows."""

    key: str
    data: Items[Datum]


@dataclass(frozen=True, slots=True)
class Scores:
    """How probable each label is for each text: little-endian fp32 numbers, text by text. An End follows."""

    key: str
    labels: tuple[str, ...]
    probabilities: bytes


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Tokens with their log-probabilities, those of the likeliest ones there, and whether a stop ended them."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: "tuple[Alternatives, ...]"
    has_stopped: bool


@dataclass(frozen=True, slots=True)
class Samples:
    """What was drawn after a prompt, and what was asked about that. An End follows."""

    key: str
    request: SampleRequest
    samples: tuple[SampledTokens, ...]
    prompt_logprobs: tuple[float | None, ...]
    prompt_top: "tuple[Alternatives, ...]"
    num_cached_tokens: int
    wishes: "PromptWishes | None"


@dataclass(frozen=True, slots=True)
class MadeWay:
    """Memory is lent to runs, for which these idle models were unloaded. An End follows."""

    key: str
    models: tuple[str, ...]


Event: TypeAlias = Piece | End | Vectors | RenderedData | Scores | Samples | MadeWay | Load
