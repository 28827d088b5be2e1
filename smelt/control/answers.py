"""A live answer between the worker that writes it and the client that reads it; knows no stream and no HTTP.

A worker's stream carries the answers of everybody, so nobody may hold it up: what its client has not taken yet is
kept here, up to a limit, and one that is over it has lost its answer.
"""

import asyncio

from smelt.errors import SmeltError, Unavailable
from smelt.transport.messages import Finish, Generate, TextChunk

MAX_HELD_CHARS = 2**18
MAX_HELD_TOKENS = 2**16


class LiveAnswer:
    """Pieces go in as they come; `take` gives all that is there as one, so that a slow reader gets fewer of them."""

    def __init__(self, request: Generate) -> None:
        self.request = request
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._num_chars = 0
        self._end: Finish | SmeltError | None = None
        self._has_news = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._end is not None

    def push(self, chunk: TextChunk) -> bool:
        """Keep a piece for the reader; False where it is too much, which ends the answer."""
        if self._end is not None:
            return True  # it comes late, and nobody misses it
        self._num_chars += len(chunk.text)
        self._texts.append(chunk.text)
        self._token_ids += chunk.token_ids
        self._has_news.set()
        if self._num_chars <= MAX_HELD_CHARS and len(self._token_ids) <= MAX_HELD_TOKENS:
            return True
        self.end(Unavailable("the answer was given up: its reader takes it more slowly than it is written"))
        return False

    def end(self, end: Finish | SmeltError) -> None:
        """Nothing comes after this; what came before is still read first. The first end stands."""
        self._end = self._end or end
        self._has_news.set()

    async def take(self) -> TextChunk | Finish:
        """The next piece, once there is one, or the end. Raises what the answer ended with, if that was an error."""
        await self._has_news.wait()
        if self._texts:
            return self._taken()
        if isinstance(self._end, SmeltError):
            raise self._end
        assert self._end is not None, "news is text or the end"
        return self._end

    def _taken(self) -> TextChunk:
        chunk = TextChunk(self.request.request_id, "".join(self._texts), tuple(self._token_ids))
        self._texts, self._token_ids, self._num_chars = [], [], 0
        if self._end is None:
            self._has_news.clear()
        return chunk
