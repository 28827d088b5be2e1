"""Control tokens in a rendered prompt: the template's become ids, those in words that came with a request do not."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers

from chat_templates import ADDED, SPECIAL, write_tokenizer
from smelt.data.bpe import byte_symbols
from smelt.data.control_tokens import ControlTokens
from smelt.data.hf_tokenizer import read_backend
from smelt.data.templates import render
from smelt.errors import InvalidInput, TokenizerError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{# <tool_call> <think> </think> #}"
)
NUM_OWN = 2  # control tokens that it writes for a message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def control(folder: Path) -> ControlTokens:
    return ControlTokens(read_backend(folder), CHATML)


def ids_of(control: ControlTokens, content: str, template: str = CHATML, role: str = "user") -> list[int]:
    marks = control.marks_for(content)
    marked = marks.mark_but_tags(content) if role == "assistant" else marks.mark(content)
    return control.encode(render(template, {"messages": [{"role": role, "content": marked}]}), marks)


def control_ids(ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token >= 256]  # the others are bytes


def text_of(folder: Path, ids: Sequence[int]) -> str:
    return read_backend(folder).decode(list(ids), skip_special_tokens=False)


@pytest.mark.parametrize("content", ["Hi", "a < b > c [d] | e", "", "<|im_endx|>", "Ünï 🐈 \ue000\ue001"])
def test_harmless_words_are_encoded_as_everybody_does(control: ControlTokens, folder: Path, content: str) -> None:
    text = f"<|im_start|>user\n{content}<|im_end|>\n"
    assert ids_of(control, content) == read_backend(folder).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("token", [*SPECIAL, "<tool_call>", "</think>"])
@pytest.mark.parametrize("around", ["{}", "Hi {} there", "{0}{0}", "<|im_{}", "x{}\n"])
def test_a_control_token_in_words_stays_words(control: ControlTokens, folder: Path, token: str, around: str) -> None:
    content = around.format(token)
    ids = ids_of(control, content)
    assert len(control_ids(ids)) == NUM_OWN
    assert text_of(folder, ids) == f"<|im_start|>user\n{content}<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("{{ messages[0].content | trim }}", "  <|im_end|>\n"),
        ("{{ messages[0].content | replace('!', '') }}", "<!|im_end|!>"),
        ("{{ messages[0].content | replace('!', '') }}", "!<|im_!end|>"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "end|><|im_"),
        ("{{ messages[0].content[2:] }}{{ messages[0].content[:2] }}", "d|><|im_en"),
        ("{{ messages[0].content | reverse }}", ">|dne_mi|<"),
        ("{{ messages | tojson }}", "<|im_end|>"),
        ("{{ messages | tojson(ensure_ascii=true) }}", "<|im_end|> Köln"),
        ("{{ messages[0].content | upper }}", "[/inst]"),
        ("{{ messages[0].content.split('|') | join('|') }}", "<|im_end|>"),
        ("{% for c in messages[0].content %}{{ c }}{% endfor %}", "<|im_end|>"),
        ("<|im_{{ messages[0].content }}", "end|>"),
    ],
)
def test_no_template_makes_control_tokens_of_words(folder: Path, template: str, content: str) -> None:
    control = ControlTokens(read_backend(folder), template)
    ids = ids_of(control, content, template)
    assert control_ids(ids) == []
    assert text_of(folder, ids) == render(template, {"messages": [{"role": "user", "content": content}]})


WORDS = st.lists(
    st.sampled_from([*SPECIAL, *ADDED, "<|", "|>", "<", ">", "im_end", "[", "]", "/", "\n", "a", "\ue000"])
)


@settings(max_examples=200, deadline=None)
@given(words=WORDS)
def test_no_words_become_control_tokens(control: ControlTokens, folder: Path, words: list[str]) -> None:
    content = "".join(words)
    ids = ids_of(control, content)
    order = (*SPECIAL, *ADDED)  # behind the 256 bytes
    named = {256 + order.index(token) for token in (*SPECIAL, "<tool_call>", "<think>", "</think>")}
    assert sum(token in named for token in ids) == NUM_OWN
    assert text_of(folder, ids) == f"<|im_start|>user\n{content}<|im_end|>\n"


def test_an_assistant_keeps_its_tags_but_no_special_tokens(control: ControlTokens, folder: Path) -> None:
    thinking = "<think>hm</think> </s> <|im_end|>"
    ids = ids_of(control, thinking, role="assistant")
    names = [read_backend(folder).id_to_token(token) for token in control_ids(ids)]
    assert names == ["<|im_start|>", "<think>", "</think>", "<|im_end|>"]
    looking = "{{ messages[0].content.split('</think>')[-1] }}"
    assert text_of(folder, ids_of(control, thinking, looking, "assistant")) == " </s> <|im_end|>"


def test_words_in_keys_and_lists_are_marked_too(control: ControlTokens) -> None:
    value = {"</s>": ["<s>", {"a": ("<|im_end|>", 1, None, True)}]}
    marks = control.marks_for(value)
    marked = marks.mark(value)
    assert "<" not in str(marked)
    assert ">" not in str(marked)
    assert json.loads(marks.unmark(json.dumps(marked, ensure_ascii=False))) == json.loads(json.dumps(value))


def test_names_of_fields_stay_readable() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken("_end_", normalized=False), AddedToken("PAD", normalized=False)])
    control = ControlTokens(backend, "")
    marks = control.marks_for("tool_calls")
    assert marks.mark({"tool_calls": "PAD"}) == {"tool_calls": "PAD"}
    assert {2, 3}.isdisjoint(control.encode("a PAD _end_", marks))  # nobody can tell whose they are


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("content", ["Hi a", " b", "<x> a", "a </s> b"])
def test_tokenizers_that_put_a_space_before_texts(scheme: str, content: str) -> None:
    letters = {letter: rank for rank, letter in enumerate("?▁Habisx</>|\n")}
    backend = tokenizers.Tokenizer(models.BPE(letters, [], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>")])
    plain = tokenizers.Tokenizer.from_str(backend.to_str())
    template = "<s>{{ messages[0].content }}</s> x"
    ids = ids_of(ControlTokens(backend, template), content, template)
    if "</s>" not in content:
        assert ids == plain.encode(f"<s>{content}</s> x", add_special_tokens=False).ids
    assert ids.count(len(letters)) == ids.count(len(letters) + 1) == 1


def test_what_a_tokenizer_adds_for_text_is_text() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
    template = "{{ messages[0].content }}\n\na"
    assert ids_of(ControlTokens(backend, template), "a\n\na", template) == [0, 2, 0, 2, 0]


def test_thousands_of_control_tokens_and_brackets_cost_no_seconds() -> None:
    backend = tokenizers.Tokenizer(models.BPE({symbol: rank for rank, symbol in enumerate(byte_symbols())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([AddedToken(f"<|reserved_{n}|>", normalized=False) for n in range(3000)])
    control = ControlTokens(backend, CHATML)
    content = "<td>1</td>\n" * 10_000
    marks = control.marks_for(content)
    marked = marks.mark(content)
    began = time.process_time()
    assert control._cuts(content, marked) == []
    assert time.process_time() - began < 1


def test_a_tokenizer_that_sees_tokens_where_we_do_not_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<end>", normalized=True)])
    control = ControlTokens(backend, "")
    marks = control.marks_for("<END>")
    with pytest.raises(InvalidInput, match="takes for control tokens"):
        control.encode(marks.mark("a<END>"), marks)


def test_marks_are_characters_that_nobody_uses(control: ControlTokens) -> None:
    with pytest.raises(InvalidInput, match="private characters"):
        control.marks_for("".join(map(chr, range(0xE000, 0xF8FF))))
    with pytest.raises(TokenizerError):
        control.marks_for("\ud800")
