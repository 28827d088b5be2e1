"""Tokenizers whose tokens are single bytes or single characters; knows no merges and no datasets.

Both put the end of a document behind their alphabet, so that ids of vocabularies made elsewhere stay.
"""

import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers

from smelt.data.bpe import END_OF_TEXT, byte_symbols, to_utf8, write_tokenizer_files
from smelt.errors import TokenizerError, UnsafeFile

UNKNOWN = np.iinfo(np.uint32).max


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and the end of a document as 256."""

    name = "bytes"
    vocab_size = 257
    eot_id = 256
    bos_id = None

    def encode(self, text: str) -> list[int]:
        """Ids of the text. TokenizerError where it holds lone surrogates."""
        return list(to_utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text."""
        return [np.frombuffer(to_utf8(text), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, with U+FFFD where the bytes are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids; the end of a document, and ids beyond, are none."""
        return bytes(token for token in ids if token < 256)

    def token_bytes(self) -> list[bytes]:
        """The byte of each id; the end of a document has none."""
        return [self.decode_bytes([token]) for token in range(self.vocab_size)]

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and what tells `load_tokenizer` about it."""
        backend = tokenizers.Tokenizer(models.BPE(vocab={s: b for b, s in enumerate(byte_symbols())}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END_OF_TEXT])
        write_tokenizer_files(backend, folder, kind="bytes", name=self.name)


class CharTokenizer:
    """One id per character of a fixed alphabet; any other character is an error."""

    name = "char"

    def __init__(self, ids: Mapping[str, int]) -> None:
        if not ids or any(len(char) != 1 for char in ids) or len(set(ids.values())) != len(ids):
            raise TokenizerError("a char vocabulary must map single characters to different ids")
        if min(ids.values()) < 0 or max(ids.values()) > 0x10FFFF:
            raise TokenizerError("a char vocabulary must map to ids from 0 to 1,114,111")
        self.ids = dict(ids)
        self.eot_id = max(ids.values()) + 1
        self.bos_id = None
        self.vocab_size = self.eot_id + 1
        self._chars = {token: char for char, token in ids.items()}

    @classmethod
    def learn(cls, texts: Iterable[str]) -> "CharTokenizer":
        """All characters of the texts, in the order of their code points."""
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        return cls({char: token for token, char in enumerate(sorted(alphabet))})

    @cached_property
    def _id_of_code_point(self) -> NDArray[np.uint32]:
        table = np.full(max(map(ord, self.ids)) + 1, UNKNOWN, np.uint32)
        for char, token in self.ids.items():
            table[ord(char)] = token
        return table

    def encode(self, text: str) -> list[int]:
        """Ids of the text. TokenizerError names the first character that is not in the alphabet."""
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> NDArray[np.uint32]:
        code_points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
        table = self._id_of_code_point
        ids = np.where(code_points < len(table), table[np.minimum(code_points, len(table) - 1)], np.uint32(UNKNOWN))
        unknown = np.flatnonzero(ids == UNKNOWN)
        if len(unknown):
            char = text[unknown[0]]
            raise TokenizerError(
                f"character {char!r} (U+{ord(char):04X}) at position {unknown[0]} is not among the {len(self.ids)} "
                f"that this char tokenizer knows; remove it from the text, or use a tokenizer that takes any text "
                f"(bytes, bpe:N, gpt2)"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; the end of a document, and ids that stand for no character, are none."""
        return "".join(self._chars.get(token, "") for token in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of the ids in UTF-8."""
        return self.decode(int(token) for token in ids).encode("utf-8")

    def token_bytes(self) -> list[bytes]:
        """The character of each id in UTF-8; the end of a document, and ids without one, have none."""
        return [self.decode_bytes([token]) for token in range(self.vocab_size)]

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and what tells `load_tokenizer` about it."""
        vocab = {**self.ids, END_OF_TEXT: self.eot_id}
        backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token=None))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([END_OF_TEXT])
        write_tokenizer_files(backend, folder, kind="char", name=self.name)


def read_char_tokenizer(folder: Path) -> CharTokenizer:
    """What `CharTokenizer.save` wrote."""
    vocab = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return CharTokenizer({char: token for char, token in vocab.items() if char != END_OF_TEXT})


# --- nanoGPT's vocabularies ------------------------------------------------------------------------------


class _DataUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers: whatever would import or call something is refused."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise UnsafeFile(f"it asks for {module_name}.{global_name}, which a vocabulary has no need of")


def read_meta_pickle(path: Path) -> CharTokenizer:
    """The character vocabulary in a nanoGPT `meta.pkl`, with its ids.

    UnsafeFile where the pickle holds more than plain data; TokenizerError where it holds no characters.
    """
    try:
        with path.open("rb") as file:
            meta: Any = _DataUnpickler(file).load()
    except UnsafeFile as error:
        raise UnsafeFile(f"{path} is not opened: {error}") from None
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise TokenizerError(f"{path} is not a pickled vocabulary: {error}") from None
    ids = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(ids, dict) or not all(isinstance(c, str) and isinstance(i, int) for c, i in ids.items()):
        raise TokenizerError(f"{path} holds no `stoi` table of characters; name the tokenizer itself, such as gpt2")
    return CharTokenizer(ids)
