"""Byte-level BPE: trained here, or one of tiktoken's by name; knows no datasets.

`tokenizers` trains and `tiktoken` encodes, several times faster. What is saved is a `tokenizer.json` that gives
the same ids in both, so that transformers reads our folders.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from smelt.data.documents import split
from smelt.errors import MissingDependency, TokenizerError

END_OF_TEXT = "<|endoftext|>"
MARKER_FILE = "smelt_tokenizer.json"  # says which of our classes wrote the folder
MIN_VOCAB, MAX_VOCAB = 257, 1 << 20
TRAINING_CHARS = 1 << 14  # of one text that the trainer is given

# Words with the sign before them, numbers in pairs of digits (a small vocabulary has no room for longer ones),
# signs with the line breaks after them, and white space, of which the last space goes to the next word.
# No possessive quantifiers: they would not change what matches, and tiktoken's engine is twice as fast without.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


def to_utf8(text: str) -> bytes:
    """The text in UTF-8. TokenizerError where it holds lone surrogates, which are not Unicode text."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} is {text[error.start]!a}, a lone surrogate, which no tokenizer can represent; "
            f"remove it from the text"
        ) from None


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in `tokenizer.json`: GPT-2's choice, known to all readers."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


class BpeTokenizer:
    """Byte-level BPE given by its tokens in the order in which they merge."""

    def __init__(self, name: str, pattern: str, ranks: Mapping[bytes, int], special_ids: Mapping[str, int]) -> None:
        self.name = name
        self.pattern = pattern
        self.ranks = dict(ranks)
        self.special_ids = dict(special_ids)
        self.vocab_size = max([*self.ranks.values(), *self.special_ids.values()]) + 1
        self.eot_id = self.special_ids.get(END_OF_TEXT)
        self.bos_id = None
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        """Ids of the text; names of special tokens in it are plain text. TokenizerError for lone surrogates."""
        to_utf8(text)  # tiktoken would replace lone surrogates silently
        return [token for part in split(text) for token in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text, computed in parallel."""
        if len(texts) < 2:
            return [self._encode(text) for text in texts]
        num_threads = os.cpu_count() or 1
        with ThreadPoolExecutor(num_threads) as pool:  # tiktoken lets go of the interpreter lock
            shares = pool.map(lambda first: [self._encode(t) for t in texts[first::num_threads]], range(num_threads))
        return _interleave(list(shares), len(texts))

    def _encode(self, text: str) -> NDArray[np.uint32]:
        to_utf8(text)
        parts = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in split(text)]
        return np.concatenate(parts, dtype=np.uint32)

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        return {token: text for text, token in self.ranks.items()}

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, with U+FFFD where the bytes are not UTF-8; special tokens are none."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids; special tokens, and ids beyond the vocabulary, are none."""
        token_bytes = self._token_bytes
        return b"".join([token_bytes.get(token, b"") for token in ids])

    def token_bytes(self) -> list[bytes]:
        """The bytes of each id; special tokens have none."""
        return [self._token_bytes.get(token, b"") for token in range(self.vocab_size)]

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and what tells `load_tokenizer` about it."""
        write_tokenizer_files(self._backend, folder, kind="bpe", name=self.name, pattern=self.pattern)

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer as the library's object; kept, because every checkpoint of a run writes it."""
        symbols = byte_symbols()
        vocab = {"".join(symbols[byte] for byte in token): rank for token, rank in self.ranks.items()}
        model = models.BPE(vocab={**vocab, **self.special_ids}, merges=self._merges(symbols), ignore_merges=True)
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = byte_level(self.pattern)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(self.special_ids))
        return backend

    def _merges(self, symbols: list[str]) -> list[tuple[str, str]]:
        """Every pair of tokens that makes a token, in the order of what it makes.

        tiktoken joins any two neighbours that make a token; a trainer's list has one pair for each token only.
        """
        merges = []
        for token in sorted(self.ranks, key=self.ranks.__getitem__):
            for cut in range(1, len(token)):
                if token[:cut] in self.ranks and token[cut:] in self.ranks:
                    left, right = ("".join(symbols[byte] for byte in part) for part in (token[:cut], token[cut:]))
                    merges.append((left, right))
        return merges


def _interleave(shares: list[list[Any]], num_items: int) -> list[Any]:
    return [shares[item % len(shares)][item // len(shares)] for item in range(num_items)]


def byte_level(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cut text by the pattern, then write its bytes as printable symbols."""
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_bpe(vocab_size: int, texts: Iterator[str]) -> BpeTokenizer:
    """Learn the merges of the texts: at most vocab_size ids, all 256 bytes and the end of a document among them.

    The same texts give the same tokenizer.
    """
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise TokenizerError(
            f"bpe:{vocab_size} is out of range: 256 bytes and the end of a document need {MIN_VOCAB} ids, "
            f"and more than {MAX_VOCAB:,} are not supported"
        )
    symbols = byte_symbols()
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level(PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the last id ends a document
        initial_alphabet=symbols,
        max_token_length=64,  # a ruler of dashes is not worth an id of its own for each length
        show_progress=False,
    )
    _train(backend, trainer, texts)
    byte_of = {symbol: byte for byte, symbol in enumerate(symbols)}
    ranks = {bytes(byte_of[symbol] for symbol in token): rank for token, rank in backend.get_vocab().items()}
    return BpeTokenizer(f"bpe:{vocab_size}", PATTERN, ranks, {END_OF_TEXT: len(ranks)})


def _train(backend: tokenizers.Tokenizer, trainer: trainers.BpeTrainer, texts: Iterator[str]) -> None:
    """Train in a thread: the library does not look for Ctrl-C, so this one waits for it, and ends the texts."""
    is_interrupted = False

    def parts() -> Iterator[str]:
        for text in texts:
            if is_interrupted:
                raise KeyboardInterrupt
            yield from split(text, TRAINING_CHARS)  # the library holds 256 of them at once

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(backend.train_from_iterator, parts(), trainer)
        try:
            training.result()
        except KeyboardInterrupt:
            is_interrupted = True
            raise


def is_tiktoken_name(name: str) -> bool:
    """Whether tiktoken knows an encoding of that name."""
    return name in tiktoken.list_encoding_names()


def named_bpe(name: str) -> BpeTokenizer:
    """One of tiktoken's encodings. MissingDependency where its vocabulary is neither cached nor reachable."""
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise MissingDependency(
            f"tokenizer {name} needs its vocabulary, which could not be downloaded ({type(error).__name__}); point "
            f"TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's files for {name}"
        ) from None
    # tiktoken offers no public names for what its encodings are made of.
    return BpeTokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def read_bpe(folder: Path) -> BpeTokenizer:
    """What `BpeTokenizer.save` wrote."""
    marker = json.loads((folder / MARKER_FILE).read_text(encoding="utf-8"))
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special_ids = {token["content"]: token["id"] for token in saved["added_tokens"]}
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    vocab = {token: rank for token, rank in saved["model"]["vocab"].items() if token not in special_ids}
    ranks = {bytes(byte_of[symbol] for symbol in token): rank for token, rank in vocab.items()}
    return BpeTokenizer(marker["name"], marker["pattern"], ranks, special_ids)


def write_tokenizer_files(backend: tokenizers.Tokenizer, folder: Path, **marker: str) -> None:
    """Write `tokenizer.json`, the settings that transformers wants beside it, and our marker."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / MARKER_FILE).write_text(json.dumps(marker, indent=2), encoding="utf-8")
