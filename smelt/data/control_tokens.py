"""Prompts whose control tokens are the template's alone: those in a user's words stay words; knows no template.

A rendered prompt is one text, in which `<|im_end|>` ends a turn whoever wrote it. So before a conversation is
rendered, the characters that control tokens begin and end with are replaced, in all that comes from a request, by
private characters that occur in none of it. Each stands for one character, so templates may trim, cut and join as they
like. In the rendered text a control token is the template's own if none of it is marked. Then the characters come
back. Where every token is the template's, which is nearly always, the text is encoded as a whole, exactly as
transformers would; otherwise it is cut within each false token, and the pieces are encoded apart (a tokenizer of
SentencePiece's kind may see a space there).

Control tokens are the tokenizer's special tokens, and added ones such as `<tool_call>` that the template names. What
an assistant said keeps tags such as `</think>`: the model wrote them itself, and templates look for them.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tokenizers

from smelt.data.bpe import to_utf8
from smelt.errors import InvalidInput

PRIVATE = range(0xE000, 0xF8FF)  # characters that Unicode leaves to everybody's own use
TAG = re.compile(r"</?[A-Za-z_]+>")


class ControlTokens:
    """The tokens of a tokenizer that only a template may write. The backend is its alone: it is changed."""

    def __init__(self, backend: tokenizers.Tokenizer, template: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        added = {token: entry for token, entry in backend.get_added_tokens_decoder().items() if len(entry.content) > 1}
        self.special = frozenset(entry.content for entry in added.values() if entry.special)
        self._backend = backend
        self._template_chars = frozenset(template)
        self._special_ids = frozenset(token for token, entry in added.items() if entry.special) - _unknown_id(backend)
        named = (entry.content for entry in added.values() if entry.content in template and _ends(entry.content))
        self._tokens = self.special.union(named)
        self._ends = sorted({end for token in self._tokens for end in _ends(token)})
        firsts = "".join(map(re.escape, {token[0] for token in self._tokens}))
        self._firsts = re.compile(f"[{firsts}]" if firsts else "(?!)")
        self._lengths = sorted({len(token) for token in self._tokens}, reverse=True)

    def special_ids(self, names: Iterable[str]) -> dict[int, str]:
        """Those among the names that are special tokens, by id."""
        ids = {self._backend.token_to_id(name): name for name in names if name in self.special}
        return {token: name for token, name in ids.items() if token is not None}

    def marks_for(self, *values: Any) -> "Marks":
        """How to mark these values. TokenizerError for lone surrogates."""
        text = json.dumps(values, ensure_ascii=False)
        to_utf8(text)
        used = self._template_chars.union(text)
        free = [chr(code) for code in PRIVATE if chr(code) not in used]
        if len(free) < len(self._ends):
            raise InvalidInput("the messages hold all of Unicode's private characters; leave some out", "messages")
        return Marks(dict(zip(self._ends, free, strict=False)), self.special)

    def encode(self, rendered: str, marks: "Marks") -> list[int]:
        """Ids of what a template made of marked values. InvalidInput where a false control token would remain."""
        return self.encode_with_ends(marks.unescape(rendered), marks)[0]

    def encode_with_ends(self, marked: str, marks: "Marks") -> tuple[list[int], list[int]]:
        """The same of a text whose escapes are undone, and where in it each token ends."""
        text = marks.unmark(marked)
        cuts = [0, *self._cuts(text, marked), len(text)]
        ids: list[int] = []
        ends: list[int] = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            piece = self._backend.encode(text[start:end], add_special_tokens=False)
            ids += piece.ids
            ends += [start + last for _, last in piece.offsets]
        num_own = sum(1 for start, end in self._found(text) if _is_own(text, marked, start, end))
        if sum(token in self._special_ids for token in ids) > num_own:
            raise InvalidInput("the messages hold text that the model's tokenizer takes for control tokens", "messages")
        return ids, ends

    def _cuts(self, text: str, marked: str) -> list[int]:
        """Where to cut so that no token but the template's own can be found: behind the first characters of others."""
        return [start + 1 for start, end in self._found(text) if not _is_own(text, marked, start, end)]

    def _found(self, text: str) -> Iterator[tuple[int, int]]:
        """Where control tokens stand, those within others too; of several that begin in one place the longest.

        There may be thousands of them, so what stands there is looked up, and not tried one by one.
        """
        for first in self._firsts.finditer(text):
            start = first.start()
            length = next((length for length in self._lengths if text[start : start + length] in self._tokens), None)
            if length is not None:
                yield start, start + length


class Marks:
    """Replaces the characters that control tokens begin and end with, and takes them back."""

    def __init__(self, mark_of: Mapping[str, str], special: frozenset[str]) -> None:
        self._special = special
        self._marks = sorted(mark_of.values())
        self._marking = str.maketrans(dict(mark_of))
        self._unmarking = str.maketrans({mark: end for end, mark in mark_of.items()})

    def mark(self, value: Any) -> Any:
        """The value with all of its texts marked, the keys of objects too."""
        if isinstance(value, str):
            return value.translate(self._marking)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def mark_but_tags(self, text: str) -> str:
        """The text marked, but for tags that are no special tokens."""
        parts, start = [], 0
        for tag in TAG.finditer(text):
            if tag[0] not in self._special:
                parts += [self.mark(text[start : tag.start()]), tag[0]]
                start = tag.end()
        return "".join([*parts, self.mark(text[start:])])

    def unescape(self, text: str) -> str:
        """Marks that the template has written as JSON's escapes (`\\ue000`) are characters again."""
        for mark in self._marks:
            text = text.replace(f"\\u{ord(mark):04x}", mark)
        return text

    def unmark(self, text: str) -> str:
        """The text as it was, character by character."""
        return text.translate(self._unmarking)


def _ends(token: str) -> set[str]:
    """Its first and last symbols: were letters marked, templates could not read `tool_calls`."""
    symbols = [char for char in token if not (char.isalnum() or char.isspace() or char == "_")]
    return {symbols[0], symbols[-1]} if symbols else set()


def _is_own(text: str, marked: str, start: int, end: int) -> bool:
    """Whether the template wrote this token. One without any symbol cannot be told from words, and is taken as such."""
    return marked[start:end] == text[start:end] and bool(_ends(text[start:end]))


def _unknown_id(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """The token for what has no other: any text may become it."""
    unknown = getattr(backend.model, "unk_token", None)
    token = None if unknown is None else backend.token_to_id(unknown)
    return frozenset() if token is None else frozenset({token})
