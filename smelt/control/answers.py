"""Live work between the worker that does it and whoever asked for it; knows no stream and no HTTP.

A worker's stream carries the answers of everybody, so nobody may hold it up: what its client has not taken yet is
kept here, up to a limit, and one that is over it has lost its answer.
"""

import asyncio
from dataclasses import dataclass, field

from smelt.errors import SmeltError, Unavailable
from smelt.transport.failures import error_of
from smelt.transport.messages import (
    Classified,
    Classify,
    Embed,
    Embedded,
    Finish,
    Generate,
    Lend,
    Lent,
    LoadModel,
    Render,
    Rendered,
    TextChunk,
    UnloadModel,
)
from smelt.types import TokenLogprob

# Of each answer. What comes at once is always taken: it was asked for.
MAX_HELD_CHARS = 2**18
MAX_HELD_TOKENS = 2**16

LiveRequest = Generate | Embed | Render | Classify | LoadModel | UnloadModel | Lend
Whole = Embedded | Rendered | Classified | Lent  # what comes in one piece
LivePiece = TextChunk | Whole | Finish


@dataclass(slots=True)
class Held:
    """What nobody has taken yet of one of the answers to a request."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    whole: Whole | None = None
    finish: Finish | None = None


class LiveAnswer:
    """Pieces go in as they come; `take` gives all that is there of an answer as one, so that a slow reader gets fewer.

    A request has as many answers as it asks for samples, each with a Finish of its own.
    """

    def __init__(self, request: LiveRequest) -> None:
        self.request = request
        self._held: dict[int, Held] = {}  # of the answers of which there is news
        self._num_chars = 0
        self._num_tokens = 0
        self._num_answers = request.num_samples if isinstance(request, Generate) else 1
        self._num_left = self._num_answers
        self._end: Finish | SmeltError | None = None
        self._has_news = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._end is not None or self._num_left == 0

    def push(self, piece: TextChunk | Whole) -> bool:
        """Keep a piece for the reader; False where it is too much, which ends the answer."""
        if self.has_ended:
            return True  # it comes late, and nobody misses it
        if (
            self._num_chars > MAX_HELD_CHARS * self._num_answers
            or self._num_tokens > MAX_HELD_TOKENS * self._num_answers
        ):
            self.end(Unavailable("the answer was given up: its reader takes it more slowly than it is written"))
            return False
        if isinstance(piece, Whole):
            self._news_of(0).whole = piece
        else:
            self._hold(piece)
        return True

    def finish(self, finish: Finish) -> None:
        """One of the answers has ended, or with an aborted one all of them."""
        if finish.reason == "aborted":
            self.end(finish)
        elif not self.has_ended:
            self._news_of(finish.index).finish = finish
            self._num_left -= 1

    def end(self, end: Finish | SmeltError) -> None:
        """Nothing comes after this; what came before is still read first. The first end stands."""
        if not self.has_ended:
            self._end = end
        self._has_news.set()

    async def take(self) -> LivePiece | None:
        """The next piece, once there is one, and None after the last. Raises the error that it ended with, if any."""
        await self._has_news.wait()
        if self._held:
            return self._taken(next(iter(self._held)))
        if isinstance(self._end, SmeltError):
            raise self._end
        end, self._end = self._end, None
        self._num_left = 0
        return end

    async def whole(self) -> list[LivePiece]:
        """All pieces. Raises what the work has failed with."""
        pieces = []
        while (piece := await self.take()) is not None:
            pieces.append(piece)
            if isinstance(piece, Finish):
                check(piece)
        return pieces

    def _news_of(self, index: int) -> Held:
        self._has_news.set()
        return self._held.setdefault(index, Held())

    def _hold(self, chunk: TextChunk) -> None:
        held = self._news_of(chunk.index)
        held.texts.append(chunk.text)
        held.token_ids += chunk.token_ids
        held.logprobs += chunk.logprobs
        self._num_chars += len(chunk.text)
        self._num_tokens += len(chunk.token_ids)

    def _taken(self, index: int) -> LivePiece:
        held = self._held[index]
        piece: LivePiece
        if held.texts:
            piece = self._text(index, held)
        elif held.whole is not None:
            piece, held.whole = held.whole, None
        else:
            assert held.finish is not None, "news is text, something whole or an end"
            piece, held.finish = held.finish, None
        if held.finish is None:
            del self._held[index]
        if not (self._held or self.has_ended):
            self._has_news.clear()
        return piece

    def _text(self, index: int, held: Held) -> TextChunk:
        text, token_ids, logprobs = "".join(held.texts), tuple(held.token_ids), tuple(held.logprobs)
        held.texts, held.token_ids, held.logprobs = [], [], []
        self._num_chars -= len(text)
        self._num_tokens -= len(token_ids)
        return TextChunk(self.request.request_id, text, token_ids, index, logprobs)


def check(finish: Finish) -> None:
    """Raise what an answer has failed with."""
    if finish.failure is not None:
        raise error_of(finish.failure)
    if finish.reason == "aborted":
        raise Unavailable("the answer was broken off by the server; ask again")
