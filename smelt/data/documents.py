"""Documents on their way from a source to tokens; knows no file format and no tokenizer.

A document may be larger than memory, so it travels as pieces of bounded length. They are cut where no
byte-level pre-tokenizer would join the two sides, so that cutting does not change the tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from smelt.errors import DataError

PIECE_CHARS = 1 << 18  # also keeps the regular expressions of tokenizers far from the limits of their stacks
OnError = Literal["strict", "skip"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Up to PIECE_CHARS characters of a document; `is_last` where the document ends with them."""

    text: str
    is_last: bool


Documents = Iterator[Piece]


@dataclass(slots=True)
class Reading:
    """One pass over a source: what to do with bad records, and what was met so far."""

    on_error: OnError = "strict"
    column: str = "text"  # the field of a record that holds the text
    num_bytes: int = 0  # of the source, as stored, read so far
    num_skipped: int = 0
    first_skipped: str = ""  # why the first bad record was skipped

    def reject(self, reason: str) -> None:
        """Count a bad record, or raise DataError where bad records are not to be skipped."""
        if self.on_error == "strict":
            raise DataError(f"{reason}; --errors skip leaves such records out")
        self.num_skipped += 1
        self.first_skipped = self.first_skipped or reason


@dataclass(frozen=True, slots=True)
class Source:
    """Where documents come from. `read` may be called again, and gives the same documents in the same order."""

    read: Callable[[Reading], Documents]
    num_bytes: int | None = None  # as stored; None where nobody knows before the end
    num_text_bytes: int | None = None  # of the texts, roughly


def whole(text: str) -> Documents:
    """The pieces of a document that is in memory; nothing where it is empty."""
    return pieces([text])


def pieces(chunks: Iterable[str]) -> Documents:
    """Cut one document, given as chunks of any length, into pieces; nothing where it is empty."""
    rest = ""
    for chunk in chunks:
        *parts, rest = split(rest + chunk)
        yield from (Piece(part, is_last=False) for part in parts)
    if rest:
        yield Piece(rest, is_last=True)


def split(text: str, limit: int | None = None) -> list[str]:
    """The text in parts of at most `limit` (else PIECE_CHARS) characters; an empty text is one part."""
    limit = limit or PIECE_CHARS
    parts = []
    start = 0
    while len(text) - start > limit:
        cut = cut_point(text, start, start + limit)
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]


def cut_point(text: str, start: int, limit: int) -> int:
    """A position in start + 1..limit at which to cut: before the last space that follows a word, if there is one.

    Byte-level pre-tokenizers join a space to the word after it and never to the one before.
    """
    end = limit + 1
    while (cut := text.rfind(" ", start + 1, end)) > 0:
        if not text[cut - 1].isspace():
            return cut
        end = cut
    return limit
