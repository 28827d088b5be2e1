"""Which tokens may come next, where an answer has to be of a form; knows no model and no request.

The library `llguidance` turns JSON schemas and regular expressions into masks over a vocabulary. Its limits on work
and memory are set here, and what would outgrow its stack is refused before it sees it.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from torch import Tensor

from smelt.data.tokenizers import Tokenizer
from smelt.errors import InvalidInput, TokenizerError
from smelt.types import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

PARAM = "response_format"
MAX_TEXT_BYTES = 1 << 16
MAX_NESTING = 1000  # levels of a schema and what its references lead to: about 5,000 would fill a stack of 8 MB
NUM_CACHED = 64
MAX_REASON_CHARS = 300
MAX_FORCED_CHARS = 64  # of what can only go on in one way that are looked at together
# What a schema may not change by itself. Without a limit on blanks, weak models write them until their tokens are
# used up; what is not implemented must be refused, for an answer that passes over it would not be valid.
JSON_OPTIONS: "JsonCompileOptions" = {"whitespace_pattern": r"[ \n]{1,16}", "lenient": False, "coerce_one_of": False}
LIMITS = LLParserLimits(
    step_lexer_fuel=50_000,  # about 4 ms of work for one token
    step_max_items=50_000,
    max_lexer_states=20_000,  # 1 to 2 KB each
    max_grammar_size=100_000,
    verbose_errors=False,
)


class GrammarState(Protocol):
    """How far an answer is in its grammar."""

    def fill(self, mask: Tensor) -> None:
        """Set, in a row of int32 words of 32 tokens each, lowest bit first, the bits of those that may come next.

        Where the grammar may end, the tokens that end an answer are among them; where it must, they are alone.
        InvalidInput where the answer has become too expensive to check.
        """

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed."""

    def fork(self) -> "GrammarState":
        """Another state that is as far, and goes on by itself."""


class MatcherState:
    """A GrammarState of llguidance's."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill(self, mask: Tensor) -> None:
        """Set the bits of the tokens that may come next; `mask` is contiguous and on the CPU."""
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        if self._matcher.is_error():
            raise InvalidInput(f"the answer cannot go on in its form: {_reason(self._matcher.get_error())}", PARAM)

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed; where it cannot be checked any more, the next `fill` says so."""
        self._matcher.consume_token(token)

    def fork(self) -> "MatcherState":
        """Another state that is as far."""
        return MatcherState(self._matcher.deep_copy())


