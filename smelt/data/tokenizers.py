"""Tokenizers by name: the protocol that all of them keep, how one is made, saved and read, and streaming decode.

Knows no dataset and no model. A tokenizer gives the same ids for the same text, and plain text never becomes
a special token.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smelt.data.bpe import MARKER_FILE, is_tiktoken_name, named_bpe, read_bpe, train_bpe
from smelt.data.characters import ByteTokenizer, CharTokenizer, read_char_tokenizer, read_meta_pickle
from smelt.data.hf_tokenizer import read_huggingface_tokenizer
from smelt.data.packing import mix
from smelt.errors import NotFound, TokenizerError

TRAINING_BYTES = 64 * 10**6  # of text that a BPE is trained on at most: about a minute's work
KNOWN = "bytes, char, bpe:N, gpt2 or another of tiktoken's names, a folder, or nanoGPT's meta.pkl"


class Tokenizer(Protocol):
    """Text to ids and back. Decoding is exact: bytes of ids joined are the joined bytes."""

    @property
    def name(self) -> str:
        """What it was made from: `bytes`, `char`, `bpe:4096`, `gpt2`, or the name of a folder."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eot_id(self) -> int | None:
        """The id that ends a document; None where the tokenizer has none."""

    @property
    def bos_id(self) -> int | None:
        """The id that models of this tokenizer expect before every text; `encode` leaves it out."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text. TokenizerError where it cannot be represented."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text, in parallel where it can."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, with U+FFFD where the bytes are not UTF-8; special tokens are none."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids; special tokens, and ids beyond the vocabulary, are none."""

    def token_bytes(self) -> list[bytes] | None:
        """The bytes of each id, none for special tokens; None where they depend on the neighbours (WordPiece)."""

    def save(self, folder: Path) -> None:
        """Write the files that `load_tokenizer` and transformers read."""


Texts = Callable[[], Iterator[str]]  # may be called more than once; each call starts at the first text

READERS: dict[str, Callable[[Path], Tokenizer]] = {
    "bytes": lambda _: ByteTokenizer(),
    "char": read_char_tokenizer,
    "bpe": read_bpe,
}


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder: what `save` wrote, nanoGPT's `meta.pkl`, or Hugging Face's files.

    NotFound where there is no such folder; TokenizerError where it holds no tokenizer, or a damaged one.
    """
    if not folder.is_dir():
        raise NotFound(f"{folder} is not a folder with a tokenizer")
    if (folder / MARKER_FILE).is_file():
        try:
            kind = json.loads((folder / MARKER_FILE).read_text(encoding="utf-8"))["kind"]
            return READERS[kind](folder)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise TokenizerError(f"the tokenizer in {folder} is damaged: {error!r}") from None
    has_vocabulary = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    if (folder / "meta.pkl").is_file() and not has_vocabulary:
        return read_meta_pickle(folder / "meta.pkl")
    return read_huggingface_tokenizer(folder)


def make_tokenizer(spec: str, texts: Texts, num_bytes: int | None = None) -> Tokenizer:
    """The tokenizer that a spec asks for. Only `char` and `bpe:N` consume `texts`.

    `num_bytes` says how long the texts are together, so that a sample of them is spread over all; None: unknown.
    """
    name = spec.removeprefix("tiktoken/")
    if name == "bytes":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.learn(texts())
    if name.startswith("bpe:"):
        return train_bpe(_vocab_size(name), sample(texts(), num_bytes))
    if is_tiktoken_name(name):
        return named_bpe(name)
    path = Path(spec).expanduser()
    if spec and path.exists():
        return read_meta_pickle(path) if path.suffix == ".pkl" else load_tokenizer(path)
    raise TokenizerError(f"unknown tokenizer {spec!r}; known are {KNOWN}")


def is_learned(spec: str) -> bool:
    """Whether the tokenizer must read the texts before it can encode them."""
    return spec == "char" or spec.startswith("bpe:")


def _vocab_size(spec: str) -> int:
    digits = spec.removeprefix("bpe:")
    if not digits.isdecimal() or len(digits) > 9:
        raise TokenizerError(f"{spec!r} is not a tokenizer: N in bpe:N is a number of token ids, as in bpe:4096")
    return int(digits)


def sample(texts: Iterator[str], num_bytes: int | None, limit: int = TRAINING_BYTES) -> Iterator[str]:
    """At most `limit` bytes of the texts, spread evenly by a hash of their numbers: the same at each call."""
    kept_fraction = 1.0 if num_bytes is None else min(1.0, limit / max(1, num_bytes))
    threshold = int(kept_fraction * (2**64 - 1))
    num_taken = 0
    for number, text in enumerate(texts):
        if num_taken >= limit:
            return
        if int(mix(np.array([number], np.uint64))[0]) <= threshold:
            num_taken += len(text.encode("utf-8", "surrogatepass"))
            yield text


def fingerprint(tokenizer: Tokenizer) -> str:
    """Sha256 of what every id stands for: equal where ids of one tokenizer may be read by the other."""
    table: list[Any] = [tokenizer.eot_id]
    table += [tokenizer.decode_bytes([token]).hex() for token in range(tokenizer.vocab_size)]
    return hashlib.sha256(json.dumps(table).encode("ascii")).hexdigest()


class StreamDecoder:
    """Text of ids that arrive a few at a time; never a part of a character.

    All that it returns, joined, is what `decode` says of all ids together (but for the space that tokenizers of
    SentencePiece's kind put before a text, since a stream usually goes on from a prompt).
    """

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[int, bytes] | None = None) -> None:
        """`shown`: special tokens that are not to be left out, and what they are as text."""
        self._tokenizer = tokenizer
        self._shown = shown or {}
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def is_inside_character(self) -> bool:
        """Whether bytes are held back that are not a character yet."""
        return bool(self._utf8.getstate()[0])

    def push(self, ids: Iterable[int]) -> str:
        """The characters that are complete once these ids have come."""
        if not self._shown:
            return self._utf8.decode(self._tokenizer.decode_bytes(ids))
        parts = (self._shown.get(token) or self._tokenizer.decode_bytes([token]) for token in ids)
        return self._utf8.decode(b"".join(parts))

    def finish(self) -> str:
        """What is left when no more ids come: U+FFFD where a character broke off, else nothing."""
        return self._utf8.decode(b"", final=True)
