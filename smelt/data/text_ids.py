"""Texts as the token ids that a classifier reads: the tokenizer's ids within the special tokens that frame a text.

Knows no model. Nothing is padded; what is too long loses its end, as in transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from smelt.data.hf_tokenizer import HuggingFaceTokenizer
from smelt.data.tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class TextIds:
    """Encodes texts of at most `max_length` tokens, frame included."""

    tokenizer: Tokenizer
    max_length: int
    lowercase: bool = False

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, at least one. TokenizerError for lone surrogates."""
        before, after = frame_of(self.tokenizer)
        room = max(0, self.max_length - len(before) - len(after))
        # Byte-level tokens of words begin with the space before them: so do those of a text's first word.
        given = [f" {text.lower()}" for text in texts] if self.lowercase else texts
        ids = [row[:room].tolist() for row in self.tokenizer.encode_batch(given)]
        return [[*before, *row, *after] or [self.tokenizer.eot_id or 0] for row in ids]


def frame_of(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text: [CLS] and [SEP] for BERT, what a decoder begins with."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.frame
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]), []
