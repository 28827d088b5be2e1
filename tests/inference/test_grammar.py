import json
import random
import re
import string
import threading
import time
from typing import Any

import jsonschema
import pytest
import tokenizers
import torch
from tokenizers import decoders, models

from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer, CharTokenizer
from smelt.data.hf_tokenizer import HuggingFaceTokenizer
from smelt.data.tokenizers import Tokenizer, make_tokenizer
from smelt.errors import InvalidInput
from smelt.inference.engine import Engine
from smelt.inference.grammar import GrammarCompiler, GrammarState
from smelt.inference.sequence import Sequence
from smelt.models.decoder import Decoder
from smelt.types import Grammar, SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,3}$"}, "maxItems": 3},
        "parent": {"$ref": "#/$defs/ref"},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
    "$defs": {"ref": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
}
TEXT = 'He said: {"name": "Ünal 🙂", "age": 12, "tags": ["ab", "c"]}\n' * 20


def compiler(tokenizer: Tokenizer | None = None) -> GrammarCompiler:
    tokenizer = tokenizer or ByteTokenizer()
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", value if isinstance(value, str) else json.dumps(value))


def allowed(state: GrammarState, vocab_size: int = 257) -> list[int]:
    mask = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)
    state.fill(mask)
    return [token for token in range(vocab_size) if int(mask[token // 32]) >> token % 32 & 1]


def write_at_random(state: GrammarState, tokenizer: Tokenizer, seed: int, num_tokens: int = 3000) -> str | None:
    """What comes of drawing any token that is allowed; None where it does not end in time."""
    luck = random.Random(seed)
    tokens: list[int] = []
    for _ in range(num_tokens):
        token = luck.choice(allowed(state, tokenizer.vocab_size))
        if token == tokenizer.eot_id:
            return tokenizer.decode_bytes(tokens).decode("utf-8")
        state.accept(token)
        tokens.append(token)
    return None


def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "char":
        return CharTokenizer.learn([string.printable + "äöü🙂"])
    if kind == "bpe":
        return make_tokenizer("bpe:400", lambda: iter([TEXT]))
    words = ["<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *'▁abcdefghij{}[]:,"0123', '{"', '":', "ab"]
    backend = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>"])
    return HuggingFaceTokenizer("sentencepiece", backend, "</s>", {})


@pytest.mark.parametrize("kind", ["bytes", "char", "bpe", "sentencepiece"])
def test_whatever_is_written_by_a_schema_is_valid(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    start = compiler(tokenizer).start(schema(PERSON))
    texts = [write_at_random(start.fork(), tokenizer, seed) for seed in range(15)]
    written = [json.loads(text) for text in texts if text is not None]
    assert len(written) > 5
    for value in written:
        jsonschema.validate(value, PERSON)


@pytest.mark.parametrize(
    "pattern", [r"[a-c]{2,5}-\d+", "(ja|nein)!?", r"(?i)abc", "é+🙂", 'a/b\n"c', "", "^x?$", r"\."]
)
def test_whatever_is_written_by_a_regex_matches(pattern: str) -> None:
    tokenizer = tokenizer_of("bpe")
    start = compiler(tokenizer).start(Grammar("regex", pattern))
    for seed in range(10):
        text = write_at_random(start.fork(), tokenizer, seed)
        assert text is not None
        assert re.fullmatch(pattern, text)


def test_json_is_any_object() -> None:
    tokenizer = ByteTokenizer()
    start = compiler().start(Grammar("json"))
    assert allowed(start) == [ord("{")]
    texts = [write_at_random(start.fork(), tokenizer, seed) for seed in range(20)]
    assert all(isinstance(json.loads(text), dict) for text in texts if text is not None)
    assert any(text is not None for text in texts)


def test_the_end_is_allowed_where_the_grammar_may_end_and_forced_where_it_must() -> None:
    state = compiler().start(Grammar("regex", "ab?"))
    assert allowed(state) == [ord("a")]
    state.accept(ord("a"))
    assert allowed(state) == [ord("b"), 256]
    state.accept(ord("b"))
    assert allowed(state) == [256]
    state.accept(256)
    assert allowed(state) == [256]


def test_other_tokens_may_end_an_answer_too() -> None:
    made = GrammarCompiler(ByteTokenizer(), 257, end_ids=[0])
    state = made.start(Grammar("regex", "a"))
    state.accept(ord("a"))
    assert allowed(state) == [0, 256]


def test_forks_go_on_by_themselves() -> None:
    state = compiler().start(Grammar("regex", "(ab|cd)"))
    state.accept(ord("a"))
    fork = state.fork()
    fork.accept(ord("b"))
    assert allowed(fork) == [256]
    assert allowed(state) == [ord("b")]


def test_a_state_can_be_replayed() -> None:
    made = compiler()
    state = made.start(schema(PERSON))
    for token in b'{"name":"a","age":1':
        state.accept(token)
    again = made.start(schema(PERSON))
    for token in b'{"name":"a","age":1':
        again.accept(token)
    assert allowed(again) == allowed(state)


def test_blanks_between_parts_are_limited() -> None:
    state = compiler().start(Grammar("json"))
    for token in b"{" + b" " * 16:
        assert token in allowed(state)
        state.accept(token)
    assert ord(" ") not in allowed(state)


def test_ids_beyond_the_model_s_are_never_allowed() -> None:
    tokenizer = make_tokenizer("bpe:400", lambda: iter([TEXT]))
    assert tokenizer.eot_id is not None
    with pytest.raises(InvalidInput, match="end-of-text"):
        GrammarCompiler(tokenizer, tokenizer.eot_id).start(Grammar("json"))


def test_tokenizers_without_bytes_or_an_end_are_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(InvalidInput, match="tokens with bytes of their own"):
        compiler(HuggingFaceTokenizer("bert", backend, "a", {})).start(Grammar("json"))


# --- What must not be followed ---------------------------------------------------------------------------


def chained(num_definitions: int) -> dict[str, Any]:
    """Definitions each of which asks for the next: with a thousand the library would overrun its stack."""
    definitions: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(num_definitions)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{num_definitions}": {"type": "null"}}}


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("regex", "a("), "unclosed group"),
        (Grammar("regex", "[z-a]"), "invalid character class range"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", r"(a)\1"), "backreferences"),
        (Grammar("regex", "(" * 5000 + "a" + ")" * 5000), "regular expression cannot be followed"),
        (Grammar("regex", r"[^\s\S]"), "cannot be followed"),
        (Grammar("regex", "a" * 70_000), "70,000 bytes; 65,536 is the limit"),
        (schema('{"type"'), "cannot be read"),
        (schema("[1]"), "Expecting object schema"),
        (schema({"type": "strin"}), "Invalid type: strin"),
        (schema({"$ref": "#/nope"}), "'/nope' does not exist"),
        (schema({"$ref": "http://127.0.0.1/x"}), "does not fetch"),
        (schema({"$ref": "#"}), "cannot be followed"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (schema({"oneOf": [{"type": "string", "maxLength": i} for i in (2, 3)]}), "oneOf"),
        (schema({"type": "object", "properties": {"a": False}, "required": ["a"]}), "Unsatisfiable"),
        (schema('{"items":' * 900 + "{}" + "}" * 900), "levels|nested"),
        (schema('{"items":' * 300 + "{}" + "}" * 300), "recursion limit"),
        (schema('{"items":' * 5000 + "{}" + "}" * 5000), "levels|nested"),
        (schema(chained(300)), "levels with those of its references; 1000 is the limit"),
        (
            schema({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(8)]} for i in range(12)]}),
            "large",
        ),
    ],
    ids=lambda value: value.text[:20] if isinstance(value, Grammar) else "",
)
def test_what_cannot_be_followed_is_refused_with_the_reason(grammar: Grammar, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason) as failure:
        compiler().start(grammar)
    assert failure.value.param == "response_format"
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 400


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar("regex", "(a+)+b"), "a" * 200),
        (Grammar("regex", "(a|b)*a(a|b){20}"), "ab" * 100),
        (Grammar("regex", ".*a.{200}"), "a" * 200),
        (Grammar("regex", r"\w{3000}"), "a" * 200),
        (Grammar("regex", "a{20000}"), "a" * 200),
        (schema({"type": "string", "minLength": 100_000, "maxLength": 1_000_000}), '"aaaaaaaa'),
        (schema({"type": "array", "items": {"type": "integer"}, "minItems": 100_000}), "[1,2,3,4,5,6,7"),
        (schema({"enum": [f"v{i}" for i in range(3000)]}), '"v1'),
        (schema(chained(80)), '{"a":{"a":{"a":'),
    ],
    ids=lambda value: value.text[:20] if isinstance(value, Grammar) else "",
)
def test_what_would_take_other_engines_forever_is_followed_in_milliseconds(grammar: Grammar, text: str) -> None:
    state = compiler().start(grammar)
    slowest = 0.0
    for token in text.encode():
        began = time.process_time()
        assert token in allowed(state)
        state.accept(token)
        slowest = max(slowest, time.process_time() - began)
    assert slowest < 0.5


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar("regex", "(.{1,300}x){300}"), b"ax" * 300),
        (Grammar("regex", "(a{1000}){1000}"), b"aaa"),
        (schema({"type": "string", "pattern": "^(a{1000}){1000}$"}), b'"aaa'),
    ],
    ids=["ambiguous", "long", "long within a schema"],
)
def test_what_becomes_too_expensive_underway_says_so(grammar: Grammar, text: bytes) -> None:
    def write() -> None:
        state = compiler().start(grammar)
        for token in text:
            allowed(state)
            state.accept(token)

    with pytest.raises(InvalidInput, match="cannot go on in its form: lexer error: too many expressions") as failure:
        write()
    assert failure.value.param == "response_format"