class GrammarCompiler:
    """Makes grammars for one vocabulary: the tokenizer's ids below `vocab_size`. Threads may share it.

    `end_ids` are tokens that end an answer besides the end-of-text token, such as those that end a turn of a chat.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        named = {*end_ids} if tokenizer.eot_id is None else {tokenizer.eot_id, *end_ids}
        self._end_ids = sorted(token for token in named if token < vocab_size)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, grammar: Grammar) -> GrammarState:
        """The state before the first token. InvalidInput says why a grammar cannot be followed.

        This may take a second; the same grammar again takes microseconds.
        """
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is None:
                matcher = self._compiled[grammar] = self._compile(grammar)
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > NUM_CACHED:
                self._compiled.popitem(last=False)
            return MatcherState(matcher.deep_copy())

    def _compile(self, grammar: Grammar) -> LLMatcher:
        num_bytes = len(grammar.text.encode("utf-8", "surrogatepass"))
        if num_bytes > MAX_TEXT_BYTES:
            raise InvalidInput(f"the {_noun(grammar)} has {num_bytes:,} bytes; {MAX_TEXT_BYTES:,} is the limit", PARAM)
        vocabulary = self._vocabulary
        try:
            matcher = LLMatcher(vocabulary, _source(grammar), log_level=0, limits=LIMITS)
            matcher.compute_bitmask()  # the first mask may be the most expensive: better here than while others wait
        except ValueError as error:
            raise InvalidInput(f"the {_noun(grammar)} cannot be read: {_reason(str(error))}", PARAM) from None
        if matcher.is_error():
            raise InvalidInput(f"the {_noun(grammar)} cannot be followed: {_reason(matcher.get_error())}", PARAM)
        return matcher

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        table = self._tokenizer.token_bytes()
        if table is None or not self._end_ids:
            lack = "tokens with bytes of their own" if table is None else "an end-of-text token"
            raise InvalidInput(f"this model's tokenizer {self._tokenizer.name} lacks {lack}", PARAM)
        vocabulary = _Vocabulary(self._tokenizer, table[: self._vocab_size], self._end_ids)
        return LLTokenizer(vocabulary, n_vocab=self._vocab_size, eos_token=self._end_ids)


class _Vocabulary(TokenizerWrapper):
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer, table: list[bytes], end_ids: list[int]) -> None:
        self.is_tokenizer_wrapper = True
        self.bos_token_id = None
        self.eos_token_id = end_ids[0]
        self.special_token_ids = sorted({*end_ids, *(token for token, text in enumerate(table) if not text)})
        is_special = set(self.special_token_ids)
        self.tokens = [b"<%d>" % token if token in is_special else text for token, text in enumerate(table)]
        self._encode = tokenizer.encode
        self._ids = {text: token for token, text in enumerate(table) if token not in is_special}
        self._max_bytes = max(map(len, self._ids), default=1)

    def __call__(self, text: str) -> list[int]:
        """The ids of a text that has to come: of its beginning, where it is long.

        Where the tokenizer itself would put something before the text, the longest tokens that fit are taken.
        """
        text = text[:MAX_FORCED_CHARS]
        text_bytes = text.encode("utf-8")
        try:
            tokens = self._encode(text)
        except TokenizerError:
            return self._greedy(text_bytes)
        is_known = all(token < len(self.tokens) for token in tokens)
        is_exact = is_known and b"".join(self.tokens[token] for token in tokens) == text_bytes
        return tokens if is_exact else self._greedy(text_bytes)

    def _greedy(self, text: bytes) -> list[int]:
        tokens: list[int] = []
        start = 0
        while start < len(text):
            ends = range(min(len(text), start + self._max_bytes), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:
                break
            tokens.append(self._ids[text[start:end]])
            start = end
        if text and not tokens:
            raise TokenizerError(f"the tokenizer has no token for {text[:20]!r}")
        return tokens


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own language."""
    if grammar.kind == "regex":
        # With \d as 0 to 9: few who write it want the digits of all scripts.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.text, use_ascii='d')}/")
    schema = {"type": "object"} if grammar.kind == "json" else _parse_schema(grammar.text)
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)


def _parse_schema(text: str) -> Any:
    try:
        schema = json.loads(text)
        num_levels = _num_levels(schema) + sum(_num_levels(_target(schema, ref)) for ref in _references(schema))
    except RecursionError:
        raise InvalidInput("the JSON schema is nested too deeply", PARAM) from None
    if num_levels > MAX_NESTING:
        message = f"the JSON schema has {num_levels:,} levels with those of its references; {MAX_NESTING} is the limit"
        raise InvalidInput(message, PARAM)
    return schema


def _num_levels(value: Any) -> int:
    """How deep lists and objects are nested."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_num_levels, children), default=0)


def _references(value: Any) -> set[str]:
    """All that `$ref`s within point at."""
    if isinstance(value, dict):
        own = {str(value["$ref"])} if "$ref" in value else set()
        return own.union(*map(_references, value.values()))
    return set().union(*map(_references, value)) if isinstance(value, list) else set()


def _target(schema: Any, reference: str) -> Any:
    """What a JSON pointer leads to; None where it leads nowhere, which llguidance will say."""
    value = schema
    for part in reference.removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def _noun(grammar: Grammar) -> str:
    return "regular expression" if grammar.kind == "regex" else "JSON schema"


def _reason(message: str) -> str:
    """The first lines of what llguidance says, in one."""
    lines = [line.strip() for line in message.splitlines() if "<non-verbose/>" not in line]
    return " ".join(line for line in lines if line.strip("^ "))[:MAX_REASON_CHARS]
