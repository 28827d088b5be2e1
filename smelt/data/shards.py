"""Token shards on disk: numbered files of little-endian ids with the starts of documents beside them.

`train-000000.bin` holds ids as uint16 or uint32; `train-000000.idx` holds, as uint64, where in this shard documents
begin. All shards of a split but the last have the same length, and a document may go on in the next one. Files
are memory-mapped when they are first read. Knows no tokenizer and no manifest.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from pydantic import Field

from smelt.configs import Config
from smelt.errors import InvalidInput

START_DTYPE = np.dtype("<u8")


class Shard(Config):
    """One shard: its files are named after it. Documents count where they begin."""

    name: str = Field(pattern=r"^(train|val)-\d{6,}$")
    num_tokens: int = Field(ge=1)
    num_documents: int = Field(ge=0)
    sha256: str = ""
    index_sha256: str = ""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type on disk that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


# --- Reading ---------------------------------------------------------------------------------------------


class TokenSplit:
    """A stream of tokens over one or several shards, and the documents in it."""

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype[Any]) -> None:
        self.folder = folder
        self.shards = tuple(shards)
        self.dtype = dtype
        self._first_tokens = np.cumsum([0, *(shard.num_tokens for shard in shards)])  # of each shard, and the end
        self._first_documents = np.cumsum([0, *(shard.num_documents for shard in shards)])
        self._mapped: dict[str, NDArray[Any]] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens in all shards."""
        return int(self._first_tokens[-1])

    @property
    def num_documents(self) -> int:
        """Documents that begin in these shards, and one more where they begin inside one."""
        return int(self._first_documents[-1]) + self._begins_inside

    @cached_property
    def _begins_inside(self) -> bool:
        """Whether the first token goes on with a document of the shard before."""
        return self.shards[0].num_documents == 0 or bool(self._starts(0)[0])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens (stop - start,) in their type on disk; InvalidInput outside the stream."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise InvalidInput(f"tokens {start:,} to {stop:,} are not among the {self.num_tokens:,} of {self.folder}")
        parts = []
        while start < stop:
            shard = self._shard_at(start)
            first, end = int(self._first_tokens[shard]), int(self._first_tokens[shard + 1])
            parts.append(self._tokens(shard)[start - first : min(stop, end) - first])
            start = min(stop, end)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def gather(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Rows (len(starts), length) of tokens from each start on."""
        if len(starts) and not 0 <= starts.min() <= starts.max() <= self.num_tokens - length:
            raise InvalidInput(
                f"rows of {length:,} tokens from {starts.min():,} to {starts.max():,} do not lie within the "
                f"{self.num_tokens:,} tokens of {self.folder}"
            )
        rows = np.empty((len(starts), length), np.int64)
        shards = np.searchsorted(self._first_tokens, starts, side="right") - 1
        inside = starts + length <= self._first_tokens[shards + 1]
        for shard in np.unique(shards[inside]):
            chosen = inside & (shards == shard)
            windows = sliding_window_view(self._tokens(int(shard)), length)
            rows[chosen] = windows[starts[chosen] - self._first_tokens[shard]]
        for row in np.flatnonzero(~inside):
            rows[row] = self.read(int(starts[row]), int(starts[row]) + length)
        return rows

    def document_at(self, token_index: int) -> int:
        """Number of the document that a token belongs to."""
        shard = self._shard_at(token_index)
        starts = self._starts(shard)
        num_before = int(np.searchsorted(starts, token_index - self._first_tokens[shard], side="right"))
        return int(self._first_documents[shard]) + num_before - 1 + self._begins_inside

    def document_start(self, document: int) -> int:
        """Index of the first token of a document; of the number after the last: the end."""
        if document in (0, self.num_documents):
            return self.num_tokens if document else 0
        document -= self._begins_inside
        shard = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        return int(self._first_tokens[shard] + self._starts(shard)[document - self._first_documents[shard]])

    def documents(self, start: int = 0) -> Iterator[NDArray[Any]]:
        """The tokens of each document from number `start` on, its end-of-document token included."""
        first = self.document_start(start)
        for document in range(start, self.num_documents):
            end = self.document_start(document + 1)
            yield self.read(first, end)
            first = end

    def _shard_at(self, token_index: int) -> int:
        return int(np.searchsorted(self._first_tokens, token_index, side="right")) - 1

    def _tokens(self, shard: int) -> NDArray[Any]:
        return self._map(f"{self.shards[shard].name}.bin", self.dtype)

    def _starts(self, shard: int) -> NDArray[Any]:
        return self._map(f"{self.shards[shard].name}.idx", START_DTYPE)

    def _map(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        if name not in self._mapped:
            path = self.folder / name
            is_empty = path.stat().st_size == 0  # which cannot be mapped: no document begins in the shard
            self._mapped[name] = np.empty(0, dtype) if is_empty else np.asarray(np.memmap(path, dtype, mode="r"))
        return self._mapped[name]


# --- Writing ---------------------------------------------------------------------------------------------


class SplitWriter:
    """Appends documents to the shards of one split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.shards: list[Shard] = []  # those that are complete
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self._num_tokens = 0  # of the open shard
        self._num_documents = 0

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return sum(shard.num_tokens for shard in self.shards) + self._num_tokens

    def write(self, tokens: NDArray[Any], *, starts_document: bool) -> None:
        """Append tokens, of a new document or of the one before."""
        while len(tokens):
            token_file, start_file = self._files or self._open()
            if starts_document:
                start_file.write(np.array([self._num_tokens], START_DTYPE).tobytes())
                self._num_documents += 1
                starts_document = False
            part = tokens[: self.shard_tokens - self._num_tokens]
            token_file.write(part.astype(self.dtype).tobytes())
            self._num_tokens += len(part)
            tokens = tokens[len(part) :]
            if self._num_tokens == self.shard_tokens:
                self.close()

    def _open(self) -> tuple[BinaryIO, BinaryIO]:
        name = f"{self.split}-{len(self.shards):06d}"
        self._files = (self.folder / f"{name}.bin").open("wb"), (self.folder / f"{name}.idx").open("wb")
        return self._files

    def close(self) -> None:
        """Complete the open shard."""
        if self._files is not None:
            for file in self._files:
                file.close()
            name = f"{self.split}-{len(self.shards):06d}"
            self.shards.append(Shard(name=name, num_tokens=self._num_tokens, num_documents=self._num_documents))
            self._files, self._num_tokens, self._num_documents = None, 0, 0

    def tokens(self) -> TokenSplit:
        """What was written, to be read. No more can be written."""
        self.close()
        return TokenSplit(self.folder, self.shards, self.dtype)

    def truncate(self, num_tokens: int) -> None:
        """Keep the first tokens only."""
        kept = self.tokens()
        self.shards = []
        for number, shard in enumerate(kept.shards):
            first = int(kept._first_tokens[number])
            left = min(shard.num_tokens, num_tokens - first)
            token_path, start_path = (self.folder / f"{shard.name}.{suffix}" for suffix in ("bin", "idx"))
            if left <= 0:
                token_path.unlink()
                start_path.unlink()
                continue
            num_documents = int(np.searchsorted(kept._starts(number), left))
            os.truncate(token_path, left * self.dtype.itemsize)
            os.truncate(start_path, num_documents * START_DTYPE.itemsize)
            self.shards.append(shard.replace(num_tokens=left, num_documents=num_documents))
