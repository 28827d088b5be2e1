"""Calls of functions in what models write, whole and piece by piece."""

import json
import random
from typing import Any

import pytest

from chat_templates import LLAMA_3, MISTRAL, QWEN_3, ZEPHYR
from smelt.data.tool_calls import DIALECTS, ToolCallStream, dialect_of
from smelt.types import ToolCall

HERMES, XML, LLAMA, MISTRALS = (DIALECTS[name] for name in ("hermes", "xml", "llama", "mistral"))
ADD = ("add", {"a": 1, "b": [2, "ü"]})
NOW = ("now", {})


def plain(calls: tuple[ToolCall, ...]) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


CASES = [
    (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "ü"]}}\n</tool_call>', "", [ADD]),
    (HERMES, 'Let me see.\n<tool_call>{"name": "now"}</tool_call>', "Let me see.", [NOW]),
    (
        HERMES,
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n<tool_call>\n'
        '{"name": "add", "arguments": {"a": 1, "b": [2, "ü"]}}\n</tool_call>',
        "",
        [NOW, ADD],
    ),
    (HERMES, '<tool_call>\n{"name": "now", "arguments": "{}"}', "", [NOW]),
    (HERMES, "a <tool_call>not JSON</tool_call>", "a <tool_call>not JSON</tool_call>", []),
    (HERMES, '<tool_call>{"name": 7}</tool_call>', '<tool_call>{"name": 7}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
    (HERMES, '<tool_call>{"name": "cut o', '<tool_call>{"name": "cut o', []),
    (HERMES, "1 < 2", "1 < 2", []),
    (
        XML,
        'I add.\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n[2, "ü"]\n</parameter>\n'
        "</function>\n</tool_call>",
        "I add.",
        [ADD],
    ),
    (
        XML,
        "<tool_call><function=say><parameter=text>two\nlines</parameter></function></tool_call>",
        "",
        [("say", {"text": "two\nlines"})],
    ),
    (XML, "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    (LLAMA, '{"name": "add", "parameters": {"a": 1, "b": [2, "ü"]}}', "", [ADD]),
    (LLAMA, '<|python_tag|>{"name": "now", "parameters": {}}<|eom_id|>', "", [NOW]),
    (
        LLAMA,
        ' {"name": "now", "parameters": {}}; {"name": "add", "parameters": {"a": 1, "b": [2, "ü"]}}',
        "",
        [NOW, ADD],
    ),
    (LLAMA, '{"city": "Rome"}', '{"city": "Rome"}', []),
    (LLAMA, '{"name": "now", "parameters": {}} and more', None, []),
    (LLAMA, 'I write {"name": "now", "parameters": {}}', None, []),
    (LLAMA, "{" * 10**5, None, []),
    (MISTRALS, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": [2, "ü"]}}]', "", [ADD]),
    (MISTRALS, '[{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]', "", [NOW, NOW]),
    (MISTRALS, 'Yes.[TOOL_CALLS][{"name": "now", "arguments": {}}]', "Yes.", [NOW]),
    (MISTRALS, '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"a": 1, "b": [2, "ü"]}', "", [NOW, ADD]),
    (MISTRALS, 'Yes.[TOOL_CALLS]now[ARGS]{"a": ', None, []),
    (MISTRALS, "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]", None, []),
    (MISTRALS, "[1, 2]", "[1, 2]", []),
    (MISTRALS, '[{"name": "now", "arguments": {}}, 3]', None, []),
]  # content None: the whole text


@pytest.mark.parametrize(("dialect", "text", "content", "calls"), CASES)
def test_calls_are_read(dialect: Any, text: str, content: str | None, calls: list[Any]) -> None:
    said, read = dialect.read(text)
    assert (said, plain(read)) == (text if content is None else content, calls)


@pytest.mark.parametrize(("dialect", "text", "content", "calls"), CASES)
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_a_stream_shows_what_is_no_call_and_gives_the_calls(
    dialect: Any, text: str, content: str | None, calls: list[Any], seed: int | None
) -> None:
    cuts = random.Random(seed)
    stream = ToolCallStream(dialect)
    shown, rest = "", text
    while rest:
        length = 1 if seed is None else cuts.randint(1, 12)
        shown += stream.push(rest[:length])
        rest = rest[length:]
    last, read = stream.finish()
    assert plain(read) == calls
    expected = text if content is None else content
    assert (shown + last).strip() == expected.strip()
    assert not calls or "{" not in shown


def test_text_is_shown_as_soon_as_it_is_surely_text() -> None:
    stream = ToolCallStream(HERMES)
    assert stream.push("Hello <") == "Hello "
    assert stream.push("b>you</b> <tool") == "<b>you</b> "
    assert stream.push("_box> ") == "<tool_box> "
    stream = ToolCallStream(LLAMA)
    assert stream.push(" \n") == ""
    assert stream.push("No {") == " \nNo {"


def test_without_a_dialect_all_is_text() -> None:
    stream = ToolCallStream(None)
    assert stream.push('<tool_call>{"name": "now"}</tool_call>') == '<tool_call>{"name": "now"}</tool_call>'
    assert stream.finish() == ("", ())


def test_ids_are_new_and_as_templates_want_them() -> None:
    two = '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]'
    first, second = MISTRALS.read(two)[1]
    assert first.id != second.id
    assert len(first.id) == 9
    assert first.id.isalnum()
    assert LLAMA.read('{"name": "now", "parameters": {}}')[1][0].id.startswith("call_")


def test_a_template_tells_the_dialect() -> None:
    assert [dialect_of(text) for text in (QWEN_3, LLAMA_3, MISTRAL, ZEPHYR)] == [HERMES, LLAMA, MISTRALS, None]
    assert dialect_of(QWEN_3 + "<function=name>") is XML
