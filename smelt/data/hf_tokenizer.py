"""The tokenizer of a Hugging Face folder, used as it is; knows no model and no datasets."""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from smelt.data.bpe import END_OF_TEXT, byte_symbols, to_utf8
from smelt.data.documents import split
from smelt.errors import TokenizerError

TOKENIZER_FILE = "tokenizer.json"
KEPT_FILES = (  # what a folder says about its tokenizer, kept when it is saved elsewhere
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class HuggingFaceTokenizer:
    """A `tokenizers` tokenizer, with neither special tokens, truncation nor padding added to what it encodes."""

    def __init__(
        self, name: str, backend: tokenizers.Tokenizer, eot_token: str | None, files: dict[str, bytes]
    ) -> None:
        self.name = name
        self.eot_id = None if eot_token is None else backend.token_to_id(eot_token)
        self.bos_id = _bos_id(files, backend)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._files = files
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # the name of a special token in a text stays text

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer's own template puts before and after a text."""
        framed = self._backend.encode("a", add_special_tokens=True).ids
        plain = self._backend.encode("a", add_special_tokens=False).ids
        starts = range(len(framed) - len(plain) + 1)
        first = next((start for start in starts if framed[start : start + len(plain)] == plain), 0)
        return framed[:first], framed[first + len(plain) :]

    def encode(self, text: str) -> list[int]:
        """Ids of the text. TokenizerError for lone surrogates."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text, computed in parallel."""
        for text in texts:
            to_utf8(text)
        parts = [split(text) for text in texts]
        encodings = iter(
            self._backend.encode_batch_fast([part for text in parts for part in text], add_special_tokens=False)
        )
        return [np.concatenate([np.array(next(encodings).ids, np.uint32) for _ in text]) for text in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, with U+FFFD where the bytes are not UTF-8; special tokens are none."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._adds_space else text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids; special tokens, and ids beyond the vocabulary, are none."""
        if self._token_bytes is None:
            return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=True)).encode("utf-8")
        token_bytes = self._token_bytes
        return b"".join([token_bytes.get(token, b"") for token in ids])

    def token_bytes(self) -> list[bytes] | None:
        """The bytes of each id, none for special tokens; None where they depend on the neighbours (WordPiece)."""
        if (token_bytes := self._token_bytes) is None:
            return None
        return [token_bytes.get(token, b"") for token in range(self.vocab_size)]

    @cached_property
    def _decoder_types(self) -> set[str]:
        state = json.loads(self._backend.decoder.__getstate__()) if self._backend.decoder else {}
        return {part["type"] for part in state.get("decoders", [state]) if part}

    @cached_property
    def _adds_space(self) -> bool:
        """Whether it puts a space before each text, as SentencePiece does, to be taken off again."""
        first = self._backend.encode("a", add_special_tokens=False).tokens[:1]
        return "ByteLevel" not in self._decoder_types and bool(first) and first[0].startswith("▁")

    @cached_property
    def _token_bytes(self) -> dict[int, bytes] | None:
        """The bytes of each token; None where they depend on the neighbours (WordPiece)."""
        if "ByteLevel" in self._decoder_types:
            to_bytes = _from_byte_level()
        elif "ByteFallback" in self._decoder_types or "Metaspace" in self._decoder_types:
            to_bytes = _from_sentencepiece
        else:
            return None
        added = self._backend.get_added_tokens_decoder()
        vocab = self._backend.get_vocab(with_added_tokens=True)
        table = {token: to_bytes(text) for text, token in vocab.items() if token not in added}
        return table | {token: b"" if t.special else t.content.encode("utf-8") for token, t in added.items()}

    def save(self, folder: Path) -> None:
        """Write the files that it was read from."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def _from_byte_level() -> Callable[[str], bytes]:
    byte_of = {symbol: bytes([byte]) for byte, symbol in enumerate(byte_symbols())}
    return lambda token: b"".join([byte_of.get(symbol) or symbol.encode("utf-8") for symbol in token])


def _from_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode("utf-8")


def read_huggingface_tokenizer(folder: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a folder with `tokenizer.json`, or `vocab.json` and `merges.txt`, or BERT's `vocab.txt`.

    TokenizerError where it has none of them, or they are damaged.
    """
    files = {name: (folder / name).read_bytes() for name in KEPT_FILES if (folder / name).is_file()}
    backend = read_backend(folder)
    try:
        return HuggingFaceTokenizer(folder.resolve().name, backend, _eot_token(files, backend), files)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises nothing narrower
        raise TokenizerError(f"the tokenizer in {folder} is damaged: {error}") from None


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """What `read_huggingface_tokenizer` wraps, as the library has it; the same errors."""
    try:
        if (folder / TOKENIZER_FILE).is_file():
            return tokenizers.Tokenizer.from_buffer((folder / TOKENIZER_FILE).read_bytes())
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return _read_gpt2_files(folder)
        if (folder / "vocab.txt").is_file():
            return _read_bert_files(folder)
    except Exception as error:  # noqa: BLE001 - as above
        raise TokenizerError(f"the tokenizer in {folder} is damaged: {error}") from None
    raise TokenizerError(
        f"{folder} has no tokenizer: no {TOKENIZER_FILE}, vocab.json with merges.txt, or vocab.txt. transformers "
        f"writes one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
    )


def _read_gpt2_files(folder: Path) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([END_OF_TEXT])
    return backend


def _read_bert_files(folder: Path) -> tokenizers.Tokenizer:
    """WordPiece as BERT's first folders keep it: a token per line, and its settings beside it."""
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocab = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([word for word in BERT_SPECIALS if word in vocab])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(word, vocab[word]) for word in ("[CLS]", "[SEP]")]
    )
    return backend


def _bos_id(files: dict[str, bytes], backend: tokenizers.Tokenizer) -> int | None:
    """What goes before every text: the settings' `bos_token` where they or the tokenizer's own template say so."""
    settings: dict[str, Any] = json.loads(files.get("tokenizer_config.json", b"{}"))
    named = settings.get("bos_token") or ""
    token = backend.token_to_id(named["content"] if isinstance(named, dict) else str(named))
    adds = settings.get("add_bos_token")
    if adds is None:
        adds = backend.encode("", add_special_tokens=True).ids[:1] == [token]
    return token if adds else None


def _eot_token(files: dict[str, bytes], backend: tokenizers.Tokenizer) -> str | None:
    """What the folder's settings name as the end of a sequence, else GPT-2's, if the vocabulary has it."""
    settings: dict[str, Any] = json.loads(files.get("tokenizer_config.json", b"{}"))
    named = settings.get("eos_token") or END_OF_TEXT
    token = named["content"] if isinstance(named, dict) else str(named)
    return token if backend.token_to_id(token) is not None else None
