"""Plain values that several packages pass to each other; knows no torch, no files, no web."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # every command imports this file, and few need NumPy
    import numpy as np
    from numpy.typing import NDArray

LOCAL_OWNER = "local"  # who owns what was asked for on this machine without a key

ASSISTANT = "assistant"  # the role of turns that a model writes

FinishReason = Literal["stop", "length", "aborted", "content_filter"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like."""

    kind: Literal["json_schema", "regex", "json"]  # "json": any JSON object
    text: str = ""  # the schema as JSON, or the regular expression


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens. `temperature` 0 is greedy; `top_k` None, `top_p` 1 and `min_p` 0 keep every token.

    Penalties look at the prompt and the answer (repetition) or at the answer alone (presence, frequency), as in
    Hugging Face and OpenAI. `num_logprobs` None asks for no log-probabilities, 0 for those of the drawn tokens alone.
    """

    max_tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    num_logprobs: int | None = None  # of the most likely tokens at each place, beside the drawn one's
    num_prompt_logprobs: int | None = None  # the same of the prompt's tokens
    ignore_eos: bool = False  # go on past the end-of-text token
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of an answer, how likely the model found it, and what it found as likely or more.

    `logprob` is None for the first token of a prompt, which follows nothing. `text` is what the token stands for:
    bytes, for it may be a part of a character.
    """

    token_id: int
    text: bytes
    logprob: float | None
    top: tuple["TokenLogprob", ...] = ()  # most likely first


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant wants called."""

    id: str
    name: str
    arguments: str  # JSON


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation. `tool_call_id` says which call of the assistant's a tool's turn answers."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, and the functions that were offered in them, to train on.

    `weights` say how much turns of the assistant's count, by their number from 0; those that are not there count 1.
    """

    messages: Sequence[ChatMessage]
    tools: Sequence[Mapping[str, Any]] = ()
    weights: Mapping[int, float] = field(default_factory=dict)

    @property
    def counted(self) -> dict[int, float]:
        """The weights of the turns that are trained on."""
        numbers = [number for number, turn in enumerate(self.messages) if turn.role == ASSISTANT]
        weights = {number: self.weights.get(number, 1.0) for number in numbers}
        return {number: weight for number, weight in weights.items() if weight}

    def without(self, first: int, end: int) -> "Conversation":
        """The conversation without some of its turns."""
        moved = {number - (end - first): weight for number, weight in self.weights.items() if number >= end}
        kept = {number: weight for number, weight in self.weights.items() if number < first}
        return Conversation([*self.messages[:first], *self.messages[end:]], self.tools, kept | moved)


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation that is to become one datum.

    With `reply_ids` it ends where the assistant is to answer, and these tokens are the answer, for each of which
    `inputs` have a value. With `rejected` it is the better one of a preference.
    """

    conversation: Conversation
    reply_ids: Sequence[int] | None = None
    inputs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    rejected: Conversation | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Datum:
    """One example to train on: tokens, and what the loss wants to know at each of them.

    Position i of `tokens` (N,) predicts `inputs["target_tokens"][i]`: nothing is shifted any more. Inputs are (N,), or
    (N, K) where each position has K targets. A loss that compares sequences has all of them in one datum.
    """

    tokens: "NDArray[np.int32]"
    inputs: "Mapping[str, NDArray[np.float32] | NDArray[np.int64]]"

    @property
    def lengths(self) -> list[int]:
        """Of its sequences, none of which sees another: a new one begins where `segment_ids` change, if it has any."""
        if "segment_ids" not in self.inputs:
            return [len(self.tokens)]
        segments = self.inputs["segment_ids"].reshape(len(self.tokens), -1)[:, 0]
        ends = [*(segments[1:] != segments[:-1]).nonzero()[0] + 1, len(segments)]
        return [int(end - start) for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """A model in memory: what it may take of that, what it is doing, and what it has done since it came (`total_`)."""

    name: str
    num_bytes: int
    num_blocks: int  # of its cache
    num_blocks_used: int
    batch_size: int  # tokens of the last step
    total_prompt_tokens: int
    total_cached_tokens: int  # of those, which needed no computing
    total_preempted: int