def test_a_text_that_the_tokenizer_cannot_write_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no token for b'{'"):
        compiler(CharTokenizer.learn(["abc"])).start(Grammar("json"))


def test_a_grammar_is_compiled_once_and_other_threads_go_on() -> None:
    made = compiler()
    slow = Grammar("regex", "a{100000}")
    ticks = 0
    compiling = threading.Thread(target=made.start, args=(slow,))
    compiling.start()
    while compiling.is_alive():
        ticks += 1
    assert ticks > 100
    began = time.process_time()
    made.start(slow)
    assert time.process_time() - began < 0.05


# --- Through the engine ----------------------------------------------------------------------------------


def test_a_random_model_answers_in_form_beside_others_that_need_not() -> None:
    tokenizer = tokenizer_of("bpe")
    model = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, block_size=1024, n_layer=1, n_head=2, n_embd=16))
    model.initialize(0)
    engine = Engine(model, tokenizer.vocab_size)
    made = compiler(tokenizer)
    assert tokenizer.eot_id is not None
    stop = frozenset({tokenizer.eot_id})

    def sequence(seed: int, grammar: Grammar | None) -> Sequence:
        params = SamplingParams(max_tokens=600, temperature=1.0, seed=seed, stop_token_ids=stop)
        return Sequence([1, 2, 3], params, grammar=None if grammar is None else made.start(grammar))

    free = [sequence(seed, None) for seed in range(2)]
    formed = [sequence(seed, schema(PERSON)) for seed in range(6)]
    numbers = [sequence(seed, Grammar("regex", r"\d{3}-\d{2}")) for seed in range(3)]
    for added in (*free, *formed, *numbers):
        engine.add(added)
    while engine.has_work:
        engine.step()
    texts = [tokenizer.decode(s.output_ids) for s in formed if s.finish_reason == "stop"]
    assert len(texts) >= 3
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert all(re.fullmatch(r"\d{3}-\d{2}", tokenizer.decode(s.output_ids)) for s in numbers)
    assert all(s.finish_reason == "stop" for s in numbers)
