"""Answer: one text being written from the tokens of a sequence; knows no engine and no threads."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from smelt.data.tokenizers import StreamDecoder
from smelt.inference.sequence import Sequence
from smelt.inference.stop_strings import StopStrings
from smelt.inference.whitespace import OuterSpace
from smelt.types import FinishReason, SamplingParams


@dataclass(eq=False, slots=True)
class Answer:
    """The sequence that runs for it now, and what is ready to be shown. Compared by identity.

    `num_tokens` counts all that was drawn: stop tokens too, and those whose text a stop string has cut off.
    """

    sequence: Sequence
    params: SamplingParams
    decoder: StreamDecoder
    stops: StopStrings
    space: OuterSpace
    num_prompt_tokens: int
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    _texts: list[str] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        """Tokens that may still be drawn."""
        return self.params.max_tokens - self.num_tokens

    def take(self, token: int) -> None:
        """Turn a new token into text."""
        self.num_tokens += 1
        self._token_ids.append(token)
        if token not in self.params.stop_token_ids:
            self._show(self.stops.push(self.decoder.push([token])))

    def close(self, reason: FinishReason) -> None:
        """Show what was held back, unless a stop string was found."""
        self._show(self.stops.push(self.decoder.finish()))
        self._show(self.stops.finish())
        self.finish_reason = "stop" if self.stops.found else reason

    def news(self) -> tuple[str, Items[int]]:
        """Text and tokens since the last time."""
        text, token_ids = "".join(self._texts), self._token_ids
        self._texts, self._token_ids = [], []
        return text, token_ids

    def _show(self, text: str) -> None:
        if shown := self.space.push(text):
            self._texts.append(shown)
