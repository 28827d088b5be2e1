"""Log-probabilities in the shapes of OpenAI's two APIs; knows no request and no event."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

from smelt.types import TokenLogprob

LOWEST = -9999.0  # JSON has no infinity


@dataclass(frozen=True, slots=True)
class TextLogprobs:
    """Of a text: four lists, with an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # characters before the token's first


@dataclass(frozen=True, slots=True)
class LikelyToken:
    """A token that may have stood there."""

    token: str
    logprob: float
    bytes: list[int]


@dataclass(frozen=True, slots=True)
class ChatToken(LikelyToken):
    """A token of a turn."""

    top_logprobs: list[LikelyToken] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ChatLogprobs:
    """Of a turn of a chat."""

    content: list[ChatToken]
    refusal: None = None


class Offsets:
    """Where in a text its tokens begin, though some are parts of characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def next(self, token: bytes) -> int:
        """Where a token begins that comes after the ones before."""
        start = self._num_chars
        self._num_chars += len(self._decoder.decode(token))
        return start


def text_logprobs(logprobs: Sequence[TokenLogprob], offsets: Offsets) -> TextLogprobs:
    """Those of a piece of a text, which goes on where `offsets` stands."""
    return TextLogprobs(
        [_name(each.text) for each in logprobs],
        [None if each.logprob is None else _finite(each.logprob) for each in logprobs],
        [_likeliest(each) for each in logprobs],
        [offsets.next(each.text) for each in logprobs],
    )


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Those of a piece of a turn."""
    return ChatLogprobs([_chat_token(each) for each in logprobs])


def _chat_token(drawn: TokenLogprob) -> ChatToken:
    likely = [LikelyToken(_name(each.text), _finite(each.logprob), list(each.text)) for each in drawn.top]
    return ChatToken(_name(drawn.text), _finite(drawn.logprob), list(drawn.text), likely)


def _likeliest(drawn: TokenLogprob) -> dict[str, float] | None:
    """The likeliest tokens and the one that stands there, which may be none of them."""
    if drawn.logprob is None:
        return None
    return {_name(each.text): _finite(each.logprob) for each in (drawn, *drawn.top)}


def _finite(logprob: float | None) -> float:
    return LOWEST if logprob is None else max(logprob, LOWEST)


def _name(token: bytes) -> str:
    """A token as text; parts of characters as OpenAI writes them."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
