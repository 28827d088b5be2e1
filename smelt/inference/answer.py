"""Answer: one text being written from the tokens of a sequence; knows no engine and no threads."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from smelt.data.tokenizers import StreamDecoder
from smelt.data.tool_calls import ToolCallStream
from smelt.inference.sequence import Alternatives, Sequence
from smelt.inference.stop_strings import StopStrings
from smelt.inference.whitespace import OuterSpace
from smelt.types import FinishReason, SamplingParams, TokenLogprob, ToolCall


class News(NamedTuple):
    """What was added to an answer."""

    text: str
    token_ids: list[int]
    logprobs: tuple[TokenLogprob, ...]


@dataclass(eq=False, slots=True)
class Answer:
    """The sequence that runs for it now, and what is ready to be shown. Compared by identity.

    `num_tokens` counts all that was drawn: stop tokens too, and those whose text a stop string has cut off. The
    log-probability of a token is shown when all of its text is, and never where that is cut off.
    """

    sequence: Sequence
    params: SamplingParams
    decoder: StreamDecoder
    stops: StopStrings
    calls: ToolCallStream
    space: OuterSpace
    bytes_of: Callable[[int], bytes]  # a token's
    echo: str | None = None  # the prompt, where the answer shall begin with it
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt
    num_tokens: int = 0
    sum_logprobs: float = 0.0
    finish_reason: FinishReason | None = None
    tool_calls: tuple[ToolCall, ...] = ()  # once it has ended
    _has_begun: bool = False
    _num_decoded: int = 0  # characters
    _num_passed: int = 0  # characters of those that are neither held back nor part of a tool call
    _unshown: deque[tuple[int, TokenLogprob]] = field(default_factory=deque)  # (where its text ends, what to show)
    _texts: list[str] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        """Tokens that may still be drawn."""
        return self.params.max_tokens - self.num_tokens

    @property
    def mean_logprob(self) -> float:
        """How likely the model finds what it wrote, per token."""
        return self.sum_logprobs / max(1, self.num_tokens)

    def take(self, token: int) -> None:
        """Turn the token that the sequence has just drawn into text."""
        if not self._has_begun:
            self._begin()
        if self.num_left <= 0:
            return  # only the prompt was to be scored
        self.num_tokens += 1
        self.sum_logprobs += self.sequence.logprobs[-1]
        self._token_ids.append(token)
        if token not in self.params.stop_token_ids:
            text = self.decoder.push([token])
            self._num_decoded += len(text)
            if self.params.num_logprobs is not None:
                self._hold_logprob(token)
            self._show(self.calls.push(self.stops.push(text)))

    def close(self, reason: FinishReason) -> None:
        """Show what was held back, unless a stop string was found."""
        self._show(self.calls.push(self.stops.push(self.decoder.finish()) + self.stops.finish()))
        rest, self.tool_calls = self.calls.finish()
        self._show(rest)
        self.finish_reason = "stop" if self.stops.found else reason

    def news(self) -> News:
        """What is new since the last time."""
        news = News("".join(self._texts), self._token_ids, tuple(self._logprobs))
        self._texts, self._token_ids, self._logprobs = [], [], []
        return news

    def _begin(self) -> None:
        self._has_begun = True
        self.num_cached_tokens = self.sequence.num_cached_tokens
        if self.echo is None:
            return
        sequence = self.sequence
        self._texts.append(self.echo)
        self._token_ids += sequence.prompt_ids
        tops = sequence.prompt_top_logprobs or [()] * len(sequence.prompt_logprobs)
        self._logprobs += map(self._token_logprob, sequence.prompt_ids, sequence.prompt_logprobs, tops)

    def _hold_logprob(self, token: int) -> None:
        """Until its text is shown: where a character is incomplete that ends with the next one."""
        top = self.sequence.top_logprobs[-1] if self.sequence.top_logprobs else ()
        end = self._num_decoded + self.decoder.is_inside_character
        self._unshown.append((end, self._token_logprob(token, self.sequence.logprobs[-1], top)))

    def _token_logprob(self, token: int, logprob: float | None, top: Alternatives) -> TokenLogprob:
        alternatives = tuple(TokenLogprob(other, self.bytes_of(other), value) for other, value in top)
        return TokenLogprob(token, self.bytes_of(token), logprob, alternatives)

    def _show(self, text: str) -> None:
        self._num_passed += len(text)
        if shown := self.space.push(text):
            self._texts.append(shown)
        num_shown = self._num_passed - len(self.space.held)
        while self._unshown and self._unshown[0][0] <= num_shown:
            self._logprobs.append(self._unshown.popleft()[1])
